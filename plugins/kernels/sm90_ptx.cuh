// The PTX of Hopper that CUDA C++ has no names for: barriers, bulk tensor copies, registers.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace arrowhead::sm90 {

__device__ __forceinline__ std::uint32_t smem_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

using Barrier = std::uint64_t;  // an mbarrier in shared memory

__device__ __forceinline__ void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)),
               "r"(arrivals));
}

/// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&barrier))
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   smem_address(&barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(Barrier& barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(smem_address(&barrier)),
      "r"(parity)
      : "memory");
}

/// Where a role stands in a ring of shared-memory buffers: which slot, and the parity its barriers
/// have in this round. One counter: registers are scarce on both sides.
template <int kSlots>
struct RingPosition {
  static_assert((kSlots & (kSlots - 1)) == 0, "the counter wraps at a multiple of the ring");
  std::uint32_t count = 0;

  __device__ __forceinline__ std::uint32_t slot() const { return count % kSlots; }
  __device__ __forceinline__ std::uint32_t slot_before() const { return (count - 1) % kSlots; }
  __device__ __forceinline__ std::uint32_t parity() const { return count / kSlots % 2; }
  __device__ __forceinline__ void advance() { ++count; }
};

// Tensor maps have five axes: 64 columns, tokens, D / 64, heads, B. One box holds D / 64 slabs of
// 64 columns (128 bytes, the width of the swizzle), each slab with all its tokens.
struct TileOrigin {
  int token;
  int head;
  int batch;
};

__device__ __forceinline__ void tma_load(void* smem, const CUtensorMap& map, TileOrigin at,
                                         Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %3, %5, %6}], [%2];" ::"r"(smem_address(smem)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(smem_address(&barrier)), "r"(0),
      "r"(at.token), "r"(at.head), "r"(at.batch)
      : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap& map, const void* smem,
                                          TileOrigin at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %2, %4, %5}], [%1];" ::"l"(reinterpret_cast<std::uint64_t>(&map)),
      "r"(smem_address(smem)), "r"(0), "r"(at.token), "r"(at.head), "r"(at.batch)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until this thread's stores have read shared memory, so that it may be written again.
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/// Orders this thread's ordinary shared-memory accesses before the copy engine's next ones.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void release_registers_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void claim_registers_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Stores four 8x8 matrices of 16-bit elements in the layout of a tensor-core accumulator.
__device__ __forceinline__ void store_matrices(void* smem_row, const std::uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   smem_address(smem_row)),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

}  // namespace arrowhead::sm90
