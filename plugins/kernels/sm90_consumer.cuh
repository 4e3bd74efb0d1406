// The consumers' arithmetic: a group's 64 query rows against the tiles of the list.
#pragma once

#include "softmax.cuh"
#include "sm90_group.cuh"

namespace arrowhead::sm90 {

template <class C>
struct Consumer {
  using T = typename C::T;
  using Scores = float[C::kScores];                 // and weights, before they are packed
  using Weights = std::uint32_t[C::kScores / 2];
  using Outputs = float[C::kOutputs];

  Group<C> group;
  std::uint32_t q[C::kQueries];  // the queries, where they are kept in registers

  __device__ Consumer(const Params& params, SharedStorage<C>& shared, int index)
      : group(params, shared, index) {}

  __device__ __forceinline__ void run() {
    if (group.index == C::kGroups - 1) group.pass_turn();  // the first turn is group 0's
    while (true) {
      const int kind = group.item_kind();
      if (kind == WorkItem::kStop) break;
      if (kind == WorkItem::kAttend) {
        attend();
      } else {
        group.copy();
        group.release(group.shared.work_empty[group.work_at.slot()]);
        group.work_at.advance();
      }
    }
    if (group.index == 0) group.take_turn();       // the last turn passed finds somebody
    if (group.thread == 0) tma_store_wait_read();  // shared memory outlives its stores
  }

  /// One item after the other, until another kind comes. Where one ends with a tile and the next
  /// begins with one, the last product of the one and the first of the other are issued together,
  /// as within an item: the tensor cores have work while a group is at its maxima and its store.
  __device__ __forceinline__ void attend() {
    Scores s;
    Weights p;
    Outputs o;
    OnlineSoftmax softmax;

    Walk walk = group.walk();
    bool begun = false;  // p holds the weights of the item's first tile
    load_queries(walk);
    clear(o);
    while (true) {
      const bool pending = compute(walk, begun, s, p, o, softmax);
      const bool empty = walk.size() == 0;
      group.give_back_rows();

      group.work_at.advance();
      const bool more = group.item_kind() == WorkItem::kAttend;
      if (more) walk = group.walk();
      begun = more && pending && walk.visit.run[0] > 0;
      if (begun) {
        load_queries(walk);
        scale_rows(o, join(walk, s, p, o, softmax));
      } else {
        if (pending) finish_outputs(o, p);
        scale_rows(o, finish(o, softmax));
      }
      if (!empty) group.store(o, group.item_before(), begun ? group.rows_before() : group.rows());
      group.storing = group.thread == 0;
      group.finish_item();
      if (!more) return;
      if (!begun) {
        softmax = {};
        load_queries(walk);
      }
      clear(o);
    }
  }

  static __device__ __forceinline__ void clear(Outputs& o) {
#pragma unroll
    for (int i = 0; i < C::kOutputs; ++i) o[i] = 0.f;
  }

  /// What the outputs are to be multiplied by.
  static __device__ __forceinline__ float2 finish(const Outputs& o, const OnlineSoftmax& softmax) {
    if constexpr (!C::kOnes) return softmax.finish();
    constexpr int kSum = C::kHeadDim / 2;
    return {reciprocal_fast(o[kSum % C::kOutputs]), reciprocal_fast(o[(kSum + 2) % C::kOutputs])};
  }

  /// Shared memory keeps them too, for compute_warp_scores. Without tiles nothing is read that
  /// somebody would have to wait for.
  __device__ __forceinline__ void load_queries(const Walk& walk) {
    group.wait_for_queries();
    if constexpr (C::kQueriesInRegisters) {
      if (walk.size() == 0) return;
#pragma unroll
      for (int step = 0; step < C::kHeadDim / 16; ++step) {
        load_query_columns(q + 4 * step, group.rows(), step, group.thread);
      }
    }
  }

  /// An item's tiles, but for the last one's product with V if that is `pending` at the end.
  __device__ __forceinline__ bool compute(const Walk& walk, bool begun, Scores& s, Weights& p,
                                          Outputs& o, OnlineSoftmax& softmax) {
    int position = 0;
    bool pending = begun;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const int end = position + (part ? walk.visit.run[1] : walk.visit.run[0]);
      const int skips = part ? walk.visit.skip[1] : walk.visit.skip[0];
      if (end > position) {
        if (!pending) begin_run(position, walk, s, p, o, softmax);
        compute_run(position + 1, end, walk, s, p, o, softmax);
        pending = skips + (part ? 0 : walk.visit.run[1] + walk.visit.skip[1]) == 0;
        if (!pending) finish_outputs(o, p);
      }
      position = end;
#pragma unroll 1
      for (int skip = skips; skip > 0; --skip) group.skip_tile();
    }
    return pending;
  }

  __device__ __forceinline__ void begin_run(int position, const Walk& walk, Scores& s, Weights& p,
                                            Outputs& o, OnlineSoftmax& softmax) {
    group.wait_for_k();
    group.take_turn();
    issue_scores(s);
    group.pass_turn();
    wgmma_wait<0>();
    pin(s);
    group.finish_k();
    rescale(o, weigh(position, walk, s, softmax));
    pack_rows<T>(s, p);
  }

  /// Tiles position .. end - 1, the weights of the one before being in p. The scores of a tile are
  /// computed together with the previous tile's share of the output, so that the tensor cores have
  /// work while this group is at its exponentials.
  __device__ __forceinline__ void compute_run(int position, int end, const Walk& walk, Scores& s,
                                              Weights& p, Outputs& o, OnlineSoftmax& softmax) {
#pragma unroll 1
    for (; position < end; ++position) {
      issue_both(s, o, p);
      group.give_back_rows();
      wgmma_wait<1>();
      pin(s);
      const float2 factor = weigh_lazily(position, walk, s, softmax);
      group.finish_k();
      end_block_after(C::kOnes ? some_weight(s) : softmax.row_sum[0] + softmax.row_sum[1]);
      wgmma_wait<0>();
      pin(o);
      group.finish_v();
      rescale(o, factor);
      pack_rows<T>(s, p);
    }
  }

  /// The last outputs of an item and the first weights of the next, whose queries are there.
  /// Returns what the outputs are to be multiplied by; `softmax` is then the next item's.
  __device__ __forceinline__ float2 join(const Walk& next, Scores& s, Weights& p, Outputs& o,
                                         OnlineSoftmax& softmax) {
    issue_both(s, o, p);
    float2 factor;
    if constexpr (!C::kOnes) factor = softmax.finish();
    softmax = {};
    wgmma_wait<1>();
    pin(s);
    weigh(0, next, s, softmax);
    group.finish_k();
    end_block_after(C::kOnes ? some_weight(s) : softmax.row_sum[0] + softmax.row_sum[1]);
    wgmma_wait<0>();
    pin(o);
    group.finish_v();
    pack_rows<T>(s, p);
    if constexpr (C::kOnes) factor = finish(o, softmax);
    return factor;
  }

  __device__ __forceinline__ void finish_outputs(Outputs& o, Weights& p) {
    issue_outputs<false>(o, p);
    wgmma_wait<0>();
    pin(o);
    group.finish_v();
  }

  /// The scores of a tile, and the share in the output of the weights before.
  __device__ __forceinline__ void issue_both(Scores& s, Outputs& o, Weights& p) {
    group.wait_for_k();
    group.take_turn();
    issue_scores(s);
    issue_outputs<true>(o, p);
  }

  __device__ __forceinline__ void issue_scores(Scores& s) {
    constexpr int kSlabBytes = C::kTileK * kSlabRowBytes;
    pin(s);
    if constexpr (C::kQueriesInRegisters) pin(q);
    wgmma_begin();
    if constexpr (C::kQueriesInRegisters) {
      multiply_q_k<T>(s, q, group.k_descriptor(), kSlabBytes);
    } else {
      multiply_q_k<T, C::kHeadDim>(s, group.q_descriptor(), group.k_descriptor(),
                                   64 * kSlabRowBytes, kSlabBytes);
    }
    wgmma_commit();
  }

  /// `kPassTurn` shortly before the end: the next group's first products take a while to arrive.
  template <bool kPassTurn>
  __device__ __forceinline__ void issue_outputs(Outputs& o, Weights& p) {
    constexpr int kSteps = C::kTileK / 16;
    constexpr int kLast = 2;
    group.wait_for_v();
    pin(p);
    pin(o);
    wgmma_begin();
    multiply_p_v<T, 0, kSteps - kLast>(o, p, group.v_descriptor());
    if (kPassTurn) group.pass_turn();
    multiply_p_v<T, kSteps - kLast, kSteps>(o, p, group.v_descriptor());
    wgmma_commit();
  }

  /// Most tiles leave every row's shift as it is.
  static __device__ __forceinline__ void rescale(Outputs& o, float2 factor) {
    if (any_rescales(factor)) scale_rows(o, factor);
  }

  /// Depends on the exponentials of every second column pair: see end_block_after.
  static __device__ __forceinline__ float some_weight(const Scores& s) {
    float least = s[3];
#pragma unroll
    for (int i = 7; i < C::kScores; i += 4) least = fminf(least, s[i]);
    return least;
  }

  __device__ __forceinline__ float2 weigh(int position, const Walk& walk, Scores& s,
                                          OnlineSoftmax& softmax) {
    if (walk.is_masked(position)) mask(position, s);
    return softmax.step<!C::kOnes>(s, group.params.problem.scale_log2);
  }

  /// The same after a row's first tile: its maxima are looked for only if its weights, with the
  /// shift there is, come out too large for 16 bits.
  __device__ __forceinline__ float2 weigh_lazily(int position, const Walk& walk, Scores& s,
                                                 OnlineSoftmax& softmax) {
    if (!walk.is_masked(position)) {
      if (softmax.try_step<!C::kOnes>(s, group.params.problem.scale_log2)) return {1.f, 1.f};
      compute_warp_scores<T, C::kHeadDim>(s, group.rows(), group.keys(), group.thread);
    }
    return weigh(position, walk, s, softmax);
  }

  __device__ __forceinline__ void mask(int position, Scores& s) {
    const TokenLayout layout = group.params.problem.layout;
    const Segment rows = group.segment();
    const int mode = group.item().mode;
    const int first = group.first_row();
    const KvList own = kv_list(layout, rows, {first, first + 64}, mode, C::kTileK);
    const Segment keys = own.segment(position);
    const int row = first + group.thread / 32 * 16 + group.thread % 32 / 4;
    const int column = own.tile(position) * C::kTileK + group.thread % 4 * 2;
    mask_scores(s, column, visible_keys(layout, rows, keys, row, mode),
                visible_keys(layout, rows, keys, row + 8, mode));
  }
};

}  // namespace arrowhead::sm90
