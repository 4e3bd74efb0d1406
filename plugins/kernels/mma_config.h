// The tile of the fallback kernel and what its translation units export.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace arrowhead::mma {

// 128 x 64: divides the default block, so a band needs no mask, and at D 128 its 96 KB fit the
// 99 KB of sm_86, sm_89 and sm_120.
constexpr int kTileQ = 128;
constexpr int kTileK = 64;
constexpr int kWarps = kTileQ / 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 2;
constexpr int kCopyRows = 128;  // rows of a cached head that one ticket copies

/// Views by segment (text, image).
struct Params {
  TensorView q[2];
  TensorView k[2];
  TensorView v[2];
  TensorView out[2];
  TensorView second[2];
  TensorView cache[2];
  Problem problem;
};

template <class T, int kHeadDim>
cudaError_t launch(const Params& params, int multiprocessors, cudaStream_t stream);

}  // namespace arrowhead::mma
