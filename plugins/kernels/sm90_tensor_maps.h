// Tensor maps for the Hopper kernel: made on the host for each launch, passed by value.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"
#include "sm90_config.h"

namespace arrowhead::sm90 {

/// Fill the tensor maps of `params`; absent segments are left alone.
cudaError_t make_tensor_maps(const AttentionParams& attention, int tile_k, Params& params);

}  // namespace arrowhead::sm90
