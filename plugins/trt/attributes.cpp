#include "attributes.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/params.h"
#include "refused.h"

namespace arrowhead::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr char kBuildFix[] = "export the graph again with the `arrowhead export` of this release";

std::string name_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16: return "FLOAT16";
    case PluginFieldType::kFLOAT32: return "FLOAT32";
    case PluginFieldType::kFLOAT64: return "FLOAT64";
    case PluginFieldType::kINT32: return "INT32";
    case PluginFieldType::kINT64: return "INT64";
    case PluginFieldType::kCHAR: return "CHAR";
    default: return "type " + std::to_string(static_cast<int>(type));
  }
}

std::string values(int count, PluginFieldType type) {
  return std::to_string(count) + (count == 1 ? " value of " : " values of ") + name_of(type);
}

std::string text_of(float value) {
  char text[32];  // to_chars: the shortest digits that give the value back, whatever the locale
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

std::string text_of(const std::vector<std::int32_t>& list) {
  std::string text = "[";
  for (const std::int32_t value : list) {
    text += (text.size() > 1 ? "," : "") + std::to_string(value);
  }
  return text + "]";
}

std::string names(const std::vector<PluginField>& fields) {
  std::string text;
  for (const PluginField& field : fields) {
    text += (text.empty() ? "" : ", ") + std::string(field.name);
  }
  return text;
}

bool is_list(const PluginField& declared) {
  return std::strcmp(declared.name, "half_windows") == 0 ||
         std::strcmp(declared.name, "source") == 0;
}

/// The given field of a declared name, checked but for its values.
const PluginField& find(const PluginField& declared, const nvinfer1::PluginFieldCollection& given) {
  const PluginField* found = nullptr;
  for (int i = 0; i < given.nbFields; ++i) {
    if (std::strcmp(given.fields[i].name, declared.name) != 0) continue;
    if (found) {
      throw Refused(std::string("field ") + declared.name, "it twice", "it once",
                    "pass each field once");
    }
    found = &given.fields[i];
  }
  const std::string subject = std::string("field ") + declared.name;
  const int longest = is_list(declared) ? kMaxHeads : 1;
  const std::string expected = (longest > 1 ? "1 to " : "") + values(longest, declared.type);
  if (found == nullptr) throw Refused(subject, "no such field", expected, kBuildFix);
  if (found->type != declared.type || found->length < 1 || found->length > longest ||
      found->data == nullptr) {
    const char* no_data = found->data == nullptr ? ", without data" : "";
    throw Refused(subject, values(found->length, found->type) + no_data, expected, kBuildFix);
  }
  return *found;
}

template <class Value>
std::vector<Value> copy(const PluginField& field) {
  std::vector<Value> values(field.length);  // memcpy: an engine's bytes may lie at any address
  std::memcpy(values.data(), field.data, field.length * sizeof(Value));
  return values;
}

void refuse_unknown(const std::vector<PluginField>& declared,
                    const nvinfer1::PluginFieldCollection& given) {
  for (int i = 0; i < given.nbFields; ++i) {
    const char* name = given.fields[i].name;
    if (name == nullptr) {
      throw Refused("fields", "a field without a name", "names", "name every field");
    }
    const auto is_it = [&](const PluginField& field) { return !std::strcmp(field.name, name); };
    if (std::none_of(declared.begin(), declared.end(), is_it)) {
      throw Refused(std::string("field ") + name, "a field of this name", "only " + names(declared),
                    "leave it out");
    }
  }
}

void check_values(const Attributes& attributes) {
  const auto require = [](bool holds, const char* name, const std::string& got,
                          const char* expected) {
    if (!holds) throw Refused(std::string("field ") + name, got, expected, kBuildFix);
  };
  const auto least = [](const std::vector<std::int32_t>& list) {
    return *std::min_element(list.begin(), list.end());
  };
  // Zero or less would turn the running maximum of the softmax into a minimum.
  require(std::isfinite(attributes.scale) && attributes.scale > 0.f, "scale",
          text_of(attributes.scale), "a finite number above 0");
  require(0 <= attributes.text_tokens && attributes.text_tokens <= kMostTokens, "text_tokens",
          std::to_string(attributes.text_tokens), "0 to 2^28");
  require(attributes.text_first == 0 || attributes.text_first == 1, "text_first",
          std::to_string(attributes.text_first), "0 or 1");
  require(1 <= attributes.block && attributes.block <= kMostTokens, "block",
          std::to_string(attributes.block), "1 to 2^28 tokens");
  require(least(attributes.half_windows) >= kFull, "half_windows", text_of(attributes.half_windows),
          "half windows in blocks, -1 for full heads");
  require(least(attributes.source) >= 0, "source", text_of(attributes.source),
          "indices of heads, 0 or more");
}

}  // namespace

const char* name_of(Operator op) {
  return op == Operator::kCachedHead ? "CachedHead" : "ArrowAttention";
}

std::string Attributes::json() const {
  std::string text =
      "{\"scale\":" + text_of(scale) + ",\"text_tokens\":" + std::to_string(text_tokens) +
      ",\"text_first\":" + std::to_string(text_first) + ",\"block\":" + std::to_string(block) +
      ",\"half_windows\":" + text_of(half_windows);
  if (has_cache()) text += ",\"source\":" + text_of(source);
  return text + "}";
}

std::vector<PluginField> fields_of(Operator op, const Attributes* attributes) {
  constexpr auto kFloat = PluginFieldType::kFLOAT32;
  constexpr auto kInt = PluginFieldType::kINT32;
  const auto one = [&](const char* name, auto Attributes::* value, PluginFieldType type) {
    return PluginField(name, attributes ? &(attributes->*value) : nullptr, type, 1);
  };
  const auto list = [&](const char* name, std::vector<std::int32_t> Attributes::* value) {
    if (!attributes) return PluginField(name, nullptr, kInt, 1);
    const auto& values = attributes->*value;
    return PluginField(name, values.data(), kInt, static_cast<std::int32_t>(values.size()));
  };
  std::vector<PluginField> fields{
      one("scale", &Attributes::scale, kFloat), one("text_tokens", &Attributes::text_tokens, kInt),
      one("text_first", &Attributes::text_first, kInt), one("block", &Attributes::block, kInt),
      list("half_windows", &Attributes::half_windows)};
  if (op == Operator::kCachedHead) fields.push_back(list("source", &Attributes::source));
  return fields;
}

Attributes attributes_from(Operator op, const nvinfer1::PluginFieldCollection& given) {
  const std::vector<PluginField> declared = fields_of(op);
  refuse_unknown(declared, given);
  const auto integers = [&](int i) { return copy<std::int32_t>(find(declared[i], given)); };
  Attributes attributes{};
  attributes.op = op;
  attributes.scale = copy<float>(find(declared[0], given)).front();
  attributes.text_tokens = integers(1).front();
  attributes.text_first = integers(2).front();
  attributes.block = integers(3).front();
  attributes.half_windows = integers(4);
  if (op == Operator::kCachedHead) {
    attributes.source = integers(5);
  } else {
    attributes.source.resize(attributes.half_windows.size());
    std::iota(attributes.source.begin(), attributes.source.end(), 0);
  }
  check_values(attributes);
  return attributes;
}

}  // namespace arrowhead::trt
