// Cached heads alone: a copy, for which the attention kernels are more than is needed.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace arrowhead {

/// Whether every head is cached, as far as the host can tell.
bool only_copies(const AttentionParams& params);

/// Enqueue the copies of a launch that only_copies. Needs no workspace.
cudaError_t launch_copies(const AttentionParams& params, cudaStream_t stream);

}  // namespace arrowhead
