// One warp's 16 query rows: their registers, and their scores without wgmma.
#pragma once

#include "mma_ptx.cuh"
#include "sm90_config.h"

namespace arrowhead::sm90 {

/// Where columns 8 column .. 8 column + 7 of a row lie in a tile of so many rows.
__device__ __forceinline__ const unsigned char* chunk(const unsigned char* tile, int rows, int row,
                                                      int column) {
  return tile + (column / 8 * rows + row) * kSlabRowBytes + (column % 8 ^ row % 8) * 16;
}

/// Columns 16 step .. 16 step + 15 of the warp's rows, in four registers as products take them.
/// `q` is the group's tile of 64 rows, `thread` counts in the group.
__device__ __forceinline__ void load_query_columns(std::uint32_t* registers,
                                                   const unsigned char* q, int step, int thread) {
  const int row = thread / 32 * 16 + thread % 16;
  mma::load_matrices(registers, chunk(q, 64, row, 2 * step + thread % 32 / 16));
}

/// S = Q K' for the warp's rows alone, where a wgmma would need the other warps of the group.
template <class T, int kHeadDim, int kScores>
__device__ __forceinline__ void compute_warp_scores(float (&s)[kScores], const unsigned char* q,
                                                    const unsigned char* k, int thread) {
  constexpr int kKeys = 2 * kScores;
  const int lane = thread % 32;
#pragma unroll
  for (int i = 0; i < kScores; ++i) s[i] = 0.f;
#pragma unroll 1
  for (int step = 0; step < kHeadDim / 16; ++step) {
    std::uint32_t a[4];
    load_query_columns(a, q, step, thread);
#pragma unroll
    for (int keys = 0; keys < kKeys; keys += 16) {
      std::uint32_t b[4];  // two groups of eight keys, two halves of 16 columns each
      const int key = keys + lane / 16 * 8 + lane % 8;
      mma::load_matrices(b, chunk(k, kKeys, key, 2 * step + lane / 8 % 2));
      mma::Multiply<T>::add(s + keys / 2, a, b[0], b[1]);
      mma::Multiply<T>::add(s + keys / 2 + 4, a, b[2], b[3]);
    }
  }
}

}  // namespace arrowhead::sm90
