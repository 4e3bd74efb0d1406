// The producer: one thread that keeps the copy engine busy with keys, values and cached rows.
#pragma once

#include "sm90_shared.cuh"

namespace arrowhead::sm90 {

template <class C>
struct Producer {
  const Params& params;
  SharedStorage<C>& shared;
  RingPosition<C::kStages> k_at;
  RingPosition<C::kStages> v_at;
  RingPosition<kWorkSlots> work_at;

  __device__ Producer(const Params& params, SharedStorage<C>& shared)
      : params(params), shared(shared) {}

  __device__ __forceinline__ void run() {
    while (true) {
      barrier_wait(shared.work_full[work_at.slot()], work_at.parity());
      if (item().kind == WorkItem::kStop) break;
      if (item().kind == WorkItem::kCopy) {
        load_copy();
      } else {
        load_attention();
      }
      barrier_arrive(shared.work_empty[work_at.slot()]);
      work_at.advance();
    }
  }

  /// Read where it is needed, not kept: the producer has few registers.
  __device__ __forceinline__ const WorkItem& item() const { return shared.work[work_at.slot()]; }

  /// K runs one tile ahead of V, as the consumers use them.
  __device__ __forceinline__ void load_attention() {
    const KvList list = shared.ways[work_at.slot()].list;
    const int tiles = list.size();
    const int asks_at = max_of(tiles - kTilesAhead, 0);
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      if (i == asks_at) barrier_arrive(shared.ticket_wanted);
      load(shared.k, shared.k_full, shared.k_empty, k_at, params.k, list, i);
      if (i > 0) load(shared.v, shared.v_full, shared.v_empty, v_at, params.v, list, i - 1);
    }
    load(shared.v, shared.v_full, shared.v_empty, v_at, params.v, list, tiles - 1);
  }

  /// The list's tile i. Tokens past the segment's end arrive as zeros, and are counted.
  __device__ __forceinline__ void load(unsigned char (&tiles)[C::kStages][C::kKvBytes],
                                       Barrier (&full)[C::kStages], Barrier (&empty)[C::kStages],
                                       RingPosition<C::kStages>& at, const CUtensorMap (&maps)[2],
                                       const KvList& list, int i) {
    barrier_wait(empty[at.slot()], at.parity() ^ 1);
    barrier_arrive_expect(full[at.slot()], C::kKvBytes);
    tma_load(tiles[at.slot()], maps[static_cast<int>(list.segment(i))],
             {list.tile(i) * C::kTileK, item().source, item().batch}, full[at.slot()]);
    at.advance();
  }

  /// A chunk of a cached head goes through the K buffers, two boxes of 64 rows in each.
  __device__ __forceinline__ void load_copy() {
    barrier_arrive(shared.ticket_wanted);
    const Segment segment = static_cast<Segment>(item().segment);
    const CUtensorMap& map = params.cache[item().segment];
    const int end = min_of(item().token + kCopyRows, params.problem.layout.tokens(segment));
#pragma unroll 1
    for (int token = item().token; token < end; token += kCopyStep) {
      barrier_wait(shared.k_empty[k_at.slot()], k_at.parity() ^ 1);
      barrier_arrive_expect(shared.k_full[k_at.slot()], 2 * C::kGroupBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tma_load(shared.k[k_at.slot()] + half * C::kGroupBytes, map,
                 {token + 64 * half, item().source, item().batch}, shared.k_full[k_at.slot()]);
      }
      k_at.advance();
    }
  }
};

}  // namespace arrowhead::sm90
