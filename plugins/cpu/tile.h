// A tile: the queries of one head that one core computes at a time, and the kernel for it.
//
// It is the only part of the CPU implementation that is compiled once for each instruction set:
// strip_kernel.h is its code, strip.cpp its instances.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/tiles.h"

namespace arrowhead::cpu {

constexpr int kStripRows = 32;  // queries with one band of keys: narrow, so that few are masked
constexpr int kTileRows = 128;  // queries that use keys common to them while those are in L2
constexpr int kTileStrips = kTileRows / kStripRows;
constexpr int kChunk = 64;  // keys between two updates of the running maximum: scores fit in L1

/// The image keys of a strip in an arrow head, as places in the sequence.
struct Band {
  Range keys;  // seen by some row
  Range open;  // seen by all rows; of the others row r sees first[r] .. last[r] - 1
  std::int32_t first[kStripRows];
  std::int32_t last[kStripRows];
};

/// Pointers are to the first row of a head's [tokens, D] part of [B, S, heads, D].
struct Tile {
  const float* q;             // the tile's own first row
  const float* k;             // the sequence's first row, as v
  const float* v;
  float* out;                 // the tile's own first row
  std::int64_t token_stride;  // elements from token to token of q, k and v
  std::int64_t out_stride;    // the same of out
  int rows;                   // 1 .. kTileRows
  int head_dim;
  float scale_log2;  // softmax scale times log2(e): the kernel works with exp2
  Range shared;      // keys that all rows see: the text, or everything
  Band bands[kTileStrips];  // and what each strip sees beside them
};

/// The kernel for one instruction set.
struct TileKernel {
  const char* name;
  void (*attend)(const Tile& tile, float* scratch);
};

/// Floats of scratch memory that `attend` needs.
constexpr std::size_t scratch_floats(int head_dim) {
  return std::size_t{2 * kTileRows} * static_cast<std::size_t>(head_dim) + kChunk * kStripRows;
}

/// The fastest kernel that this processor runs. The environment variable ARROWHEAD_CPU_KERNEL
/// names another of them; one that this processor does not run is not taken.
const TileKernel& tile_kernel();

}  // namespace arrowhead::cpu
