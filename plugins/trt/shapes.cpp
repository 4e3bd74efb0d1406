#include "shapes.h"

#include <algorithm>
#include <string>

#include "refused.h"

namespace arrowhead::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

enum Axis { kBatch, kTokens, kHeads, kHeadDim };
constexpr int kUnknown = -1;

const char* input_name(std::size_t index) {
  constexpr const char* kNames[] = {"input q", "input k", "input v", "input cache"};
  return kNames[index];
}

std::string text_of(const Dims& dims) {
  std::string text = "[";
  for (int i = 0; i < dims.nbDims; ++i) {
    text += (i ? ", " : "") + (dims.d[i] < 0 ? "?" : std::to_string(dims.d[i]));
  }
  return text + "]";
}

std::string name_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "FLOAT";
    case DataType::kHALF: return "HALF";
    case DataType::kBF16: return "BF16";
    default: return "type " + std::to_string(static_cast<int>(type));
  }
}

/// Two dimensions agree if either is unknown.
bool agree(std::int64_t a, std::int64_t b) { return a < 0 || b < 0 || a == b; }

void check_q(const Attributes& attributes, const Dims& q) {
  const auto require = [&](bool holds, const std::string& expected, const char* fix) {
    if (!holds) throw Refused("input q [B, S, heads, D]", text_of(q), expected, fix);
  };
  constexpr std::int64_t kMost = kMostTokens;
  const std::int64_t least_tokens = std::max(attributes.text_tokens, 1);
  require(q.nbDims == 4, "4 dimensions", "connect what the exported graph connects");
  require(agree(q.d[kBatch], std::clamp<std::int64_t>(q.d[kBatch], 1, kMost)), "B of 1 to 2^28",
          "set the batch in the optimization profile");
  require(agree(q.d[kTokens], std::clamp(q.d[kTokens], least_tokens, kMost)),
          "S of " + std::to_string(least_tokens) + " (the text tokens) to 2^28",
          "export the graph for this picture size");
  require(agree(q.d[kHeads], attributes.computed_heads()),
          std::to_string(attributes.computed_heads()) + " heads, one per entry of half_windows",
          "export the graph again from its plan");
  require(agree(q.d[kHeadDim], 64) || agree(q.d[kHeadDim], 128), "D of 64 or 128",
          "build without the plugin library: the function bodies in the graph take every D");
}

/// One segment of a contiguous [B, S, heads, D]; absent where it has no tokens.
TensorView segment(const AttentionParams& params, const void* data, std::int64_t heads,
                   int first_token, int tokens) {
  constexpr std::int64_t kElementBytes = 2;
  if (tokens == 0) return {};
  const std::int64_t token = heads * params.head_dim;
  const std::int64_t all_tokens = std::int64_t{params.image_tokens} + params.text_tokens;
  // The kernels write to `out` only; params.h has one struct for both directions.
  char* base = static_cast<char*>(const_cast<void*>(data));
  return {base + first_token * token * kElementBytes, all_tokens * token, token, params.head_dim};
}

}  // namespace

void check_counts(const Attributes& attributes, int inputs, int outputs) {
  const int expected = attributes.has_cache() ? 4 : 3;
  if (inputs == expected && outputs == 1) return;
  throw Refused("tensors", std::to_string(inputs) + " in, " + std::to_string(outputs) + " out",
                std::to_string(expected) + " in, 1 out",
                "connect q, k, v, and for CachedHead the cache");
}

void check_types(const DataType* types, int count) {
  for (int i = 0; i < count; ++i) {
    if (types[0] != DataType::kHALF && types[0] != DataType::kBF16) {
      throw Refused("input q", name_of(types[0]), "HALF or BF16",
                    "export the bundle in fp16 or bf16, or build without the plugin library: the "
                    "function bodies in the graph take every type");
    }
    if (types[i] != types[0]) {
      throw Refused("tensor " + std::to_string(i), name_of(types[i]),
                    name_of(types[0]) + ", as input q", "cast it to q's type in the graph");
    }
  }
}

void check_shapes(const Attributes& attributes, const std::vector<Dims>& shapes) {
  const std::size_t inputs = attributes.has_cache() ? 4 : 3;
  const Dims& q = shapes[0];
  check_q(attributes, q);
  for (std::size_t i = 1; i < shapes.size(); ++i) {
    Dims expected = q;
    expected.d[kHeads] = attributes.computed_heads();
    if (i == 3 && attributes.has_cache()) expected.d[kHeads] = kUnknown;
    if (i == inputs) expected.d[kHeads] = attributes.output_heads();
    const Dims& got = shapes[i];
    if (got.nbDims != 4 || !std::equal(got.d, got.d + 4, expected.d, agree)) {
      throw Refused(i == inputs ? "output" : input_name(i), text_of(got), text_of(expected),
                    "connect tensors of one batch, token count and head size");
    }
  }
  const std::int64_t cached = attributes.has_cache() ? shapes[3].d[kHeads] : 0;
  const std::int64_t last = *std::max_element(attributes.source.begin(), attributes.source.end());
  if (cached == 0 && attributes.has_cache()) {
    throw Refused("input cache", text_of(shapes[3]), "1 head or more",
                  "use ArrowAttention where nothing is cached");
  }
  if (cached > 0 && last >= attributes.computed_heads() + cached) {
    throw Refused("field source", "head " + std::to_string(last),
                  "less than " + std::to_string(attributes.computed_heads() + cached) +
                      ", the computed heads and those of the cache",
                  "export the graph again from its plan");
  }
}

AttentionParams make_params(const Attributes& attributes, const nvinfer1::PluginTensorDesc* descs,
                            const void* const* inputs, void* output, void* workspace) {
  const Dims& q = descs[0].dims;
  AttentionParams params{};
  params.struct_size = sizeof params;
  params.element = descs[0].type == DataType::kHALF ? Element::kFloat16 : Element::kBFloat16;
  params.kernel = Kernel::kAuto;
  params.batch = static_cast<int>(q.d[kBatch]);
  params.heads = attributes.output_heads();
  params.head_dim = static_cast<int>(q.d[kHeadDim]);
  params.text_tokens = attributes.text_tokens;
  params.image_tokens = static_cast<int>(q.d[kTokens]) - attributes.text_tokens;
  params.block = attributes.block;
  params.qkv_heads = attributes.computed_heads();
  params.cache_heads = attributes.has_cache() ? static_cast<int>(descs[3].dims.d[kHeads]) : 0;
  params.scale = attributes.scale;
  params.workspace = workspace;

  const auto views = [&](const void* data, int heads) -> SegmentViews {
    const int text_begin = attributes.text_first ? 0 : params.image_tokens;
    const int image_begin = attributes.text_first ? params.text_tokens : 0;
    return {segment(params, data, heads, text_begin, params.text_tokens),
            segment(params, data, heads, image_begin, params.image_tokens)};
  };
  params.q = views(inputs[0], params.qkv_heads);
  params.k = views(inputs[1], params.qkv_heads);
  params.v = views(inputs[2], params.qkv_heads);
  if (attributes.has_cache()) params.cache = views(inputs[3], params.cache_heads);
  params.out = views(output, params.heads);
  for (int head = 0; head < params.heads; ++head) {
    const int source = attributes.source[head];
    const bool computed = source < params.qkv_heads;
    params.tasks[head] = {computed ? attributes.half_windows[source] : kCached,
                          computed ? source : source - params.qkv_heads, -1};
  }
  return params;
}

}  // namespace arrowhead::trt
