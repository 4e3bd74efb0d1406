// One operator for one provider and element type, as ONNX Runtime is told of it.
#pragma once

#include <exception>

#include "call.h"

namespace arrowhead::ort {

/// Nothing is thrown into ONNX Runtime: exceptions become its statuses.
template <class Body>
OrtStatusPtr status_of(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

/// The output is as q; CachedHead has the heads of its source. ONNX Runtime asks one of the
/// variants of an operator for all, so the element type is the input's, not the variant's.
inline void infer_output(OrtShapeInferContext* context) {
  const OrtApi& api = Ort::GetApi();
  Ort::ShapeInferContext wrapped(&api, context);
  Ort::ShapeInferContext::Shape shape = wrapped.GetInputShape(0);
  if (wrapped.GetInputCount() == 4 && shape.size() == 4) {
    shape[2] = static_cast<std::int64_t>(wrapped.GetAttrInts("source").size());
  }
  OrtTensorTypeAndShapeInfo* q = nullptr;  // the context's own
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, 0, &q));
  ONNXTensorElementDataType type{};
  Ort::ThrowOnError(api.GetTensorElementType(q, &type));
  const Ort::Status set = wrapped.SetOutputShape(0, shape, type);
  if (!set.IsOK()) throw Ort::Exception(set.GetErrorMessage(), set.GetErrorCode());
}

/// `Implementation` has kProvider and kType, is made from Attributes, and is called with
/// compute(Ort::KernelContext&).
template <class Implementation>
struct Kernel {
  Implementation implementation;

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    return status_of([&] {
      Ort::KernelContext wrapped{context};
      implementation.compute(wrapped);
    });
  }
};

template <class Implementation>
struct CustomOp : Ort::CustomOpBase<CustomOp<Implementation>, Kernel<Implementation>, true> {
  explicit CustomOp(bool cached) : cached_(cached) {
    OrtCustomOp::version = kApiVersion;
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return status_of([&] { infer_output(context); });
    };
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return status_of([&] {
      *kernel = new Kernel<Implementation>{Implementation(Attributes(info, cached_))};
    });
  }

  const char* GetName() const { return cached_ ? "CachedHead" : "ArrowAttention"; }
  const char* GetExecutionProviderType() const { return Implementation::kProvider; }
  std::size_t GetInputTypeCount() const { return cached_ ? 4 : 3; }
  std::size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(std::size_t) const { return Implementation::kType; }
  ONNXTensorElementDataType GetOutputType(std::size_t) const { return Implementation::kType; }

 private:
  bool cached_;
};

/// Add a provider's operators to a domain. They live as long as the process.
void add_cpu_operators(Ort::CustomOpDomain& domain);
void add_cuda_operators(Ort::CustomOpDomain& domain);
void add_cpu_row_operators(Ort::CustomOpDomain& domain);
void add_cuda_row_operators(Ort::CustomOpDomain& domain);

template <class Implementation>
void add_operators(Ort::CustomOpDomain& domain) {
  for (const bool cached : {false, true}) domain.Add(new CustomOp<Implementation>(cached));
}

}  // namespace arrowhead::ort
