#include "sm90_attention.cuh"
#include "sm90_instances.h"

namespace arrowhead::sm90 {

template <class T>
cudaError_t launch_hdim64(const Params& params, bool wide, int multiprocessors,
                          cudaStream_t stream) {
  return wide ? launch<Config<T, 64, true>>(params, multiprocessors, stream)
              : launch<Config<T, 64, false>>(params, multiprocessors, stream);
}

template cudaError_t launch_hdim64<__half>(const Params&, bool, int, cudaStream_t);
template cudaError_t launch_hdim64<__nv_bfloat16>(const Params&, bool, int, cudaStream_t);

}  // namespace arrowhead::sm90
