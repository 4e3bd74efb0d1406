// The order in which a launch works through its tiles, longest first, without a list in memory.
//
// Every head contributes at most two *runs* of tiles of equal cost. Sorted by cost, with prefix
// sums, they turn a ticket (0, 1, 2, ...) into a tile by binary search. Longest first keeps the
// last wave short; tiles of one head stay adjacent, so CTAs that run together share its keys in
// L2. Copies of cached heads come last: they fill the gaps.
#pragma once

#include "tiles.h"

namespace arrowhead {

/// What one output head does. `source` is its head in q, k, v, or in the cache if mode is kCached;
/// a cached head with source -1 already lies in the output and costs nothing. `second` is its
/// head in the second output, or -1.
struct HeadTask {
  std::int32_t mode;
  std::int32_t source;
  std::int32_t second;
};

/// Query tiles and copy chunks per (batch row, head).
struct WorkShape {
  int batch;
  int text_tiles;
  int image_tiles;
  int text_chunks;
  int image_chunks;
};

ARROWHEAD_HD constexpr WorkShape work_shape(TokenLayout layout, int batch, bool text_queries,
                                            int tile_q, int chunk) {
  return {batch, text_queries ? ceil_div(layout.text_tokens, tile_q) : 0,
          ceil_div(layout.image_tokens, tile_q),
          text_queries ? ceil_div(layout.text_tokens, chunk) : 0,
          ceil_div(layout.image_tokens, chunk)};
}

/// One ticket's work: a query tile, or a chunk of a cached head, counted inside its segment.
struct Work {
  int head;
  int batch;
  Segment segment;
  int tile;
};

constexpr int kMaxHeads = 128;

// Run 2h is head h's main part (all its tiles, an arrow head's image tiles, or its copies); run
// 2h + 1 holds the text rows of an arrow head, which attend everything.
constexpr int kMaxRuns = 2 * kMaxHeads;

/// Needed only while the table is made.
struct RunCosts {
  int key[kMaxRuns];      // larger goes first
  int tickets[kMaxRuns];  // tiles in the run

  /// First step, for every run. `mode` is an effective mode.
  ARROWHEAD_HD void describe(int index, int mode, int source, const WorkShape& shape) {
    const bool text_part = index % 2 == 1;
    int per_batch = 0;
    int cost = 0;
    if (mode == kCached) {
      per_batch = text_part || source < 0 ? 0 : shape.text_chunks + shape.image_chunks;
    } else if (mode == kFull) {
      per_batch = text_part ? 0 : shape.text_tiles + shape.image_tiles;
      cost = INT32_MAX;
    } else {
      per_batch = text_part ? shape.text_tiles : shape.image_tiles;
      cost = text_part ? INT32_MAX - 1 : min_of(mode + 1, INT32_MAX - 2);
    }
    tickets[index] = shape.batch * per_batch;
    key[index] = tickets[index] ? cost : -1;  // empty runs sort behind every ticket
  }
};

/// The runs in the order of work.
struct RunTable {
  int first[kMaxRuns];  // the run's first ticket
  int run[kMaxRuns];
  int runs;
  int total;

  /// Second step, for every run, after all are described: its place in the order.
  ARROWHEAD_HD void place(const RunCosts& costs, int index) {
    int rank = 0;
    int before = 0;
    for (int other = 0; other < runs; ++other) {
      const bool tie = costs.key[other] == costs.key[index];
      const bool earlier = costs.key[other] > costs.key[index] || (tie && other < index);
      rank += earlier;
      before += earlier ? costs.tickets[other] : 0;
    }
    first[rank] = before;
    run[rank] = index;
    if (rank == runs - 1) total = before + costs.tickets[index];
  }

  /// Decode 0 <= ticket < total. `mode_of(head)` is a head's effective mode.
  template <class ModeOf>
  ARROWHEAD_HD Work find(int ticket, const WorkShape& shape, ModeOf&& mode_of) const {
    int low = 0;
    int high = runs;  // first[low] <= ticket < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= ticket) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int head = run[low] / 2;
    const int mode = mode_of(head);
    const bool arrow = mode >= 0;
    const bool text_part = run[low] % 2 == 1;
    int image = mode == kCached ? shape.image_chunks : shape.image_tiles;
    int text = mode == kCached ? shape.text_chunks : shape.text_tiles;
    if (arrow && text_part) image = 0;
    if (arrow && !text_part) text = 0;
    const int local = ticket - first[low];
    const int batch = local / (image + text);
    const int tile = local - batch * (image + text);
    if (tile < image) return {head, batch, Segment::kImage, tile};
    return {head, batch, Segment::kText, tile - image};
  }
};

}  // namespace arrowhead
