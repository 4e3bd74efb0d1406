#include "creator.h"

#include "attention_plugin.h"
#include "refused.h"

namespace arrowhead::trt {

AttentionCreator::AttentionCreator(Operator op)
    : op_(op),
      fields_(fields_of(op)),
      collection_{static_cast<std::int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* AttentionCreator::createPlugin(const char* layer,
                                                    const nvinfer1::PluginFieldCollection* fields,
                                                    nvinfer1::TensorRTPhase) noexcept {
  const char* name = layer ? layer : "";
  return guarded(name_of(op_), name, static_cast<nvinfer1::IPluginV3*>(nullptr),
                 [&]() -> nvinfer1::IPluginV3* {
                   const nvinfer1::PluginFieldCollection none{};
                   return new AttentionPlugin(name, attributes_from(op_, fields ? *fields : none));
                 });
}

const nvinfer1::PluginFieldCollection* AttentionCreator::getFieldNames() noexcept {
  return &collection_;
}

const char* AttentionCreator::getPluginName() const noexcept { return name_of(op_); }
const char* AttentionCreator::getPluginVersion() const noexcept { return kVersion; }
const char* AttentionCreator::getPluginNamespace() const noexcept { return kNamespace; }

}  // namespace arrowhead::trt
