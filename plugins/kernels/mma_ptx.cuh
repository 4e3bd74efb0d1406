// PTX of sm_80 and later: asynchronous copies, matrix loads, mma.sync. The fallback kernel is made
// of it, and the Hopper kernel what one warp does alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace arrowhead::mma {

__device__ __forceinline__ std::uint32_t smem_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Copies 16 bytes, or writes 16 zero bytes where there is nothing to copy.
__device__ __forceinline__ void copy_async(void* smem, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Loads four 8x8 matrices; each lane gives the address of one 16-byte row.
__device__ __forceinline__ void load_matrices(std::uint32_t* m, const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(smem_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&m)[4],
                                                         const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(smem_address(smem_row))
               : "memory");
}

template <class T>
struct Multiply;

#define ARROWHEAD_MMA(T, type)                                                              \
  template <>                                                                               \
  struct Multiply<T> {                                                                      \
    /* c (16x8) += a (16x16) b (16x8) */                                                    \
    static __device__ __forceinline__ void add(float* c, const std::uint32_t* a,            \
                                               std::uint32_t b0, std::uint32_t b1) {        \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "           \
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
    }                                                                                       \
  }

ARROWHEAD_MMA(__half, "f16");
ARROWHEAD_MMA(__nv_bfloat16, "bf16");

#undef ARROWHEAD_MMA

}  // namespace arrowhead::mma
