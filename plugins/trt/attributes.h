// The attributes of the two operators: read from TensorRT's fields, checked, written back.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace arrowhead::trt {

constexpr std::int32_t kMostTokens = 1 << 28;  // the kernels count in 32 bits

enum class Operator { kArrowAttention, kCachedHead };

const char* name_of(Operator op);

/// As the ONNX operators have them (plans/ops.py). Fields are FLOAT32 and INT32, of these names.
struct Attributes {
  Operator op;
  float scale;
  std::int32_t text_tokens;
  std::int32_t text_first;
  std::int32_t block;
  std::vector<std::int32_t> half_windows;  // of the computed heads, in blocks; -1 is full
  // For each output head its head in concat(computed, cache). ArrowAttention has no such field:
  // there it is the computed heads in order.
  std::vector<std::int32_t> source;

  bool has_cache() const { return op == Operator::kCachedHead; }
  int computed_heads() const { return static_cast<int>(half_windows.size()); }
  int output_heads() const { return static_cast<int>(source.size()); }

  /// Names and values, {"scale":0.125,...}: equal for equal attributes, in every locale.
  std::string json() const;
};

/// The fields of an operator: names and types, and values if `attributes` has them, to which the
/// fields then point.
std::vector<nvinfer1::PluginField> fields_of(Operator op, const Attributes* attributes = nullptr);

/// Read the attributes of an operator from fields, of the builder or of an engine.
/// Throws Refused, naming the field, where one is missing, unknown, given twice, or of a wrong
/// type, length or value.
Attributes attributes_from(Operator op, const nvinfer1::PluginFieldCollection& fields);

}  // namespace arrowhead::trt
