// The producer: one thread that takes tickets, tells the consumers, and keeps the copy engine busy.
#pragma once

#include "sm90_shared.cuh"

namespace arrowhead::sm90 {

template <class C>
struct Producer {
  const Params& params;
  SharedStorage<C>& shared;
  RingPosition<C::kStages> k_at;
  RingPosition<C::kStages> v_at;
  RingPosition<1> q_at;
  RingPosition<kWorkSlots> work_at{~0u};  // advanced before each use

  __device__ Producer(const Params& params, SharedStorage<C>& shared)
      : params(params), shared(shared) {}

  __device__ __forceinline__ void run() {
    int ticket = blockIdx.x;
    while (ticket < shared.table.total) {
      tell(ticket);
      ticket = item().kind == WorkItem::kCopy ? load_copy() : load_attention();
    }
    tell(ticket);
  }

  /// Decode a ticket for the consumers, and for the loads below; past the last one it says stop.
  __device__ __forceinline__ void tell(int ticket) {
    work_at.advance();
    barrier_wait(shared.work_empty[work_at.slot()], work_at.parity() ^ 1);
    WorkItem& item = shared.work[work_at.slot()];
    item.kind = WorkItem::kStop;
    if (ticket < shared.table.total) {
      const Work work = params.problem.find(shared.table, ticket);
      const HeadTask task = params.problem.task(work.head);
      const bool copy = task.mode == kCached;
      item = {copy ? WorkItem::kCopy : WorkItem::kAttend, work.head, task.source, task.second,
              work.batch, static_cast<int>(work.segment),
              work.tile * (copy ? kCopyRows : C::kTileQ), task.mode};
    }
    barrier_arrive(shared.work_full[work_at.slot()]);  // releases the writes above
  }

  /// Read where it is needed, not kept: the producer has few registers.
  __device__ __forceinline__ const WorkItem& item() const { return shared.work[work_at.slot()]; }

  /// K runs one tile ahead of V, as the consumers use them. Returns the next ticket, taken before
  /// the last load so that the counter's latency hides behind the wait for a free buffer.
  __device__ __forceinline__ int load_attention() {
    const KvList list =
        kv_list(params.problem.layout, static_cast<Segment>(item().segment),
                {item().token, item().token + C::kTileQ}, item().mode, C::kTileK);
    const int tiles = list.size();
    load_k(list, 0);
    load_q();
#pragma unroll 1
    for (int i = 1; i < tiles; ++i) {
      load_k(list, i);
      load_v(list, i - 1);
    }
    const int ticket = next_ticket(params.problem);
    load_v(list, tiles - 1);
    return ticket;
  }

  __device__ __forceinline__ void load_q() {
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      barrier_wait(shared.q_empty[group], q_at.parity() ^ 1);
      load(shared.q[group], params.q[item().segment], item().token + 64 * group,
           shared.q_full[group], C::kGroupBytes);
    }
    q_at.advance();
  }

  __device__ __forceinline__ void load_k(const KvList& list, int i) {
    barrier_wait(shared.k_empty[k_at.slot()], k_at.parity() ^ 1);
    load(shared.k[k_at.slot()], params.k[static_cast<int>(list.segment(i))],
         list.tile(i) * C::kTileK, shared.k_full[k_at.slot()], C::kKvBytes);
    k_at.advance();
  }

  __device__ __forceinline__ void load_v(const KvList& list, int i) {
    barrier_wait(shared.v_empty[v_at.slot()], v_at.parity() ^ 1);
    load(shared.v[v_at.slot()], params.v[static_cast<int>(list.segment(i))],
         list.tile(i) * C::kTileK, shared.v_full[v_at.slot()], C::kKvBytes);
    v_at.advance();
  }

  /// One box of the item's head. Tokens past the segment's end arrive as zeros, and are counted.
  __device__ __forceinline__ void load(void* smem, const CUtensorMap& map, int token,
                                       Barrier& full, int bytes) {
    barrier_arrive_expect(full, bytes);
    tma_load(smem, map, {token, item().source, item().batch}, full);
  }

  /// A chunk of a cached head goes through the K buffers, two boxes of 64 rows in each.
  __device__ __forceinline__ int load_copy() {
    const int ticket = next_ticket(params.problem);
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
    return ticket;
  }
};

}  // namespace arrowhead::sm90
