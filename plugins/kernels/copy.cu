#include "copy.h"

namespace arrowhead {
namespace {

constexpr int kTokens = 8;     // rows a thread has in flight
constexpr int kThreads = 512;  // of a CTA, at most

struct CopyParams {
  // By segment.
  TensorView cache[2];
  TensorView out[2];
  TensorView second[2];
  int tokens[2];
  int chunks[2];  // of kTokens
  int heads;
  HeadTask tasks[kMaxHeads];
};

__device__ __forceinline__ int4* row_of(const TensorView& view, int batch, int token, int head) {
  const std::int64_t element = batch * view.batch_stride + token * view.token_stride +
                               head * view.head_stride + 8 * static_cast<int>(threadIdx.x);
  return reinterpret_cast<int4*>(static_cast<std::uint16_t*>(view.data) + element);
}

__device__ __forceinline__ void store_rows(const int4 (&rows)[kTokens], int count,
                                           const TensorView& view, int batch, int token,
                                           int head) {
  int4* to = row_of(view, batch, token, head);
  const std::int64_t stride = view.token_stride / 8;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (i < count) to[i * stride] = rows[i];
  }
}

/// Threads (D / 8, heads): each moves 16 bytes of a few tokens' rows, so that a CTA reads and
/// writes whole tokens where heads lie side by side. blockIdx.x is a chunk of tokens of a batch
/// row, image first.
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyParams params) {
  const int head = blockIdx.y * blockDim.y + threadIdx.y;
  if (head >= params.heads) return;
  const HeadTask task = params.tasks[head];
  if (task.source < 0) return;  // lies in the output

  const int image = params.chunks[1];
  const int chunks = params.chunks[0] + image;
  const int batch = blockIdx.x / chunks;
  const int chunk = blockIdx.x - batch * chunks;
  const int segment = chunk < image;
  const int token = kTokens * (segment ? chunk : chunk - image);
  const int count = params.tokens[segment] - token;

  const int4* from = row_of(params.cache[segment], batch, token, task.source);
  const std::int64_t stride = params.cache[segment].token_stride / 8;
  int4 rows[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (i < count) rows[i] = __ldcs(from + i * stride);
  }
  store_rows(rows, count, params.out[segment], batch, token, head);
  if (task.second >= 0) {
    store_rows(rows, count, params.second[segment], batch, token, task.second);
  }
}

}  // namespace

bool only_copies(const AttentionParams& params) {
  if (params.device_tasks != nullptr) return false;
  for (int head = 0; head < params.heads; ++head) {
    if (params.tasks[head].mode != kCached) return false;
  }
  return true;
}

cudaError_t launch_copies(const AttentionParams& params, cudaStream_t stream) {
  CopyParams kernel{};
  copy_views(kernel.cache, params.cache);
  copy_views(kernel.out, params.out);
  copy_views(kernel.second, params.second);
  kernel.tokens[0] = params.out.text.data != nullptr ? params.text_tokens : 0;
  kernel.tokens[1] = params.image_tokens;
  for (int i = 0; i < 2; ++i) kernel.chunks[i] = ceil_div(kernel.tokens[i], kTokens);
  kernel.heads = params.heads;
  for (int head = 0; head < params.heads; ++head) kernel.tasks[head] = params.tasks[head];

  const int vectors = params.head_dim / 8;
  const int groups = ceil_div(params.heads * vectors, kThreads);
  const int heads = ceil_div(params.heads, groups);  // of a CTA
  const int chunks = params.batch * (kernel.chunks[0] + kernel.chunks[1]);
  if (chunks == 0) return cudaSuccess;
  copy_kernel<<<dim3(chunks, groups), dim3(vectors, heads), 0, stream>>>(kernel);
  return cudaGetLastError();
}

}  // namespace arrowhead
