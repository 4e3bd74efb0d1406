#include "call.h"

#include <algorithm>
#include <string>

namespace arrowhead::ort {
namespace {

constexpr std::int64_t kMaxInt = 1 << 28;  // tile coordinates stay far inside 32 bits

[[noreturn]] void refuse(const std::string& what) {
  throw Ort::Exception("Arrowhead: " + what, ORT_INVALID_ARGUMENT);
}

void require(bool condition, const std::string& what) {
  if (!condition) refuse(what);
}

std::string text(const std::vector<std::int64_t>& dims) {
  std::string out = "[";
  for (const std::int64_t dim : dims) {
    out += (out.size() > 1 ? ", " : "") + std::to_string(dim);
  }
  return out + "]";
}

/// Windows and blocks beyond any picture mean the same as the largest.
int clamped(std::int64_t value) { return static_cast<int>(std::min(value, kMaxInt)); }

}  // namespace

Attributes::Attributes(const OrtKernelInfo* info, bool cached) {
  const Ort::ConstKernelInfo node{info};
  scale = node.GetAttribute<float>("scale");
  const auto text = node.GetAttribute<std::int64_t>("text_tokens");
  const auto block_tokens = node.GetAttribute<std::int64_t>("block");
  text_first = node.GetAttribute<std::int64_t>("text_first") != 0;
  require(0 <= text && text <= kMaxInt && block_tokens >= 1,
          "got text_tokens " + std::to_string(text) + ", block " + std::to_string(block_tokens) +
              "; expected text_tokens >= 0 and block >= 1");
  text_tokens = static_cast<int>(text);
  block = clamped(block_tokens);
  for (const std::int64_t half_window : node.GetAttributes<std::int64_t>("half_windows")) {
    require(half_window >= kFull, "got half window " + std::to_string(half_window) +
                                      "; expected -1 (full) or a number of blocks");
    half_windows.push_back(clamped(half_window));
  }
  if (cached) {
    for (const std::int64_t head : node.GetAttributes<std::int64_t>("source")) {
      require(0 <= head && head < kMaxInt,
              "got source " + std::to_string(head) + "; expected a head");
      source.push_back(static_cast<int>(head));
    }
  } else {
    for (std::size_t head = 0; head < half_windows.size(); ++head) {
      source.push_back(static_cast<int>(head));
    }
  }
  require(1 <= source.size() && source.size() <= kMaxHeads,
          "got " + std::to_string(source.size()) + " output heads; expected 1 to " +
              std::to_string(kMaxHeads));
}

Call::Call(const Attributes& attributes, const Ort::KernelContext& context) {
  const auto dims_of = [&](std::size_t index) {
    return context.GetInput(index).GetTensorTypeAndShapeInfo().GetShape();
  };
  const std::vector<std::int64_t> q = dims_of(0);
  require(q.size() == 4 && *std::min_element(q.begin(), q.end()) >= 0 &&
              *std::max_element(q.begin(), q.end()) <= kMaxInt && q[3] >= 1,
          "got q of shape " + text(q) + "; expected [B, S, heads, D]");
  for (std::size_t index : {1, 2}) {
    require(dims_of(index) == q, "got q, k, v of shapes " + text(q) + ", " + text(dims_of(1)) +
                                     ", " + text(dims_of(2)) + "; expected one shape");
  }
  require(q[2] == static_cast<std::int64_t>(attributes.half_windows.size()),
          "got q of shape " + text(q) + " with " + std::to_string(attributes.half_windows.size()) +
              " half windows; expected one a head");
  require(attributes.text_tokens <= q[1], "got " + std::to_string(q[1]) + " tokens; expected " +
                                              std::to_string(attributes.text_tokens) +
                                              " of text among them");
  batch = static_cast<int>(q[0]);
  qkv_heads = static_cast<int>(q[2]);
  head_dim = static_cast<int>(q[3]);
  layout = {static_cast<int>(q[1]) - attributes.text_tokens, attributes.text_tokens,
            attributes.block};
  cache_heads = 0;
  if (context.GetInputCount() == 4) {
    const std::vector<std::int64_t> cache = dims_of(3);
    require(cache.size() == 4 && cache[0] == q[0] && cache[1] == q[1] && cache[3] == q[3] &&
                cache[2] <= kMaxInt,
            "got q of shape " + text(q) + ", cache of shape " + text(cache) +
                "; expected the same but for the heads");
    cache_heads = static_cast<int>(cache[2]);
  }
  heads = static_cast<int>(attributes.source.size());
  for (int head = 0; head < heads; ++head) {
    const int from = attributes.source[head];
    require(from < qkv_heads + cache_heads,
            "got source " + std::to_string(from) + "; expected 0 to " +
                std::to_string(qkv_heads + cache_heads - 1));
    tasks[head] = from < qkv_heads ? HeadTask{attributes.half_windows[from], from, -1}
                                   : HeadTask{kCached, from - qkv_heads, -1};
  }
}

}  // namespace arrowhead::ort
