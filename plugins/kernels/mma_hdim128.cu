#include "mma_attention.cuh"

namespace arrowhead::mma {

template cudaError_t launch<__half, 128>(const Params&, int, cudaStream_t);
template cudaError_t launch<__nv_bfloat16, 128>(const Params&, int, cudaStream_t);

}  // namespace arrowhead::mma
