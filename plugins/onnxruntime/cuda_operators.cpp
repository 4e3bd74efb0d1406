// Both attentions on the CUDA provider: one launch of the kernel on the session's stream.
#include <algorithm>
#include <string>
#include <utility>

#include "../kernels/launch.h"
#include "custom_op.h"

namespace arrowhead::ort {
namespace {

constexpr std::int64_t kElementBytes = 2;

/// Device memory of one launch, from the session's arena. The arena hands it to other streams
/// only after this one has passed the launch, so it may be freed right after it.
class Workspace {
 public:
  explicit Workspace(const Ort::KernelContext& context) {
    int device = 0;
    cudaGetDevice(&device);
    const Ort::MemoryInfo memory("Cuda", OrtArenaAllocator, device, OrtMemTypeDefault);
    OrtKernelContext* raw = context.GetOrtKernelContext();
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(raw, memory, &allocator_));
    const Ort::Status got{
        Ort::GetApi().KernelContext_GetScratchBuffer(raw, memory, kWorkspaceBytes, &data_)};
    if (!got.IsOK()) {
      Ort::GetApi().ReleaseAllocator(allocator_);
      throw Ort::Exception(got.GetErrorMessage(), got.GetErrorCode());
    }
  }
  ~Workspace() {
    allocator_->Free(allocator_, data_);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

/// Text and image of a contiguous [B, S, heads, D].
SegmentViews views(const Call& call, bool text_first, const void* data, int heads) {
  const std::int64_t token = std::int64_t{heads} * call.head_dim;
  const auto from = [&](int first_token) {
    auto* bytes = static_cast<char*>(const_cast<void*>(data));
    return TensorView{bytes + first_token * token * kElementBytes, call.seq_len() * token, token,
                      call.head_dim};
  };
  const int text = text_first ? 0 : call.layout.image_tokens;
  const int image = text_first ? call.layout.text_tokens : 0;
  return {from(text), from(image)};
}

template <class ElementType>
class CudaAttention {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";
  static constexpr ONNXTensorElementDataType kType = Ort::TypeToTensorType<ElementType>::type;

  explicit CudaAttention(Attributes attributes) : attributes_(std::move(attributes)) {}

  void compute(Ort::KernelContext& context) const {
    const Call call(attributes_, context);
    void* out = context.GetOutput(0, call.shape(call.heads)).GetTensorMutableRawData();
    if (call.batch == 0 || call.seq_len() == 0) return;
    if (call.head_dim != 64 && call.head_dim != 128) {
      throw Ort::Exception("Arrowhead: got heads of " + std::to_string(call.head_dim) +
                               "; expected 64 or 128 on CUDA: run without this library",
                           ORT_NOT_IMPLEMENTED);
    }
    const auto tensor = [&](const void* data, int heads) {
      return views(call, attributes_.text_first, data, heads);
    };
    const auto input = [&](std::size_t index, int heads) {
      return tensor(context.GetInput(index).GetTensorRawData(), heads);
    };
    const Workspace workspace(context);
    AttentionParams params{};
    params.struct_size = sizeof params;
    params.element = kType == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? Element::kFloat16
                                                                    : Element::kBFloat16;
    params.batch = call.batch;
    params.heads = call.heads;
    params.head_dim = call.head_dim;
    params.image_tokens = call.layout.image_tokens;
    params.text_tokens = call.layout.text_tokens;
    params.block = call.layout.block;
    params.qkv_heads = call.qkv_heads;
    params.cache_heads = call.cache_heads;
    params.scale = attributes_.scale;
    params.q = input(0, call.qkv_heads);
    params.k = input(1, call.qkv_heads);
    params.v = input(2, call.qkv_heads);
    if (call.cache_heads > 0) params.cache = input(3, call.cache_heads);
    params.out = tensor(out, call.heads);
    std::copy(call.tasks, call.tasks + call.heads, params.tasks);
    params.workspace = workspace.data();
    const cudaError_t error =
        launch_attention(params, static_cast<cudaStream_t>(context.GetGPUComputeStream()));
    if (error != cudaSuccess) {
      throw Ort::Exception(std::string("Arrowhead: ") + cudaGetErrorString(error), ORT_FAIL);
    }
  }

 private:
  Attributes attributes_;
};

}  // namespace

void add_cuda_operators(Ort::CustomOpDomain& domain) {
  add_operators<CudaAttention<Ort::Float16_t>>(domain);
  add_operators<CudaAttention<Ort::BFloat16_t>>(domain);
}

}  // namespace arrowhead::ort
