// Hopper's warpgroup matrix multiply on 64 rows: S = Q K' with Q in shared memory or in registers,
// O += P V with P in registers. Operand tiles are slabs of 64 columns (128 bytes) in the 128-byte
// swizzle.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sm90_config.h"
#include "sm90_ptx.cuh"

namespace arrowhead::sm90 {

// Accumulator registers as asm operands, and their numbers in the instruction.
#define ARROWHEAD_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ARROWHEAD_F16(d, i) \
  ARROWHEAD_F4(d, i), ARROWHEAD_F4(d, i + 4), ARROWHEAD_F4(d, i + 8), ARROWHEAD_F4(d, i + 12)
#define ARROWHEAD_F32(d) ARROWHEAD_F16(d, 0), ARROWHEAD_F16(d, 16)
#define ARROWHEAD_F64(d) ARROWHEAD_F32(d), ARROWHEAD_F16(d, 32), ARROWHEAD_F16(d, 48)
#define ARROWHEAD_N32                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ARROWHEAD_N36 ARROWHEAD_N32 ", %32, %33, %34, %35"
#define ARROWHEAD_F36(d) ARROWHEAD_F32(d), ARROWHEAD_F4(d, 32)
#define ARROWHEAD_N64                                                                      \
  ARROWHEAD_N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// A and B in shared memory, both with D as the contiguous axis.
#define ARROWHEAD_WGMMA_SS(shape, type, numbers, a, b, keep, operands, desc_a, desc_b, first) \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep ", 0;\n"                        \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" numbers       \
               "}, " a ", " b ", keep, 1, 1, 0, 0;\n}\n"                                      \
               : operands                                                                     \
               : "l"(desc_a), "l"(desc_b), "r"(first ? 0 : 1))

// A in registers; B as above (K as it lies in memory).
#define ARROWHEAD_WGMMA_RS_K(shape, type, numbers, a, b, keep, operands, q, desc_b, first)   \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep ", 0;\n"                       \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" numbers      \
               "}, {" a "}, " b ", keep, 1, 1, 0;\n}\n"                                      \
               : operands                                                                    \
               : "r"((q)[0]), "r"((q)[1]), "r"((q)[2]), "r"((q)[3]), "l"(desc_b),            \
                 "r"(first ? 0 : 1))

// A in registers; B in shared memory with its N axis contiguous (V as it lies in memory).
#define ARROWHEAD_WGMMA_RS_N(shape, type, numbers, a, b, operands, p, desc_b)              \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" numbers    \
               "}, {" a "}, " b ", 1, 1, 1, 1;\n"                                          \
               : operands                                                                  \
               : "r"((p)[0]), "r"((p)[1]), "r"((p)[2]), "r"((p)[3]), "l"(desc_b))

template <class T>
struct Wgmma;

#define ARROWHEAD_WGMMA_TYPE(T, type)                                                         \
  template <>                                                                                 \
  struct Wgmma<T> {                                                                           \
    static __device__ __forceinline__ void q_k(float (&s)[64], std::uint64_t q,               \
                                               std::uint64_t k, bool first) {                 \
      ARROWHEAD_WGMMA_SS("m64n128k16", type, ARROWHEAD_N64, "%64", "%65", "%66",              \
                         ARROWHEAD_F64(s), q, k, first);                                      \
    }                                                                                         \
    static __device__ __forceinline__ void q_k(float (&s)[64], const std::uint32_t* q,        \
                                               std::uint64_t k, bool first) {                 \
      ARROWHEAD_WGMMA_RS_K("m64n128k16", type, ARROWHEAD_N64, "%64, %65, %66, %67", "%68",    \
                           "%69", ARROWHEAD_F64(s), q, k, first);                             \
    }                                                                                         \
    static __device__ __forceinline__ void p_v(float (&o)[32], const std::uint32_t* p,        \
                                               std::uint64_t v) {                             \
      ARROWHEAD_WGMMA_RS_N("m64n64k16", type, ARROWHEAD_N32, "%32, %33, %34, %35", "%36",     \
                         ARROWHEAD_F32(o), p, v);                                             \
    }                                                                                         \
    static __device__ __forceinline__ void p_v(float (&o)[36], const std::uint32_t* p,        \
                                               std::uint64_t v) {                             \
      ARROWHEAD_WGMMA_RS_N("m64n72k16", type, ARROWHEAD_N36, "%36, %37, %38, %39", "%40",     \
                         ARROWHEAD_F36(o), p, v);                                             \
    }                                                                                         \
    static __device__ __forceinline__ void p_v(float (&o)[64], const std::uint32_t* p,        \
                                               std::uint64_t v) {                             \
      ARROWHEAD_WGMMA_RS_N("m64n128k16", type, ARROWHEAD_N64, "%64, %65, %66, %67", "%68",    \
                         ARROWHEAD_F64(o), p, v);                                             \
    }                                                                                         \
  }

ARROWHEAD_WGMMA_TYPE(__half, "f16");
ARROWHEAD_WGMMA_TYPE(__nv_bfloat16, "bf16");

#undef ARROWHEAD_WGMMA_TYPE
#undef ARROWHEAD_WGMMA_RS_N
#undef ARROWHEAD_WGMMA_RS_K
#undef ARROWHEAD_WGMMA_SS
#undef ARROWHEAD_N64
#undef ARROWHEAD_N36
#undef ARROWHEAD_F36
#undef ARROWHEAD_N32
#undef ARROWHEAD_F64
#undef ARROWHEAD_F32
#undef ARROWHEAD_F16
#undef ARROWHEAD_F4

/// Describe a slab for wgmma: 8 rows of 128 bytes make one swizzle pattern of 1024 bytes, and
/// `slab_bytes` leads from 64 columns to the next 64 (read only where columns are the N axis).
/// Fields as in the PTX manual's matrix descriptor, in units of 16 bytes; bit 62 is the 128-byte
/// swizzle.
__device__ __forceinline__ std::uint64_t slab_descriptor(const void* smem, int slab_bytes) {
  const std::uint64_t address = (smem_address(smem) & 0x3FFFF) >> 4;
  const std::uint64_t leading = static_cast<std::uint64_t>(slab_bytes >> 4) << 16;
  const std::uint64_t stride = static_cast<std::uint64_t>(8 * kSlabRowBytes >> 4) << 32;
  return address | leading | stride | (std::uint64_t{1} << 62);
}

/// Moves a descriptor's address on; the tile lies below 256 KB, so the field cannot overflow.
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving the computation or use of an operand across a wgmma_begin or
/// wgmma_wait, which say nothing of registers.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(std::uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

/// A branch that is never taken: sums of weights are not negative. ptxas moves a wgmma wait to the
/// top of its basic block, ahead of the exponentials that the products are to overlap with; a
/// branch that needs their sum keeps the wait behind them. The vote keeps the warp converged.
__device__ __forceinline__ void end_block_after(float sum_of_weights) {
  if (__any_sync(0xFFFFFFFFu, sum_of_weights < 0.f)) __trap();
}

/// S = Q K' for 64 rows and all keys of a tile. One step consumes 16 of the D columns.
template <class T, int kHeadDim, int kScores>
__device__ __forceinline__ void multiply_q_k(float (&s)[kScores], std::uint64_t q,
                                             std::uint64_t k, int q_slab_bytes,
                                             int k_slab_bytes) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int slab = step / 4;
    const int inside = step % 4 * 32;
    Wgmma<T>::q_k(s, advance(q, slab * q_slab_bytes + inside),
                  advance(k, slab * k_slab_bytes + inside), step == 0);
  }
}

/// The same with Q in registers: four a step, as a matrix of 16 rows and columns is loaded.
template <class T, int kScores, int kQueries>
__device__ __forceinline__ void multiply_q_k(float (&s)[kScores],
                                             const std::uint32_t (&q)[kQueries], std::uint64_t k,
                                             int k_slab_bytes) {
#pragma unroll
  for (int step = 0; step < kQueries / 4; ++step) {
    const std::uint64_t at = advance(k, step / 4 * k_slab_bytes + step % 4 * 32);
    Wgmma<T>::q_k(s, q + 4 * step, at, step == 0);
  }
}

/// O += P V. One step consumes 16 keys: two swizzle patterns of V, four registers of P. Where O has
/// four more registers they take the sums of P's rows: V's next slab is then 16 rows of ones, the
/// same in every step, so the descriptor's leading offset shrinks as its address grows.
template <class T, int kBegin, int kEnd, int kOutputs, int kWeights>
__device__ __forceinline__ void multiply_p_v(float (&o)[kOutputs],
                                             const std::uint32_t (&p)[kWeights],
                                             std::uint64_t v) {
#pragma unroll
  for (int step = kBegin; step < kEnd; ++step) {
    std::uint64_t at = advance(v, step * 16 * kSlabRowBytes);
    if (kOutputs % 32 != 0) at -= static_cast<std::uint64_t>(step * kSlabRowBytes) << 16;
    Wgmma<T>::p_v(o, p + 4 * step, at);
  }
}

}  // namespace arrowhead::sm90
