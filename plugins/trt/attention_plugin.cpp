#include "attention_plugin.h"

#include "c_api.h"
#include "kernels/launch.h"
#include "refused.h"
#include "shapes.h"

namespace arrowhead::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr std::int32_t kSuccess = 0;
constexpr std::int32_t kFailure = 1;

const PluginTensorDesc& desc(const PluginTensorDesc& tensor) { return tensor; }
const PluginTensorDesc& desc(const DynamicPluginTensorDesc& tensor) { return tensor.desc; }

/// Types, formats and shapes of all tensors, inputs first.
template <class Tensor>
void check(const Attributes& attributes, const Tensor* inputs, std::int32_t input_count,
           const Tensor* outputs, std::int32_t output_count) {
  check_counts(attributes, input_count, output_count);
  std::vector<DataType> types;
  std::vector<Dims> shapes;
  for (std::int32_t i = 0; i < input_count + output_count; ++i) {
    const PluginTensorDesc& tensor = desc(i < input_count ? inputs[i] : outputs[i - input_count]);
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) {
      throw Refused("tensor " + std::to_string(i),
                    "format " + std::to_string(static_cast<int>(tensor.format)), "LINEAR",
                    "allow the linear format for the network's inputs and outputs");
    }
    types.push_back(tensor.type);
    shapes.push_back(tensor.dims);
  }
  check_types(types.data(), static_cast<int>(types.size()));
  check_shapes(attributes, shapes);
}

/// What is known of expressions while the network is defined.
Dims known(const nvinfer1::DimsExprs& expressions) {
  Dims dims{};
  dims.nbDims = expressions.nbDims;
  for (std::int32_t i = 0; i < expressions.nbDims; ++i) {
    dims.d[i] = expressions.d[i]->isConstant() ? expressions.d[i]->getConstantValue() : -1;
  }
  return dims;
}

}  // namespace

AttentionPlugin::AttentionPlugin(const std::string& layer, const Attributes& attributes)
    : layer_(layer),
      attributes_(attributes),
      metadata_(attributes.json()),
      timing_id_(metadata_ + " " + arrowhead_version() + " " + arrowhead_build_id()),
      fields_(fields_of(attributes.op, &attributes_)),
      collection_{static_cast<std::int32_t>(fields_.size()), fields_.data()} {}

AttentionPlugin::AttentionPlugin(const AttentionPlugin& other)
    : AttentionPlugin(other.layer_, other.attributes_) {}

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* AttentionPlugin::clone() noexcept {
  return guarded(name_of(attributes_.op), layer_, static_cast<IPluginV3*>(nullptr),
                 [&]() -> IPluginV3* { return new AttentionPlugin(*this); });
}

const char* AttentionPlugin::getPluginName() const noexcept { return name_of(attributes_.op); }
const char* AttentionPlugin::getPluginVersion() const noexcept { return kVersion; }
const char* AttentionPlugin::getPluginNamespace() const noexcept { return kNamespace; }

std::int32_t AttentionPlugin::getNbOutputs() const noexcept { return 1; }

std::int32_t AttentionPlugin::getOutputDataTypes(DataType* output_types, std::int32_t outputs,
                                                 const DataType* input_types,
                                                 std::int32_t inputs) const noexcept {
  return guarded(name_of(attributes_.op), layer_, kFailure, [&] {
    check_counts(attributes_, inputs, outputs);
    check_types(input_types, inputs);
    output_types[0] = input_types[0];
    return kSuccess;
  });
}

std::int32_t AttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs,
                                              std::int32_t input_count, const nvinfer1::DimsExprs*,
                                              std::int32_t, nvinfer1::DimsExprs* outputs,
                                              std::int32_t output_count,
                                              nvinfer1::IExprBuilder& expressions) noexcept {
  return guarded(name_of(attributes_.op), layer_, kFailure, [&] {
    check_counts(attributes_, input_count, output_count);
    std::vector<Dims> shapes;
    for (std::int32_t i = 0; i < input_count; ++i) shapes.push_back(known(inputs[i]));
    check_shapes(attributes_, shapes);
    outputs[0] = inputs[0];
    outputs[0].d[2] = expressions.constant(attributes_.output_heads());
    return kSuccess;
  });
}

bool AttentionPlugin::supportsFormatCombination(std::int32_t position,
                                                const DynamicPluginTensorDesc* tensors,
                                                std::int32_t, std::int32_t) noexcept {
  return guarded(name_of(attributes_.op), layer_, false, [&] {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position > 0) return tensor.type == tensors[0].desc.type;
    return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
  });
}

std::int32_t AttentionPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs,
                                              std::int32_t input_count,
                                              const DynamicPluginTensorDesc* outputs,
                                              std::int32_t output_count) noexcept {
  return guarded(name_of(attributes_.op), layer_, kFailure, [&] {
    check(attributes_, inputs, input_count, outputs, output_count);
    return kSuccess;
  });
}

std::size_t AttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc*, std::int32_t,
                                              const DynamicPluginTensorDesc*,
                                              std::int32_t) const noexcept {
  return kWorkspaceBytes;
}

const char* AttentionPlugin::getTimingCacheID() noexcept { return timing_id_.c_str(); }
const char* AttentionPlugin::getMetadataString() noexcept { return metadata_.c_str(); }

std::int32_t AttentionPlugin::onShapeChange(const PluginTensorDesc* inputs,
                                            std::int32_t input_count,
                                            const PluginTensorDesc* outputs,
                                            std::int32_t output_count) noexcept {
  return guarded(name_of(attributes_.op), layer_, kFailure, [&] {
    check(attributes_, inputs, input_count, outputs, output_count);
    return kSuccess;
  });
}

std::int32_t AttentionPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                                      const void* const* inputs, void* const* outputs,
                                      void* workspace, cudaStream_t stream) noexcept {
  return guarded(name_of(attributes_.op), layer_, kFailure, [&] {
    const AttentionParams params =
        make_params(attributes_, input_descs, inputs, outputs[0], workspace);
    const cudaError_t error = launch_attention(params, stream);
    if (error == cudaSuccess) return kSuccess;
    throw Refused("launch", cudaGetErrorString(error),
                  std::string("a device that has a kernel among sm_") + arrowhead_architectures() +
                      ", and buffers at multiples of 16 bytes",
                  "build the library for this device (`make plugins`), or use another");
  });
}

nvinfer1::IPluginV3* AttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();  // a context needs nothing of its own: the workspace is TensorRT's
}

const nvinfer1::PluginFieldCollection* AttentionPlugin::getFieldsToSerialize() noexcept {
  return &collection_;
}

}  // namespace arrowhead::trt
