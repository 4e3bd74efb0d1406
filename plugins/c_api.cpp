// The part of the C interface that launches kernels.
#include "c_api.h"

#include "kernels/launch.h"

extern "C" {

int arrowhead_attention(const arrowhead::AttentionParams* params, void* stream) {
  return arrowhead::launch_attention(*params, static_cast<cudaStream_t>(stream));
}

const char* arrowhead_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"
