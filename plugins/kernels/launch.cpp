#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "copy.h"
#include "mma_config.h"
#include "sm90_config.h"
#if ARROWHEAD_SM90
#include "sm90_instances.h"
#include "sm90_tensor_maps.h"
#endif

namespace arrowhead {
namespace {

constexpr int kMaxTokens = 1 << 28;  // tile coordinates stay far inside 32 bits

bool is_aligned(const TensorView& view) {
  constexpr std::int64_t kElements = 8;  // 16 bytes
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
         view.batch_stride % kElements == 0 && view.token_stride % kElements == 0 &&
         view.head_stride % kElements == 0;
}

bool is_aligned(const SegmentViews& views) {
  return is_aligned(views.text) && is_aligned(views.image);
}

/// Whether every segment that has tokens is there. Text may be left out of outputs.
bool covers(const AttentionParams& params, const SegmentViews& views, bool text) {
  return (params.image_tokens == 0 || views.image.data != nullptr) &&
         (params.text_tokens == 0 || !text || views.text.data != nullptr);
}

bool is_valid(const AttentionParams& params, const HeadTask& task) {
  const int sources = task.mode == kCached ? params.cache_heads : params.qkv_heads;
  const int first_source = task.mode == kCached ? -1 : 0;
  return task.mode >= kCached && first_source <= task.source && task.source < sources &&
         -1 <= task.second && task.second < params.second_heads;
}

bool is_valid(const AttentionParams& params) {
  const bool sizes = params.struct_size == sizeof(AttentionParams) && params.batch >= 1 &&
                     1 <= params.heads && params.heads <= kMaxHeads && params.qkv_heads >= 0 &&
                     params.cache_heads >= 0 && params.second_heads >= 0 &&
                     (params.head_dim == 64 || params.head_dim == 128) &&
                     (params.element == Element::kFloat16 ||
                      params.element == Element::kBFloat16);
  const bool layout = 0 <= params.image_tokens && params.image_tokens <= kMaxTokens &&
                      0 <= params.text_tokens && params.text_tokens <= kMaxTokens &&
                      params.image_tokens + params.text_tokens >= 1 && 1 <= params.block &&
                      params.block <= kMaxTokens;
  // A scale of zero or less would turn the running maximum into a minimum.
  const bool scale = std::isfinite(params.scale) && params.scale > 0.f;
  if (!sizes || !layout || !scale || params.workspace == nullptr) return false;

  const bool text_queries = params.out.text.data != nullptr;
  if (!covers(params, params.out, false)) return false;
  if (params.qkv_heads > 0 && !(covers(params, params.q, text_queries) &&
                                covers(params, params.k, true) && covers(params, params.v, true))) {
    return false;
  }
  if (params.cache_heads > 0 && !covers(params, params.cache, text_queries)) return false;
  if (params.second_heads > 0 && !covers(params, params.second, text_queries)) return false;
  if (params.device_tasks != nullptr) return true;
  for (int head = 0; head < params.heads; ++head) {
    if (!is_valid(params, params.tasks[head])) return false;
  }
  return true;
}

Problem make_problem(const AttentionParams& params, int tile_q, int copy_rows) {
  Problem problem{};
  problem.layout = {params.image_tokens, params.text_tokens, params.block};
  problem.shape = work_shape(problem.layout, params.batch, params.out.text.data != nullptr,
                             tile_q, copy_rows);
  problem.heads = params.heads;
  problem.scale_log2 = params.scale * 1.4426950408889634f;
  problem.tickets = static_cast<unsigned*>(params.workspace);
  problem.device_tasks = params.device_tasks;
  for (int head = 0; head < params.heads; ++head) problem.tasks[head] = params.tasks[head];
  return problem;
}

struct Device {
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
};

cudaError_t current_device(Device& device) {
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, id);
  };
  read(device.major, cudaDevAttrComputeCapabilityMajor);
  read(device.minor, cudaDevAttrComputeCapabilityMinor);
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  return error;
}

#if ARROWHEAD_SM90
cudaError_t launch_sm90(const AttentionParams& params, bool wide, int multiprocessors,
                        cudaStream_t stream) {
  const sm90::Tuning tuning = sm90::tuning(params.head_dim, wide);
  sm90::Params kernel{};
  kernel.problem = make_problem(params, 64 * tuning.groups, sm90::kCopyRows);
  const cudaError_t error = sm90::make_tensor_maps(params, tuning.tile_k, kernel);
  if (error != cudaSuccess) return error;
  const bool half = params.element == Element::kFloat16;
  if (params.head_dim == 64) {
    const auto launch = half ? sm90::launch_hdim64<__half> : sm90::launch_hdim64<__nv_bfloat16>;
    return launch(kernel, wide, multiprocessors, stream);
  }
  const auto launch = half ? sm90::launch_hdim128<__half> : sm90::launch_hdim128<__nv_bfloat16>;
  return launch(kernel, multiprocessors, stream);
}
#endif

cudaError_t launch_mma(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  mma::Params kernel{};
  kernel.problem = make_problem(params, mma::kTileQ, mma::kCopyRows);
  copy_views(kernel.q, params.q);
  copy_views(kernel.k, params.k);
  copy_views(kernel.v, params.v);
  copy_views(kernel.out, params.out);
  copy_views(kernel.second, params.second);
  copy_views(kernel.cache, params.cache);
  const bool half = params.element == Element::kFloat16;
  if (params.head_dim == 64) {
    const auto launch = half ? mma::launch<__half, 64> : mma::launch<__nv_bfloat16, 64>;
    return launch(kernel, multiprocessors, stream);
  }
  const auto launch = half ? mma::launch<__half, 128> : mma::launch<__nv_bfloat16, 128>;
  return launch(kernel, multiprocessors, stream);
}

}  // namespace

cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream) {
  if (!is_valid(params)) return cudaErrorInvalidValue;
  for (const SegmentViews* views :
       {&params.q, &params.k, &params.v, &params.out, &params.second, &params.cache}) {
    if (!is_aligned(*views)) return cudaErrorMisalignedAddress;
  }
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const bool hopper = ARROWHEAD_SM90 && device.major == 9 && device.minor == 0;
  const bool wants_hopper =
      params.kernel == Kernel::kSm90 || params.kernel == Kernel::kSm90Wide;
  if (device.major < 8 || (wants_hopper && !hopper)) return cudaErrorNoKernelImageForDevice;

  if (params.kernel == Kernel::kAuto && only_copies(params)) return launch_copies(params, stream);
  error = cudaMemsetAsync(params.workspace, 0, sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
#if ARROWHEAD_SM90
  if (hopper && params.kernel != Kernel::kMmaSync) {
    const bool wide = params.kernel != Kernel::kSm90 && params.head_dim == 64;
    return launch_sm90(params, wide, device.multiprocessors, stream);
  }
#endif
  return launch_mma(params, device.multiprocessors, stream);
}

}  // namespace arrowhead
