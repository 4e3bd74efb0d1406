#include "sm90_attention.cuh"
#include "sm90_instances.h"

namespace arrowhead::sm90 {

template <class T>
cudaError_t launch_hdim128(const Params& params, int multiprocessors, cudaStream_t stream) {
  return launch<Config<T, 128, false>>(params, multiprocessors, stream);
}

template cudaError_t launch_hdim128<__half>(const Params&, int, cudaStream_t);
template cudaError_t launch_hdim128<__nv_bfloat16>(const Params&, int, cudaStream_t);

}  // namespace arrowhead::sm90
