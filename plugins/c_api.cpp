// The part of the C interface that launches kernels.
#include "c_api.h"

#include "kernels/launch.h"
#include "kernels/rows.h"

extern "C" {

int arrowhead_attention(const arrowhead::AttentionParams* params, void* stream) {
  return arrowhead::launch_attention(*params, static_cast<cudaStream_t>(stream));
}

int arrowhead_rms_norm(const arrowhead::RowParams* params, const void* weight, float epsilon,
                       void* stream) {
  return arrowhead::launch_rms_norm(*params, weight, epsilon, static_cast<cudaStream_t>(stream));
}

int arrowhead_rotary(const arrowhead::RowParams* params, const float* cos, const float* sin,
                     void* stream) {
  return arrowhead::launch_rotary(*params, cos, sin, static_cast<cudaStream_t>(stream));
}

const char* arrowhead_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"
