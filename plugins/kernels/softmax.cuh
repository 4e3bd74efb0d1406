// Online softmax on the accumulators of one warp's 16 rows (mma and wgmma lay them out alike):
// a thread holds two rows, lane / 4 and that plus 8, and of each eight columns two. s[4 j + 0, 1]
// are the first row's, s[4 j + 2, 3] the second's, in columns 8 j + 2 (lane % 4) + 0, 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "tiles.h"

namespace arrowhead {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The four lanes of a quad share their rows.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

/// Log2 of how far weights may exceed one before earlier sums and outputs are rescaled, as in
/// FlashAttention-4: they stay far inside fp16, and its relative precision does not change.
constexpr float kSlack = 8.f;

struct OnlineSoftmax {
  float shift[2] = {-INFINITY, -INFINITY};  // of the scaled scores: about the rows' maxima
  float row_sum[2] = {0.f, 0.f};            // of this thread's columns only, until finish()

  /// Turn scores into weights; return what earlier sums and outputs are to be multiplied by.
  /// kSum: add the weights up here; else that is somebody else's work.
  template <bool kSum, int kScores>
  __device__ __forceinline__ float2 step(float (&s)[kScores], float scale_log2) {
    static_assert(kScores % 8 == 0, "whole pairs of 8-column groups");
    float rescale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // Two chains each, so that additions and maxima do not wait for one another.
      float top[2] = {s[2 * row], s[2 * row + 4]};
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
        top[j % 2] = fmaxf(top[j % 2], fmaxf(s[4 * j + 2 * row], s[4 * j + 2 * row + 1]));
      }
      const float largest = __fmul_rn(quad_max(fmaxf(top[0], top[1])), scale_log2);
      const float before = shift[row];
      shift[row] = largest > before + kSlack ? largest : before;
      // A row that has seen no key yet keeps weights of zero instead of exp2(inf - inf).
      const float safe = shift[row] == -INFINITY ? 0.f : shift[row];
      rescale[row] = exp2_fast(before - safe);
      if (kSum) row_sum[row] *= rescale[row];
      float sum[2] = {row_sum[row], 0.f};
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * row; i < 4 * j + 2 * row + 2; ++i) {
          s[i] = exp2_fast(fmaf(s[i], scale_log2, -safe));
          if (kSum) sum[j % 2] += s[i];
        }
      }
      if (kSum) row_sum[row] = sum[0] + sum[1];
    }
    return {rescale[0], rescale[1]};
  }

  /// The same with the shifts there are, and no look at the maxima: false, with the scores lost, if
  /// some weight would exceed what fp16 holds. Their sums tell; infinities and NaN fail too.
  template <bool kSum, int kScores>
  __device__ __forceinline__ bool try_step(float (&s)[kScores], float scale_log2) {
    float sums[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum[2] = {0.f, 0.f};
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * row; i < 4 * j + 2 * row + 2; ++i) {
          s[i] = exp2_fast(fmaf(s[i], scale_log2, -shift[row]));
          sum[j % 2] += s[i];
        }
      }
      sums[row] = sum[0] + sum[1];
    }
    constexpr float kMost = 32768.f;
    if (!__all_sync(0xFFFFFFFFu, sums[0] <= kMost && sums[1] <= kMost)) return false;
    if (kSum) {
      row_sum[0] += sums[0];
      row_sum[1] += sums[1];
    }
    return true;
  }

  /// What the outputs are to be multiplied by at the end.
  __device__ __forceinline__ float2 finish() const {
    return {reciprocal_fast(quad_sum(row_sum[0])), reciprocal_fast(quad_sum(row_sum[1]))};
  }
};

/// Whether some row of this warp has to be rescaled: seldom after the first tiles.
__device__ __forceinline__ bool any_rescales(float2 factor) {
  return __any_sync(0xFFFFFFFFu, factor.x != 1.f || factor.y != 1.f);
}

/// Multiply each row of an accumulator by its own factor.
template <int kCount>
__device__ __forceinline__ void scale_rows(float (&o)[kCount], float2 factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= i % 4 < 2 ? factor.x : factor.y;
}

/// Hide the columns outside each row's keys. `column` is the key of this thread's first score.
template <int kScores>
__device__ __forceinline__ void mask_scores(float (&s)[kScores], int column, Range first_row,
                                            Range second_row) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const Range keys = i % 4 < 2 ? first_row : second_row;
    const int key = column + i / 4 * 8 + i % 2;
    // One comparison for both ends; an empty range hides everything.
    const auto offset = static_cast<unsigned>(key - keys.begin);
    const bool visible = offset < static_cast<unsigned>(keys.size());
    s[i] = visible ? s[i] : -INFINITY;
  }
}

template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}
template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}

/// Round an accumulator to 16 bits: as it stands, the left operand of the next product.
template <class T, int kCount, int kPairs>
__device__ __forceinline__ void pack_rows(const float (&s)[kCount], std::uint32_t (&p)[kPairs]) {
  static_assert(2 * kPairs <= kCount, "no more pairs than numbers");
#pragma unroll
  for (int i = 0; i < kPairs; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
}

}  // namespace arrowhead
