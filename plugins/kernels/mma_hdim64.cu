#include "mma_attention.cuh"

namespace arrowhead::mma {

template cudaError_t launch<__half, 64>(const Params&, int, cudaStream_t);
template cudaError_t launch<__nv_bfloat16, 64>(const Params&, int, cudaStream_t);

}  // namespace arrowhead::mma
