// What the Hopper translation units export: one function per head_dim and element type.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90_config.h"

namespace arrowhead::sm90 {

template <class T>
cudaError_t launch_hdim64(const Params& params, bool wide, int multiprocessors,
                          cudaStream_t stream);

template <class T>
cudaError_t launch_hdim128(const Params& params, int multiprocessors, cudaStream_t stream);

}  // namespace arrowhead::sm90
