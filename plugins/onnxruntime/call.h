// What one node was given: its attributes, checked once, and the sizes of one call, checked
// against them. Both providers start from here.
#pragma once

// The API table is taken from whoever loads the library; nothing is linked.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <vector>

#include "../kernels/work_list.h"

namespace arrowhead::ort {

/// The API of ONNX Runtime 1.21. Every newer one still offers it, so one library serves them all.
constexpr int kApiVersion = 21;

/// The attributes of ArrowAttention, or of CachedHead, which has a source beside them.
struct Attributes {
  float scale;
  int text_tokens;
  bool text_first;
  int block;
  std::vector<int> half_windows;  // of the computed heads
  std::vector<int> source;        // of the output heads: concat(computed, cache)[source]

  /// Read them from a node. Throws Ort::Exception where one is missing or has no meaning.
  Attributes(const OrtKernelInfo* info, bool cached);
};

/// q, k, v: [B, S, qkv_heads, D]; cache: [B, S, cache_heads, D]; output [B, S, heads, D].
struct Call {
  TokenLayout layout;
  int batch;
  int heads;
  int qkv_heads;
  int cache_heads;  // 0 without a cache
  int head_dim;
  HeadTask tasks[kMaxHeads];  // of the output heads

  /// Check the inputs of one call. Throws Ort::Exception where they do not fit the attributes.
  Call(const Attributes& attributes, const Ort::KernelContext& context);

  int seq_len() const { return layout.image_tokens + layout.text_tokens; }
  std::vector<std::int64_t> shape(int heads) const {
    return {batch, seq_len(), heads, head_dim};
  }
};

}  // namespace arrowhead::ort
