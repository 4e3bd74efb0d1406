// HeadNorm and HeadRotary on the CUDA provider: one launch each on the session's stream.
#include <string>

#include "../kernels/rows.h"
#include "row_op.h"

namespace arrowhead::ort {
namespace {

void check(cudaError_t error) {
  if (error == cudaErrorInvalidValue) {
    throw Ort::Exception("Arrowhead: got a D that is no power of two from 8 to 256, or more than "
                         "2^33 elements; on CUDA run such heads without this library",
                         ORT_NOT_IMPLEMENTED);
  }
  if (error != cudaSuccess) {
    throw Ort::Exception(std::string("Arrowhead: ") + cudaGetErrorString(error), ORT_FAIL);
  }
}

template <class ElementType>
struct OnCuda {
  static constexpr const char* kProvider = "CUDAExecutionProvider";
  static constexpr ONNXTensorElementDataType kType = Ort::TypeToTensorType<ElementType>::type;

  static RowParams params_of(const Rows& rows, Ort::KernelContext& context) {
    const auto dim = [&](int axis) { return static_cast<std::int32_t>(rows.shape[axis]); };
    return {kType == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? Element::kFloat16
                                                            : Element::kBFloat16,
            dim(0), dim(1), dim(2), dim(3), context.GetInput(0).GetTensorRawData(),
            context.GetOutput(0, rows.shape).GetTensorMutableRawData()};
  }

  static cudaStream_t stream(const Ort::KernelContext& context) {
    return static_cast<cudaStream_t>(context.GetGPUComputeStream());
  }
};

template <class ElementType>
class CudaNorm : public HeadNorm, public OnCuda<ElementType> {
 public:
  explicit CudaNorm(const OrtKernelInfo* info)
      : epsilon_(Ort::ConstKernelInfo{info}.GetAttribute<float>("epsilon")) {}

  void compute(Ort::KernelContext& context) const {
    const Rows rows(context);
    const void* weight = rows.weight(context).GetTensorRawData();
    check(launch_rms_norm(this->params_of(rows, context), weight, epsilon_, this->stream(context)));
  }

 private:
  float epsilon_;
};

template <class ElementType>
class CudaRotary : public HeadRotary, public OnCuda<ElementType> {
 public:
  explicit CudaRotary(const OrtKernelInfo*) {}

  void compute(Ort::KernelContext& context) const {
    const Rows rows(context);
    check(launch_rotary(this->params_of(rows, context), rows.table(context, 1),
                        rows.table(context, 2), this->stream(context)));
  }
};

}  // namespace

void add_cuda_row_operators(Ort::CustomOpDomain& domain) {
  domain.Add(new RowOp<CudaNorm<Ort::Float16_t>>);
  domain.Add(new RowOp<CudaNorm<Ort::BFloat16_t>>);
  domain.Add(new RowOp<CudaRotary<Ort::Float16_t>>);
  domain.Add(new RowOp<CudaRotary<Ort::BFloat16_t>>);
}

}  // namespace arrowhead::ort
