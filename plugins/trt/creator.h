// How TensorRT makes the plugins: from a graph's attributes, and from an engine's bytes.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "attributes.h"

namespace arrowhead::trt {

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit AttentionCreator(Operator op);

  /// Null where the fields do not fit; the log says which and why.
  nvinfer1::IPluginV3* createPlugin(const char* layer,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  Operator op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace arrowhead::trt
