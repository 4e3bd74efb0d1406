// A warpgroup of consumers: its place in every ring, its turns, its stores.
#pragma once

#include "sm90_shared.cuh"
#include "sm90_warp_scores.cuh"

namespace arrowhead::sm90 {

// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int { kTurn = 1, kStore = kTurn + 3 };

/// All lanes hold the same; the shuffle tells the compiler, for loop bounds around wgmma.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

template <class C>
struct Group {
  const Params& params;
  SharedStorage<C>& shared;
  const int index;   // 0 .. kGroups - 1
  const int thread;  // in the group
  RingPosition<C::kStages> k_at;
  RingPosition<C::kStages> v_at;
  RingPosition<2> rows_at{~0u};  // advanced before each use
  RingPosition<kWorkSlots> work_at;
  bool storing = false;  // the rows before these are not given back yet; thread 0 knows

  __device__ Group(const Params& params, SharedStorage<C>& shared, int index)
      : params(params), shared(shared), index(index), thread(threadIdx.x % 128) {}

  /// Waits until the planner has told it.
  __device__ __forceinline__ int item_kind() {
    barrier_wait(shared.work_full[work_at.slot()], work_at.parity());
    return uniform(item().kind);
  }

  /// Read where it is needed, not kept: registers are for scores and outputs.
  __device__ __forceinline__ const WorkItem& item() const { return shared.work[work_at.slot()]; }
  __device__ __forceinline__ const WorkItem& item_before() const {
    return shared.work[work_at.slot_before()];
  }
  __device__ __forceinline__ Segment segment() const {
    return static_cast<Segment>(item().segment);
  }
  __device__ __forceinline__ int first_row() const { return item().token + 64 * index; }

  __device__ __forceinline__ Walk walk() const {
    const Walk& told = shared.ways[work_at.slot()].walk[index];
    return {{{uniform(told.visit.run[0]), uniform(told.visit.run[1])},
             {uniform(told.visit.skip[0]), uniform(told.visit.skip[1])}},
            {uniform(told.open[0]), uniform(told.open[1]), uniform(told.open[2])}};
  }

  /// Buffers are given back by each warp: a warp that is done says nothing about the others.
  __device__ __forceinline__ void release(Barrier& empty) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(empty);
  }

  // The groups take turns at issuing products: while one has the tensor cores, the others compute
  // exponentials. Every group takes one turn per tile of the list, also where it skips the tile.
  __device__ __forceinline__ void take_turn() { named_barrier_sync(kTurn + index, 256); }
  __device__ __forceinline__ void pass_turn() {
    named_barrier_arrive(kTurn + (index + 1) % C::kGroups, 256);
  }

  /// This group's rows of the item: queries first, then outputs.
  __device__ __forceinline__ unsigned char* rows() const {
    return shared.rows[rows_at.slot()][index];
  }
  __device__ __forceinline__ unsigned char* rows_before() const {
    return shared.rows[rows_at.slot_before()][index];
  }
  __device__ __forceinline__ const unsigned char* keys() const { return shared.k[k_at.slot()]; }

  __device__ __forceinline__ std::uint64_t q_descriptor() const {
    return slab_descriptor(rows(), 64 * kSlabRowBytes);
  }
  __device__ __forceinline__ std::uint64_t k_descriptor() const {
    return slab_descriptor(keys(), C::kTileK * kSlabRowBytes);
  }
  __device__ __forceinline__ std::uint64_t v_descriptor() const {
    const unsigned char* v = shared.v[v_at.slot()];
    return slab_descriptor(v, C::kOnes ? static_cast<int>(shared.ones - v)
                                       : C::kTileK * kSlabRowBytes);
  }

  __device__ __forceinline__ void wait_for_queries() {
    rows_at.advance();
    barrier_wait(shared.q_full[rows_at.slot()][index], rows_at.parity());
  }
  __device__ __forceinline__ void wait_for_k() {
    barrier_wait(shared.k_full[k_at.slot()], k_at.parity());
  }
  __device__ __forceinline__ void wait_for_v() {
    barrier_wait(shared.v_full[v_at.slot()], v_at.parity());
  }
  __device__ __forceinline__ void finish_k() {
    release(shared.k_empty[k_at.slot()]);
    k_at.advance();
  }
  __device__ __forceinline__ void finish_v() {
    release(shared.v_empty[v_at.slot()]);
    v_at.advance();
  }
  /// The item before: the planner may write over it.
  __device__ __forceinline__ void finish_item() {
    release(shared.work_empty[work_at.slot_before()]);
  }

  /// A buffer may be given back only once it was filled, or its barrier would count this round's
  /// arrival for the last.
  __device__ __forceinline__ void skip_tile() {
    give_back_rows();
    take_turn();
    pass_turn();
    wait_for_k();
    finish_k();
    wait_for_v();
    finish_v();
  }

  /// The rows of the item before: their store has long read them.
  __device__ __forceinline__ void give_back_rows() {
    if (storing) {
      tma_store_wait_read();
      barrier_arrive(shared.q_empty[rows_at.slot_before()][index]);
      storing = false;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void group_barrier() { named_barrier_sync(kStore + index, 128); }

  /// Registers to shared memory in the swizzle of the tensor map, where the queries were, and from
  /// there to one or two outputs. The store clips rows past the segment's end.
  __device__ __forceinline__ void store(float (&o)[C::kOutputs], const WorkItem& item,
                                        unsigned char* rows) {
    std::uint32_t packed[C::kHeadDim / 4];
    pack_rows<typename C::T>(o, packed);

    group_barrier();  // no warp needs the queries any more
    const int row = thread / 32 * 16 + thread % 16;
    unsigned char* base = rows + row * kSlabRowBytes;
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {  // 16 columns at a time, 8 from each half warp
      const int chunk = (i % 4 * 2 + thread % 32 / 16) ^ (row % 8);
      const std::uint32_t matrices[4] = {packed[4 * i], packed[4 * i + 1], packed[4 * i + 2],
                                         packed[4 * i + 3]};
      store_matrices(base + i / 4 * 64 * kSlabRowBytes + chunk * 16, matrices);
    }
    fence_proxy_async();
    group_barrier();
    if (thread == 0) store_rows(rows, item, item.token + 64 * index);
  }

  __device__ __forceinline__ void store_rows(const void* rows, const WorkItem& item, int token) {
    tma_store(params.out[item.segment], rows, {token, item.head, item.batch});
    if (item.second >= 0) {
      tma_store(params.second[item.segment], rows, {token, item.second, item.batch});
    }
    tma_store_commit();
  }

  /// A cached head's rows go out as they came in; groups 0 and 1 have a box of 64 rows each.
  __device__ __forceinline__ void copy() {
    const int end = min_of(item().token + kCopyRows, params.problem.layout.tokens(segment()));
    const int steps = uniform(ceil_div(end - item().token, kCopyStep));
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_for_k();
      if (thread == 0 && index < 2) {
        fence_proxy_async();
        store_rows(shared.k[k_at.slot()] + index * C::kGroupBytes, item(),
                   first_row() + step * kCopyStep);
        tma_store_wait_read();
      }
      finish_k();
    }
  }
};

}  // namespace arrowhead::sm90
