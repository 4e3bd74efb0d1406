// The planner: one thread that takes tickets, tells producer and consumers what they are, and
// fetches queries. It works an item ahead, so that none of them waits for it.
#pragma once

#include "sm90_shared.cuh"

namespace arrowhead::sm90 {

template <class C>
struct Planner {
  const Params& params;
  SharedStorage<C>& shared;
  RingPosition<2> rows_at;
  RingPosition<kWorkSlots> work_at;
  RingPosition<1> asked_at;

  __device__ Planner(const Params& params, SharedStorage<C>& shared)
      : params(params), shared(shared) {}

  __device__ __forceinline__ void run() {
    int ticket = blockIdx.x;
    while (tell(ticket)) {
      barrier_wait(shared.ticket_wanted, asked_at.parity());
      asked_at.advance();
      ticket = next_ticket(params.problem);
    }
  }

  /// Decode a ticket; past the last one it says stop, and returns false.
  __device__ __forceinline__ bool tell(int ticket) {
    const bool exists = ticket < shared.table.total;
    barrier_wait(shared.work_empty[work_at.slot()], work_at.parity() ^ 1);
    WorkItem& item = shared.work[work_at.slot()];
    item.kind = WorkItem::kStop;
    if (exists) {
      const Work work = params.problem.find(shared.table, ticket);
      const HeadTask task = params.problem.task(work.head);
      const bool copy = task.mode == kCached;
      item = {copy ? WorkItem::kCopy : WorkItem::kAttend, work.head, task.source, task.second,
              work.batch, static_cast<int>(work.segment),
              work.tile * (copy ? kCopyRows : C::kTileQ), task.mode};
      if (!copy) plan(item, shared.ways[work_at.slot()]);
    }
    barrier_arrive(shared.work_full[work_at.slot()]);  // releases the writes above
    if (item.kind == WorkItem::kAttend) load_queries(item);
    work_at.advance();
    return exists;
  }

  __device__ __forceinline__ void plan(const WorkItem& item, Ways<C>& ways) {
    const auto list = [&](int first_row, int rows) {
      return kv_list(params.problem.layout, static_cast<Segment>(item.segment),
                     {first_row, first_row + rows}, item.mode, C::kTileK);
    };
    ways.list = list(item.token, C::kTileQ);
#pragma unroll 1
    for (int group = 0; group < C::kGroups; ++group) {
      ways.walk[group] = walk_of(ways.list, list(item.token + 64 * group, 64));
    }
  }

  /// Tokens past the segment's end arrive as zeros, and are counted.
  __device__ __forceinline__ void load_queries(const WorkItem& item) {
    const int slot = rows_at.slot();
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      Barrier& full = shared.q_full[slot][group];
      barrier_wait(shared.q_empty[slot][group], rows_at.parity() ^ 1);
      barrier_arrive_expect(full, C::kGroupBytes);
      tma_load(shared.rows[slot][group], params.q[item.segment],
               {item.token + 64 * group, item.source, item.batch}, full);
    }
    rows_at.advance();
  }
};

}  // namespace arrowhead::sm90
