// A consumer warpgroup: 64 query rows against the tiles of the list, and their output.
#pragma once

#include "sm90_shared.cuh"
#include "sm90_warp_scores.cuh"
#include "softmax.cuh"

namespace arrowhead::sm90 {

// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int { kTurn = 1, kStore = kTurn + 3 };

template <class C>
struct Consumer {
  using T = typename C::T;

  const Params& params;
  SharedStorage<C>& shared;
  const int group;   // 0 .. kGroups - 1
  const int thread;  // in the group
  RingPosition<C::kStages> k_at;
  RingPosition<C::kStages> v_at;
  RingPosition<1> q_at;
  RingPosition<kWorkSlots> work_at;
  std::uint32_t q[C::kQueries];  // where they are kept in registers

  __device__ Consumer(const Params& params, SharedStorage<C>& shared, int group)
      : params(params), shared(shared), group(group), thread(threadIdx.x % 128) {}

  __device__ __forceinline__ void run() {
    if (group == C::kGroups - 1) pass_turn();  // the first turn is group 0's
    while (true) {
      barrier_wait(shared.work_full[work_at.slot()], work_at.parity());
      const int kind = uniform(item().kind);
      if (kind == WorkItem::kStop) break;
      if (kind == WorkItem::kCopy) {
        copy();
      } else {
        attend();
      }
      release(shared.work_empty[work_at.slot()]);
      work_at.advance();
    }
    if (group == 0) take_turn();             // the last turn passed finds somebody
    if (thread == 0) tma_store_wait_read();  // shared memory outlives its stores
  }

  /// Read where it is needed, not kept: registers are for scores and outputs.
  __device__ __forceinline__ const WorkItem& item() const { return shared.work[work_at.slot()]; }
  __device__ __forceinline__ Segment segment() const {
    return static_cast<Segment>(item().segment);
  }
  __device__ __forceinline__ int first_row() const { return item().token + 64 * group; }
  __device__ __forceinline__ KvList list(int first_row, int rows) const {
    return kv_list(params.problem.layout, segment(), {first_row, first_row + rows}, item().mode,
                   C::kTileK);
  }

  /// All lanes hold the same; the shuffle tells the compiler, for loop bounds around wgmma.
  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

  /// Buffers are given back by each warp: a warp that is done says nothing about the others.
  __device__ __forceinline__ void release(Barrier& empty) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(empty);
  }

  // The groups take turns at issuing products: while one has the tensor cores, the others compute
  // exponentials. Every group takes one turn per tile of the list, also where it skips the tile.
  __device__ __forceinline__ void take_turn() { named_barrier_sync(kTurn + group, 256); }
  __device__ __forceinline__ void pass_turn() {
    named_barrier_arrive(kTurn + (group + 1) % C::kGroups, 256);
  }

  __device__ __forceinline__ std::uint64_t q_descriptor() const {
    return slab_descriptor(shared.q[group], 64 * kSlabRowBytes);
  }
  __device__ __forceinline__ std::uint64_t k_descriptor() const {
    return slab_descriptor(shared.k[k_at.slot()], C::kTileK * kSlabRowBytes);
  }
  __device__ __forceinline__ std::uint64_t v_descriptor() const {
    const unsigned char* v = shared.v[v_at.slot()];
    return slab_descriptor(v, C::kOnes ? static_cast<int>(shared.ones - v)
                                       : C::kTileK * kSlabRowBytes);
  }

  __device__ __forceinline__ void attend() {
    const KvList own = list(first_row(), 64);
    const Visit visit = visit_of(list(item().token, C::kTileQ), own);
    const int runs[2] = {uniform(visit.run[0]), uniform(visit.run[1])};
    const int skips[2] = {uniform(visit.skip[0]), uniform(visit.skip[1])};
    // List positions that need no mask: below open[0], and open[1] .. open[2] - 1.
    const int image = own.text_tiles - own.image.begin;
    const int open[3] = {uniform(own.text_open), uniform(image + own.image_open.begin),
                         uniform(image + own.image_open.end)};

    float o[C::kOutputs];
#pragma unroll
    for (int i = 0; i < C::kOutputs; ++i) o[i] = 0.f;
    OnlineSoftmax softmax;
    barrier_wait(shared.q_full[group], q_at.parity());
    q_at.advance();
    if constexpr (C::kQueriesInRegisters) load_queries();

    int position = 0;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const int end = position + (part ? runs[1] : runs[0]);
      const bool last = part == 1 || runs[1] == 0;
      if (end > position) compute_run(position, end, last, open, o, softmax);
      position = end;
#pragma unroll 1
      for (int skip = part ? skips[1] : skips[0]; skip > 0; --skip) skip_tile();
    }
    if (position > 0) {
      if constexpr (C::kOnes) {
        constexpr int kSum = C::kHeadDim / 2;
        store(o, {reciprocal_fast(o[kSum]), reciprocal_fast(o[kSum + 2])});
      } else {
        store(o, softmax.finish());
      }
    } else {
      release(shared.q_empty[group]);
    }
  }

  /// Tiles position .. end - 1 of the list, all seen by these rows; `last` if no more follow. The
  /// scores of a tile are computed together with the previous tile's share of the output, so that
  /// the tensor cores have work while this group is at its exponentials.
  __device__ __forceinline__ void compute_run(int position, int end, bool last,
                                              const int (&open)[3], float (&o)[C::kOutputs],
                                              OnlineSoftmax& softmax) {
    float s[C::kScores];
    std::uint32_t p[C::kScores / 2];

    barrier_wait(shared.k_full[k_at.slot()], k_at.parity());
    take_turn();
    issue_scores(s);
    pass_turn();
    wgmma_wait<0>();
    pin(s);
    finish_k();
    rescale(o, weigh(position, open, s, softmax));
    pack_rows<T>(s, p);

#pragma unroll 1
    for (++position; position < end; ++position) {
      barrier_wait(shared.k_full[k_at.slot()], k_at.parity());
      take_turn();
      issue_scores(s);
      issue_outputs<true>(o, p);
      wgmma_wait<1>();
      pin(s);
      const float2 factor = weigh_lazily(position, open, s, softmax);
      finish_k();
      end_block_after(C::kOnes ? some_weight(s) : softmax.row_sum[0] + softmax.row_sum[1]);
      wgmma_wait<0>();
      pin(o);
      finish_v();
      rescale(o, factor);
      pack_rows<T>(s, p);
    }

    if (last) release(shared.q_empty[group]);  // the next query rows may come meanwhile
    issue_outputs<false>(o, p);
    wgmma_wait<0>();
    pin(o);
    finish_v();
  }

  /// Shared memory keeps them too, for compute_warp_scores.
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      load_query_columns(q + 4 * step, shared.q[group], step, thread);
    }
  }

  __device__ __forceinline__ void issue_scores(float (&s)[C::kScores]) {
    constexpr int kSlabBytes = C::kTileK * kSlabRowBytes;
    pin(s);
    if constexpr (C::kQueriesInRegisters) pin(q);
    wgmma_begin();
    if constexpr (C::kQueriesInRegisters) {
      multiply_q_k<T>(s, q, k_descriptor(), kSlabBytes);
    } else {
      multiply_q_k<T, C::kHeadDim>(s, q_descriptor(), k_descriptor(), 64 * kSlabRowBytes,
                                   kSlabBytes);
    }
    wgmma_commit();
  }

  /// `kPassTurn` shortly before the end: the next group's first products take a while to arrive.
  template <bool kPassTurn>
  __device__ __forceinline__ void issue_outputs(float (&o)[C::kOutputs],
                                                std::uint32_t (&p)[C::kScores / 2]) {
    constexpr int kSteps = C::kTileK / 16;
    constexpr int kLast = 2;
    barrier_wait(shared.v_full[v_at.slot()], v_at.parity());
    pin(p);
    pin(o);
    wgmma_begin();
    multiply_p_v<T, 0, kSteps - kLast>(o, p, v_descriptor());
    if (kPassTurn) pass_turn();
    multiply_p_v<T, kSteps - kLast, kSteps>(o, p, v_descriptor());
    wgmma_commit();
  }

  /// Most tiles leave every row's shift as it is.
  static __device__ __forceinline__ void rescale(float (&o)[C::kOutputs], float2 factor) {
    if (any_rescales(factor)) scale_rows(o, factor);
  }

  /// Depends on the exponentials of every second column pair: see end_block_after.
  static __device__ __forceinline__ float some_weight(const float (&s)[C::kScores]) {
    float least = s[3];
#pragma unroll
    for (int i = 7; i < C::kScores; i += 4) least = fminf(least, s[i]);
    return least;
  }

  static __device__ __forceinline__ bool is_masked(int position, const int (&open)[3]) {
    return position >= open[0] && (position < open[1] || position >= open[2]);
  }

  __device__ __forceinline__ float2 weigh(int position, const int (&open)[3],
                                          float (&s)[C::kScores], OnlineSoftmax& softmax) {
    if (is_masked(position, open)) mask(position, s);
    return softmax.step<!C::kOnes>(s, params.problem.scale_log2);
  }

  /// The same after a row's first tile: its maxima are looked for only if its weights, with the
  /// shift there is, come out too large for 16 bits.
  __device__ __forceinline__ float2 weigh_lazily(int position, const int (&open)[3],
                                                 float (&s)[C::kScores], OnlineSoftmax& softmax) {
    if (!is_masked(position, open)) {
      if (softmax.try_step<!C::kOnes>(s, params.problem.scale_log2)) return {1.f, 1.f};
      compute_warp_scores<T, C::kHeadDim>(s, shared.q[group], shared.k[k_at.slot()], thread);
    }
    return weigh(position, open, s, softmax);
  }

  __device__ __forceinline__ void mask(int position, float (&s)[C::kScores]) {
    const KvList own = list(first_row(), 64);
    const TokenLayout layout = params.problem.layout;
    const int row = first_row() + thread / 32 * 16 + thread % 32 / 4;
    const int column = own.tile(position) * C::kTileK + thread % 4 * 2;
    const Segment keys = own.segment(position);
    mask_scores(s, column, visible_keys(layout, segment(), keys, row, item().mode),
                visible_keys(layout, segment(), keys, row + 8, item().mode));
  }

  __device__ __forceinline__ void finish_k() {
    release(shared.k_empty[k_at.slot()]);
    k_at.advance();
  }
  __device__ __forceinline__ void finish_v() {
    release(shared.v_empty[v_at.slot()]);
    v_at.advance();
  }

  /// A buffer may be given back only once it was filled, or its barrier would count this round's
  /// arrival for the last.
  __device__ __forceinline__ void skip_tile() {
    take_turn();
    pass_turn();
    barrier_wait(shared.k_full[k_at.slot()], k_at.parity());
    finish_k();
    barrier_wait(shared.v_full[v_at.slot()], v_at.parity());
    finish_v();
  }

  __device__ __forceinline__ void group_barrier() { named_barrier_sync(kStore + group, 128); }

  /// Registers to shared memory in the swizzle of the tensor map, and from there to one or two
  /// outputs. The store clips rows past the segment's end.
  __device__ __forceinline__ void store(float (&o)[C::kOutputs], float2 factor) {
    scale_rows(o, factor);
    std::uint32_t packed[C::kHeadDim / 4];
    pack_rows<T>(o, packed);

    if (thread == 0) tma_store_wait_read();
    group_barrier();
    const int row = thread / 32 * 16 + thread % 16;
    unsigned char* base = shared.o[group] + row * kSlabRowBytes;
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {  // 16 columns at a time, 8 from each half warp
      const int chunk = (i % 4 * 2 + thread % 32 / 16) ^ (row % 8);
      const std::uint32_t matrices[4] = {packed[4 * i], packed[4 * i + 1], packed[4 * i + 2],
                                         packed[4 * i + 3]};
      store_matrices(base + i / 4 * 64 * kSlabRowBytes + chunk * 16, matrices);
    }
    fence_proxy_async();
    group_barrier();
    if (thread == 0) store_rows(shared.o[group], first_row());
  }

  __device__ __forceinline__ void store_rows(const void* rows, int token) {
    tma_store(params.out[item().segment], rows, {token, item().head, item().batch});
    if (item().second >= 0) {
      tma_store(params.second[item().segment], rows, {token, item().second, item().batch});
    }
    tma_store_commit();
  }

  /// A cached head's rows go out as they came in; groups 0 and 1 have a box of 64 rows each.
  __device__ __forceinline__ void copy() {
    const int end = min_of(item().token + kCopyRows, params.problem.layout.tokens(segment()));
    const int steps = uniform(ceil_div(end - item().token, kCopyStep));
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      barrier_wait(shared.k_full[k_at.slot()], k_at.parity());
      if (thread == 0 && group < 2) {
        fence_proxy_async();
        store_rows(shared.k[k_at.slot()] + group * C::kGroupBytes, first_row() + step * kCopyStep);
        tma_store_wait_read();
      }
      finish_k();
    }
  }
};

}  // namespace arrowhead::sm90
