// What a launch is told: plain structs, fit for C and ctypes. Strides are in elements.
#pragma once

#include <cstdint>

#include "work_list.h"

namespace arrowhead {

enum class Element : std::int32_t { kFloat16 = 0, kBFloat16 = 1 };

/// [B, tokens, heads, D] of one segment; D is contiguous. Null where the segment is absent. Base
/// and strides are multiples of 16 bytes: that is what the copy engines load.
struct TensorView {
  void* data;
  std::int64_t batch_stride;
  std::int64_t token_stride;
  std::int64_t head_stride;
};

/// Text and image of one tensor. In a concatenated tensor they are two views of it, in either
/// order; unconcatenated ones need no copy.
struct SegmentViews {
  TensorView text;
  TensorView image;
};

/// The same, indexed by Segment, as kernels take them.
inline void copy_views(TensorView (&views)[2], const SegmentViews& segments) {
  views[static_cast<int>(Segment::kText)] = segments.text;
  views[static_cast<int>(Segment::kImage)] = segments.image;
}

/// Which kernel runs; kAuto asks the device, and copies where all heads are cached. The others are
/// for tests and measurements.
enum class Kernel : std::int32_t { kAuto = 0, kSm90 = 1, kSm90Wide = 2, kMmaSync = 3 };

struct AttentionParams {
  std::int32_t struct_size;  // sizeof(AttentionParams): a caller of another version is refused
  Element element;
  Kernel kernel;
  std::int32_t batch;
  std::int32_t heads;  // output heads, at most kMaxHeads
  std::int32_t head_dim;
  std::int32_t image_tokens;
  std::int32_t text_tokens;
  std::int32_t block;
  std::int32_t qkv_heads;     // heads in q, k, v
  std::int32_t cache_heads;   // heads in cache, 0 without one
  std::int32_t second_heads;  // heads in second, 0 without one
  float scale;
  SegmentViews q;
  SegmentViews k;
  SegmentViews v;
  SegmentViews out;  // text null: text rows are computed by nobody
  SegmentViews second;
  SegmentViews cache;
  // The tasks of the output heads: by value, or in device memory, so that one captured launch
  // serves every step. Device tasks are trusted; a null pointer means the array.
  const HeadTask* device_tasks;
  HeadTask tasks[kMaxHeads];
  void* workspace;  // kWorkspaceBytes of device memory, any content, of one launch at a time
};

constexpr int kWorkspaceBytes = 16;

/// A contiguous [B, S, heads, D], in and out; not the same memory. D is 8 times a power of two, at
/// most 256; at most 2^33 elements. Both are at multiples of 16 bytes.
struct RowParams {
  Element element;
  std::int32_t batch;
  std::int32_t tokens;
  std::int32_t heads;
  std::int32_t head_dim;
  const void* x;
  void* out;
};

}  // namespace arrowhead
