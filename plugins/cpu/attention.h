// ArrowAttention and CachedHead on the CPU, in fp32: the counterpart of kernels/launch.h.
//
// A launch is cut into tickets, longest first (kernels/work_list.h). Whoever has threads calls
// `run` for every ticket, in any order and on any thread; the result does not depend on it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/work_list.h"
#include "tile.h"

namespace arrowhead::cpu {

/// Tensors are contiguous: q, k, v [B, S, qkv_heads, D], cache [B, S, cache_heads, D] and
/// out [B, S, heads, D]. Everything is trusted.
struct AttentionParams {
  TokenLayout layout;
  bool text_first;
  int batch;
  int heads;        // output heads, at most kMaxHeads
  int qkv_heads;
  int cache_heads;  // 0 without a cache
  int head_dim;
  float scale;
  const float* q;
  const float* k;
  const float* v;
  const float* cache;
  float* out;
  HeadTask tasks[kMaxHeads];  // of the output heads; `second` is not used
};

class Attention {
 public:
  explicit Attention(const AttentionParams& params);

  int tickets() const { return table_.total; }

  /// Floats of memory that one thread needs.
  std::size_t scratch_floats() const;

  /// Compute one ticket, 0 <= ticket < tickets().
  void run(int ticket, float* scratch) const;

 private:
  void attend(const Work& work, float* scratch) const;
  /// What some image rows of an arrow head see beside the text.
  Band band(Range rows, int half_window) const;
  void copy(const Work& work) const;
  int mode(int head) const;
  /// Place of a segment's first token in the sequence.
  int offset(Segment segment) const;

  AttentionParams params_;
  WorkShape shape_;
  RunTable table_;
};

}  // namespace arrowhead::cpu
