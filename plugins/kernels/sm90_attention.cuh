// ArrowAttention on Hopper: a warpgroup of one producer and one planner, two or three consumers,
// persistent CTAs.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90_consumer.cuh"
#include "sm90_planner.cuh"
#include "sm90_producer.cuh"

namespace arrowhead::sm90 {

template <class C>
__device__ __forceinline__ void init_barriers(SharedStorage<C>& shared) {
  const int consumer_warps = 4 * C::kGroups;
  for (int group = 0; group < C::kGroups; ++group) {
    for (int slot = 0; slot < 2; ++slot) {
      barrier_init(shared.q_full[slot][group], 1);
      barrier_init(shared.q_empty[slot][group], 1);
    }
  }
  for (int stage = 0; stage < C::kStages; ++stage) {
    barrier_init(shared.k_full[stage], 1);
    barrier_init(shared.k_empty[stage], consumer_warps);
    barrier_init(shared.v_full[stage], 1);
    barrier_init(shared.v_empty[stage], consumer_warps);
  }
  for (int slot = 0; slot < kWorkSlots; ++slot) {
    barrier_init(shared.work_full[slot], 1);
    barrier_init(shared.work_empty[slot], consumer_warps + 1);  // and the producer
  }
  barrier_init(shared.ticket_wanted, 1);
  fence_barrier_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<C>*>(dynamic_shared);
  if (smem_address(dynamic_shared) % 1024 != 0) __trap();  // swizzle patterns would not line up

  if (threadIdx.x == 0) init_barriers(shared);
  if (C::kOnes) {
    auto* ones = reinterpret_cast<typename C::T*>(shared.ones);
    for (int i = threadIdx.x; i < 16 * kSlabColumns; i += C::kThreads) ones[i] = typename C::T(1.f);
    fence_proxy_async();  // the tensor cores read them
  }
  build_run_table(shared.table, shared.costs, params.problem);  // ends with a CTA barrier

  // The warpgroup index is the same in all lanes; the shuffle tells the compiler so.
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    release_registers_to<C::kTuning.producer_registers>();
    if (threadIdx.x == 0) Producer<C>(params, shared).run();
    if (threadIdx.x == 32) Planner<C>(params, shared).run();
  } else {
    claim_registers_to<C::kTuning.consumer_registers>();
    Consumer<C>(params, shared, warpgroup - 1).run();
  }
}

/// `multiprocessors` CTAs, one on each: what they compute is decided by tickets.
template <class C>
cudaError_t launch(const Params& params, int multiprocessors, cudaStream_t stream) {
  constexpr int bytes = shared_bytes<C>();
  const cudaError_t error = cudaFuncSetAttribute(
      attention_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  attention_kernel<C><<<multiprocessors, C::kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace arrowhead::sm90
