#include "rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace arrowhead {
namespace {

constexpr int kVector = 8;  // elements of 16 bytes, what a thread has of a row
constexpr int kThreads = 256;
constexpr std::int64_t kMaxVectors = 1 << 30;

struct Rows {
  const int4* x;
  int4* out;
  unsigned vectors;  // of all rows: a thread each
  unsigned lanes;    // of a row
  unsigned heads;
  unsigned tokens;
};

__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ void narrow(float2 x, __half2& to) { to = __float22half2_rn(x); }
__device__ __forceinline__ void narrow(float2 x, __nv_bfloat162& to) {
  to = __float22bfloat162_rn(x);
}

/// Eight elements as pairs in fp32.
template <class Pair>
__device__ __forceinline__ void load(float2 (&to)[kVector / 2], const int4& from) {
  const auto* pairs = reinterpret_cast<const Pair*>(&from);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) to[i] = widen(pairs[i]);
}

template <class Pair>
__device__ __forceinline__ int4 rounded(const float2 (&from)[kVector / 2]) {
  int4 to;
  auto* pairs = reinterpret_cast<Pair*>(&to);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) narrow(from[i], pairs[i]);
  return to;
}

template <class Pair>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ Rows rows, const int4* weight, float epsilon) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const bool mine = i < rows.vectors;  // a row's threads agree; all of a warp go on
  float2 x[kVector / 2]{};
  if (mine) load<Pair>(x, rows.x[i]);
  float sum = 0.0f;
#pragma unroll
  for (const float2& pair : x) sum += pair.x * pair.x + pair.y * pair.y;
  for (unsigned lane = rows.lanes / 2; lane > 0; lane /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  }
  if (!mine) return;
  const float inverse = rsqrtf(sum / static_cast<float>(kVector * rows.lanes) + epsilon);
  float2 scale[kVector / 2];
  load<Pair>(scale, weight[i % rows.lanes]);
#pragma unroll
  for (int j = 0; j < kVector / 2; ++j) {
    x[j] = {x[j].x * inverse * scale[j].x, x[j].y * inverse * scale[j].y};
  }
  rows.out[i] = rounded<Pair>(x);
}

template <class Pair>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ Rows rows, const float4* cos, const float4* sin) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= rows.vectors) return;
  const unsigned token = i / (rows.lanes * rows.heads) % rows.tokens;
  const unsigned entry = (token * rows.lanes + i % rows.lanes) * 2;  // of a table, in fours
  float2 x[kVector / 2];
  load<Pair>(x, rows.x[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 c = __ldg(cos + entry + half);
    const float4 s = __ldg(sin + entry + half);
    const float2 a = x[2 * half];
    const float2 b = x[2 * half + 1];
    x[2 * half] = {a.x * c.x - a.y * s.x, a.y * c.y + a.x * s.y};
    x[2 * half + 1] = {b.x * c.z - b.y * s.z, b.y * c.w + b.x * s.w};
  }
  rows.out[i] = rounded<Pair>(x);
}

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

/// Check a launch and say how its rows lie.
cudaError_t rows_of(const RowParams& params, Rows& rows) {
  const int lanes = params.head_dim / kVector;
  const bool power = lanes > 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
  if (!power || params.head_dim % kVector != 0 || params.batch < 0 || params.tokens < 0 ||
      params.heads < 0) {
    return cudaErrorInvalidValue;
  }
  if (!aligned(params.x) || !aligned(params.out)) return cudaErrorMisalignedAddress;
  const std::int64_t vectors = std::int64_t{params.batch} * params.tokens * params.heads * lanes;
  if (vectors > kMaxVectors) return cudaErrorInvalidValue;
  const auto size = [](std::int64_t value) { return static_cast<unsigned>(value); };
  rows = {static_cast<const int4*>(params.x), static_cast<int4*>(params.out), size(vectors),
          size(lanes), size(params.heads), size(params.tokens)};
  return cudaSuccess;
}

/// Launch `kernel`, of one of the two elements, with a thread for every vector.
template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, const Rows& rows, cudaStream_t stream, Arguments... arguments) {
  if (rows.vectors == 0) return cudaSuccess;
  const unsigned blocks = (rows.vectors + kThreads - 1) / kThreads;
  kernel<<<blocks, kThreads, 0, stream>>>(rows, arguments...);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_rms_norm(const RowParams& params, const void* weight, float epsilon,
                            cudaStream_t stream) {
  Rows rows;
  const cudaError_t error = rows_of(params, rows);
  if (error != cudaSuccess) return error;
  if (!aligned(weight)) return cudaErrorMisalignedAddress;
  const bool half = params.element == Element::kFloat16;
  return launch(half ? rms_norm_kernel<__half2> : rms_norm_kernel<__nv_bfloat162>, rows, stream,
                static_cast<const int4*>(weight), epsilon);
}

cudaError_t launch_rotary(const RowParams& params, const float* cos, const float* sin,
                          cudaStream_t stream) {
  Rows rows;
  const cudaError_t error = rows_of(params, rows);
  if (error != cudaSuccess) return error;
  if (!aligned(cos) || !aligned(sin)) return cudaErrorMisalignedAddress;
  const bool half = params.element == Element::kFloat16;
  return launch(half ? rotary_kernel<__half2> : rotary_kernel<__nv_bfloat162>, rows, stream,
                reinterpret_cast<const float4*>(cos), reinterpret_cast<const float4*>(sin));
}

}  // namespace arrowhead
