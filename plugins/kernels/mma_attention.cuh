// ArrowAttention with mma.sync and cp.async: every device from sm_80 on. Eight warps of 16 query
// rows share the tiles; lists, order and tickets are those of the Hopper kernel.
#pragma once

#include "mma_config.h"
#include "mma_ptx.cuh"
#include "softmax.cuh"
#include "tile_scheduler.cuh"

namespace arrowhead::mma {

/// A tile in shared memory. 16-byte chunks change places within groups of eight, by row, so that
/// the eight rows of a matrix load lie in different banks.
template <int kHeadDim>
struct Tile {
  static constexpr int kChunks = kHeadDim / 8;
  uint4* chunks;

  __device__ __forceinline__ uint4* at(int row, int chunk) const {
    return chunks + row * kChunks + (chunk ^ (row % 8));
  }

  /// Start to load `rows` rows of one head; rows past `tokens` become zero.
  __device__ __forceinline__ void load(const TensorView& view, int batch, int head, int token,
                                       int rows, int tokens) const {
    const char* base = static_cast<const char*>(view.data) +
                       2 * (batch * view.batch_stride + head * view.head_stride);
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const bool exists = token + row < tokens;
      const std::int64_t from = exists ? (token + row) * view.token_stride : 0;
      copy_async(at(row, chunk), base + 2 * from + 16 * chunk, exists);
    }
  }
};

template <int kHeadDim>
struct SharedStorage {
  uint4 q[kTileQ * kHeadDim / 8];
  uint4 k[kStages][kTileK * kHeadDim / 8];
  uint4 v[kStages][kTileK * kHeadDim / 8];
  RunTable table;
  int next_ticket;

  /// Made before the first load, so a part of the tiles serves.
  __device__ __forceinline__ RunCosts& costs() { return reinterpret_cast<RunCosts&>(k); }
};

template <class T, int kHeadDim>
struct Worker {
  const Params& params;
  SharedStorage<kHeadDim>& shared;
  Work work;
  HeadTask task;

  __device__ __forceinline__ int segment() const { return static_cast<int>(work.segment); }

  __device__ __forceinline__ void load_kv(const KvList& list, int i) const {
    const int from = static_cast<int>(list.segment(i));
    const int token = list.tile(i) * kTileK;
    const int tokens = params.problem.layout.tokens(list.segment(i));
    Tile<kHeadDim>{shared.k[i % kStages]}.load(params.k[from], work.batch, task.source, token,
                                               kTileK, tokens);
    Tile<kHeadDim>{shared.v[i % kStages]}.load(params.v[from], work.batch, task.source, token,
                                               kTileK, tokens);
  }

  __device__ __forceinline__ void attend() {
    const TokenLayout layout = params.problem.layout;
    const int token = work.tile * kTileQ;
    const int row = token + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const KvList list =
        kv_list(layout, work.segment, {token, token + kTileQ}, task.mode, kTileK);
    const Tile<kHeadDim> q{shared.q};
    q.load(params.q[segment()], work.batch, task.source, token, kTileQ,
           layout.tokens(work.segment));
    load_kv(list, 0);
    copy_commit();

    float o[kHeadDim / 2] = {};
    OnlineSoftmax softmax;
    for (int i = 0; i < list.size(); ++i) {
      if (i + 1 < list.size()) load_kv(list, i + 1);
      copy_commit();
      copy_wait<1>();  // all but the tile just asked for
      __syncthreads();
      float s[kTileK / 2] = {};
      multiply_q_k(s, q, Tile<kHeadDim>{shared.k[i % kStages]});
      if (list.is_masked(i)) {
        const Segment keys = list.segment(i);
        mask_scores(s, list.tile(i) * kTileK + threadIdx.x % 4 * 2,
                    visible_keys(layout, work.segment, keys, row, task.mode),
                    visible_keys(layout, work.segment, keys, row + 8, task.mode));
      }
      const float2 factor = softmax.step<true>(s, params.problem.scale_log2);
      if (any_rescales(factor)) scale_rows(o, factor);
      std::uint32_t p[kTileK / 4];
      pack_rows<T>(s, p);
      multiply_p_v(o, p, Tile<kHeadDim>{shared.v[i % kStages]});
      __syncthreads();  // the buffers may be loaded again
    }
    scale_rows(o, softmax.finish());
    store(o, row, params.out[segment()], work.head);
    if (task.second >= 0) store(o, row, params.second[segment()], task.second);
  }

  __device__ __forceinline__ void multiply_q_k(float (&s)[kTileK / 2], Tile<kHeadDim> q,
                                               Tile<kHeadDim> k) const {
    const int lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      std::uint32_t a[4];
      load_matrices(a, q.at(warp_row + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int keys = 0; keys < kTileK; keys += 16) {
        std::uint32_t b[4];  // two groups of eight keys, two halves of 16 columns each
        load_matrices(b, k.at(keys + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
        Multiply<T>::add(s + keys / 2, a, b[0], b[1]);
        Multiply<T>::add(s + keys / 2 + 4, a, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void multiply_p_v(float (&o)[kHeadDim / 2],
                                               const std::uint32_t (&p)[kTileK / 4],
                                               Tile<kHeadDim> v) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
#pragma unroll
      for (int column = 0; column < kHeadDim; column += 16) {
        std::uint32_t b[4];  // two groups of eight columns, two halves of 16 keys each
        load_matrices_transposed(b, v.at(16 * step + lane % 16, column / 8 + lane / 16));
        Multiply<T>::add(o + column / 2, p + 4 * step, b[0], b[1]);
        Multiply<T>::add(o + column / 2 + 4, p + 4 * step, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void store(const float (&o)[kHeadDim / 2], int row,
                                        const TensorView& view, int head) const {
    const int tokens = params.problem.layout.tokens(work.segment);
    T* base = static_cast<T*>(view.data) + work.batch * view.batch_stride +
              head * view.head_stride + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i += 2) {  // pairs: columns 8 (i / 4), first or second row
      const int token = row + i % 4 / 2 * 8;
      if (token < tokens) {
        *reinterpret_cast<std::uint32_t*>(base + token * view.token_stride + i / 4 * 8) =
            pack<T>(o[i], o[i + 1]);
      }
    }
  }

  __device__ __forceinline__ void copy() const {
    constexpr int kChunks = kHeadDim / 8;
    const TensorView& from = params.cache[segment()];
    const int token = work.tile * kCopyRows;
    const int rows = min_of(kCopyRows, params.problem.layout.tokens(work.segment) - token);
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int row = token + i / kChunks;
      const uint4 data = *chunk_of(from, task.source, row, i % kChunks);
      *chunk_of(params.out[segment()], work.head, row, i % kChunks) = data;
      if (task.second >= 0) {
        *chunk_of(params.second[segment()], task.second, row, i % kChunks) = data;
      }
    }
  }

  __device__ __forceinline__ uint4* chunk_of(const TensorView& view, int head, int row,
                                             int chunk) const {
    return reinterpret_cast<uint4*>(static_cast<T*>(view.data) + work.batch * view.batch_stride +
                                    row * view.token_stride + head * view.head_stride) +
           chunk;
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ Params params) {
  extern __shared__ uint4 dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<kHeadDim>*>(dynamic_shared);
  build_run_table(shared.table, shared.costs(), params.problem);
  int ticket = blockIdx.x;
  while (ticket < shared.table.total) {
    const Work work = params.problem.find(shared.table, ticket);
    Worker<T, kHeadDim> worker{params, shared, work, params.problem.task(work.head)};
    if (worker.task.mode == kCached) {
      worker.copy();
    } else {
      worker.attend();
    }
    __syncthreads();  // everybody has read the ticket before, and is done with the tiles
    if (threadIdx.x == 0) shared.next_ticket = next_ticket(params.problem);
    __syncthreads();
    ticket = shared.next_ticket;
  }
}

template <class T, int kHeadDim>
cudaError_t launch(const Params& params, int multiprocessors, cudaStream_t stream) {
  constexpr int bytes = sizeof(SharedStorage<kHeadDim>);
  static_assert(bytes <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a CTA");
  static_assert(sizeof(RunCosts) <= sizeof(SharedStorage<kHeadDim>::k), "the costs lie there");
  const cudaError_t error =
      cudaFuncSetAttribute(attention_kernel<T, kHeadDim>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  attention_kernel<T, kHeadDim><<<multiprocessors, kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace arrowhead::mma
