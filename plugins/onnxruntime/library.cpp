// What ONNX Runtime looks up when a session's options name the library.
#include "custom_op.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace arrowhead::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, "Arrowhead's operators need ONNX Runtime 1.21 or newer");
  }
  Ort::InitApi(api);
  return status_of([&] {
    // One for all sessions, and never destroyed: sessions may outlive any static object.
    static Ort::CustomOpDomain& domain = *[] {
      auto* made = new Ort::CustomOpDomain("arrowhead");
      add_cpu_operators(*made);
      add_cpu_row_operators(*made);
#if ARROWHEAD_CUDA
      add_cuda_operators(*made);
      add_cuda_row_operators(*made);
#endif
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
  });
}
