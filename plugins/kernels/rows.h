// Norm and rotation of heads, for graphs whose runtime would take a kernel for each operation.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace arrowhead {

/// out = x / sqrt(mean of x^2 over D + epsilon) * weight, in fp32 and rounded once. weight: [D] of
/// x's element.
/// cudaErrorInvalidValue: sizes that are not as RowParams says. cudaErrorMisalignedAddress: nor
/// addresses.
cudaError_t launch_rms_norm(const RowParams& params, const void* weight, float epsilon,
                            cudaStream_t stream);

/// out = x cos + turned(x) sin, in fp32 and rounded once, where each pair (a, b) of D is turned to
/// (-b, a). cos, sin: fp32 [S, D].
cudaError_t launch_rotary(const RowParams& params, const float* cos, const float* sin,
                          cudaStream_t stream);

}  // namespace arrowhead
