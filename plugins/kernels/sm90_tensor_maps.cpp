#include "sm90_tensor_maps.h"

#include <cudaTypedefs.h>

namespace arrowhead::sm90 {
namespace {

constexpr int kElementBytes = 2;

/// The driver's function, found at run time: the library links no driver, so it also loads where
/// there is none.
PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

cudaError_t make_map(CUtensorMap& map, const AttentionParams& attention, const TensorView& view,
                     int tokens, int heads, int box_tokens) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;

  // 64 columns, tokens, D / 64, heads, B: a box is a tile in slabs of 128 bytes a row.
  const auto size = [](int extent) { return static_cast<cuuint64_t>(extent); };
  const int slabs = attention.head_dim / kSlabColumns;
  const cuuint64_t extents[5] = {size(kSlabColumns), size(tokens), size(slabs), size(heads),
                                 size(attention.batch)};
  // The stride of an axis of one is never used, but must still be legal.
  const auto stride = [](int extent, std::int64_t elements) {
    return extent == 1 ? cuuint64_t{kSlabRowBytes}
                       : static_cast<cuuint64_t>(elements * kElementBytes);
  };
  const cuuint64_t strides[4] = {stride(tokens, view.token_stride), cuuint64_t{kSlabRowBytes},
                                 stride(heads, view.head_stride),
                                 stride(attention.batch, view.batch_stride)};
  const cuuint32_t box[5] = {kSlabColumns, static_cast<cuuint32_t>(box_tokens),
                             static_cast<cuuint32_t>(slabs), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = attention.element == Element::kFloat16
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(&map, type, 5, view.data, extents, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t make_maps(CUtensorMap (&maps)[2], const AttentionParams& attention,
                      const SegmentViews& views, int heads, int box_tokens) {
  const TensorView* const segments[2] = {&views.text, &views.image};
  const int tokens[2] = {attention.text_tokens, attention.image_tokens};
  for (int i = 0; i < 2; ++i) {
    if (segments[i]->data == nullptr || tokens[i] == 0 || heads == 0) continue;
    const cudaError_t error =
        make_map(maps[i], attention, *segments[i], tokens[i], heads, box_tokens);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t make_tensor_maps(const AttentionParams& attention, int tile_k, Params& params) {
  constexpr int kGroupRows = 64;
  struct {
    CUtensorMap (&maps)[2];
    const SegmentViews& views;
    int heads;
    int box_tokens;
  } const tensors[] = {
      {params.q, attention.q, attention.qkv_heads, kGroupRows},
      {params.k, attention.k, attention.qkv_heads, tile_k},
      {params.v, attention.v, attention.qkv_heads, tile_k},
      {params.out, attention.out, attention.heads, kGroupRows},
      {params.second, attention.second, attention.second_heads, kGroupRows},
      {params.cache, attention.cache, attention.cache_heads, kGroupRows},
  };
  for (const auto& tensor : tensors) {
    const cudaError_t error =
        make_maps(tensor.maps, attention, tensor.views, tensor.heads, tensor.box_tokens);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace arrowhead::sm90
