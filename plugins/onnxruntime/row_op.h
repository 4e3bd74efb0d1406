// HeadNorm and HeadRotary for one provider and element type, as ONNX Runtime is told of them.
#pragma once

#include <string>

#include "custom_op.h"

namespace arrowhead::ort {

/// Names and inputs of the two. `kTables`: the inputs after the first are fp32, not as the first.
struct HeadNorm {
  static constexpr const char* kName = "HeadNorm";
  static constexpr std::size_t kInputs = 2;
  static constexpr bool kTables = false;
};

struct HeadRotary {
  static constexpr const char* kName = "HeadRotary";
  static constexpr std::size_t kInputs = 3;
  static constexpr bool kTables = true;
};

/// The first input of a call, [B, S, heads, D].
struct Rows {
  std::vector<std::int64_t> shape;

  explicit Rows(const Ort::KernelContext& context)
      : shape(context.GetInput(0).GetTensorTypeAndShapeInfo().GetShape()) {
    if (shape.size() != 4) {
      throw Ort::Exception("Arrowhead: got an input of " + std::to_string(shape.size()) +
                               " dimensions; expected [B, S, heads, D]",
                           ORT_INVALID_ARGUMENT);
    }
  }

  std::int64_t tokens() const { return shape[1]; }
  std::int64_t heads() const { return shape[2]; }
  std::int64_t head_dim() const { return shape[3]; }

  /// Give an input that must have these dimensions.
  static Ort::ConstValue other(const Ort::KernelContext& context, std::size_t index,
                               const std::vector<std::int64_t>& dims) {
    const Ort::ConstValue value = context.GetInput(index);
    if (value.GetTensorTypeAndShapeInfo().GetShape() != dims) {
      throw Ort::Exception("Arrowhead: a weight or table does not fit the heads it is for",
                           ORT_INVALID_ARGUMENT);
    }
    return value;
  }
  Ort::ConstValue weight(const Ort::KernelContext& context) const {
    return other(context, 1, {head_dim()});
  }
  const float* table(const Ort::KernelContext& context, std::size_t index) const {
    return other(context, index, {tokens(), head_dim()}).GetTensorData<float>();
  }
};

/// `Implementation` has the members of HeadNorm or HeadRotary, kProvider and kType, is made from an
/// OrtKernelInfo, and is called with compute(Ort::KernelContext&).
template <class Implementation>
struct RowOp : Ort::CustomOpBase<RowOp<Implementation>, Kernel<Implementation>, true> {
  RowOp() {
    OrtCustomOp::version = kApiVersion;
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return status_of([&] { infer_output(context); });
    };
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return status_of([&] { *kernel = new Kernel<Implementation>{Implementation(info)}; });
  }

  const char* GetName() const { return Implementation::kName; }
  const char* GetExecutionProviderType() const { return Implementation::kProvider; }
  std::size_t GetInputTypeCount() const { return Implementation::kInputs; }
  std::size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(std::size_t index) const {
    const bool table = Implementation::kTables && index > 0;
    return table ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : Implementation::kType;
  }
  ONNXTensorElementDataType GetOutputType(std::size_t) const { return Implementation::kType; }
};

}  // namespace arrowhead::ort
