// What the operators take and give: types, shapes, and the launch that comes of them.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "attributes.h"
#include "kernels/params.h"

namespace arrowhead::trt {

/// Throws Refused unless the operator has so many inputs and outputs.
void check_counts(const Attributes& attributes, int inputs, int outputs);

/// Throws Refused unless all are of one type, and the kernels know it.
void check_types(const nvinfer1::DataType* types, int count);

/// Check [B, S, h, D] of q, k, v, of the cache [B, S, c, D] if the operator has one, and of the
/// output [B, S, H, D] if `shapes` has one entry more. A dimension below 0 is not known yet.
/// Throws Refused, naming the tensor.
void check_shapes(const Attributes& attributes, const std::vector<nvinfer1::Dims>& shapes);

/// The launch on linear buffers, in the order of the operator's inputs, of checked shapes and type.
AttentionParams make_params(const Attributes& attributes, const nvinfer1::PluginTensorDesc* descs,
                            const void* const* inputs, void* output, void* workspace);

}  // namespace arrowhead::trt
