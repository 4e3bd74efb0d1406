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

/// 2^x on the multiply-add units, for x <= 0: of use where exponentials, not products, set the pace.
/// x = n + f with f in -1/2 .. 1/2; the cubic's relative error is 7.5e-5, under half a unit of fp16.
/// Below -126, and for minus infinity, a number next to zero comes out.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves n in the low bits
  x = fmaxf(x, -126.f);
  const float rounded = __fadd_rn(x, kRound);
  const float f = __fsub_rn(x, __fsub_rn(rounded, kRound));
  float y = fmaf(f, 0.0551716574f, 0.2426111251f);
  y = fmaf(y, f, 0.6932609677f);
  y = fmaf(y, f, 0.9999280572f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(rounded) << 23));
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

struct OnlineSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.f, 0.f};  // of this thread's columns only, until finish()

  /// Turn scores into weights; return what earlier sums and outputs are to be multiplied by.
  /// `kPolynomial` eighths of the exponentials are computed by multiply-adds.
  template <int kPolynomial, int kScores>
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
      const float before = row_max[row];
      row_max[row] = fmaxf(before, quad_max(fmaxf(top[0], top[1])));
      // A row that has seen no key yet keeps weights of zero instead of exp2(inf - inf).
      const float shift = row_max[row] == -INFINITY ? 0.f : __fmul_rn(row_max[row], scale_log2);
      // Rounded like `shift`, not fused: where the maximum stays, this is one and nothing drifts.
      rescale[row] = exp2_fast(__fmul_rn(before, scale_log2) - shift);
      float sum[2] = {row_sum[row] * rescale[row], 0.f};
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 4 * j + 2 * row; i < 4 * j + 2 * row + 2; ++i) {
          const float x = fmaf(s[i], scale_log2, -shift);
          s[i] = j * kPolynomial % 8 < kPolynomial ? exp2_polynomial(x) : exp2_fast(x);
          sum[j % 2] += s[i];
        }
      }
      row_sum[row] = sum[0] + sum[1];
    }
    return {rescale[0], rescale[1]};
  }

  /// What the outputs are to be multiplied by at the end.
  __device__ __forceinline__ float2 finish() const {
    return {reciprocal_fast(quad_sum(row_sum[0])), reciprocal_fast(quad_sum(row_sum[1]))};
  }
};

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
template <class T, int kCount>
__device__ __forceinline__ void pack_rows(const float (&s)[kCount],
                                          std::uint32_t (&p)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
}

}  // namespace arrowhead
