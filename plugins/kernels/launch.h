// The one entry point of the kernel library.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace arrowhead {

/// Enqueue one attention of any mix of FULL, ARROW and CACHED heads. Allocates nothing, does not
/// synchronise, and may be captured in a graph: the parameters are copied.
/// cudaErrorInvalidValue: the parameters contradict each other. cudaErrorMisalignedAddress: a view
/// breaks TensorView's alignment. cudaErrorNoKernelImageForDevice: no kernel for this device.
cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace arrowhead
