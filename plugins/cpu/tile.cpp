// The instances of the tile kernel, and which of them this processor runs. No compiler flag
// names an instruction set, so that one file is the whole build of any machine's library.
#include "tile.h"

#include <cstdlib>
#include <cstring>

// Needs optimisation and contraction of a * b + c to one instruction: -O3 -ffp-contract=fast.
#define ARROWHEAD_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define ARROWHEAD_TARGET(isa) \
  ARROWHEAD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ARROWHEAD_TARGET_END _Pragma("clang attribute pop")
#else
#define ARROWHEAD_TARGET(isa) \
  _Pragma("GCC push_options") ARROWHEAD_PRAGMA(GCC target(isa))
#define ARROWHEAD_TARGET_END _Pragma("GCC pop_options")
#endif

// Rows of a register tile: two vectors each must leave room for two of B and one of A in 32
// registers, or in 16. More rows than these were no faster.
#ifdef __x86_64__
ARROWHEAD_TARGET("avx512f,avx512dq,avx512vl,fma")
#define ARROWHEAD_ISA avx512
#define ARROWHEAD_VECTOR_BYTES 64
#define ARROWHEAD_REGISTER_ROWS 8
#include "tile_kernel.h"
ARROWHEAD_TARGET_END

ARROWHEAD_TARGET("avx2,fma")
#define ARROWHEAD_ISA avx2
#define ARROWHEAD_VECTOR_BYTES 32
#define ARROWHEAD_REGISTER_ROWS 4
#include "tile_kernel.h"
ARROWHEAD_TARGET_END
#endif

// What every processor of the architecture has: SSE2, or NEON with its 32 registers.
#define ARROWHEAD_ISA baseline
#define ARROWHEAD_VECTOR_BYTES 16
#ifdef __aarch64__
#define ARROWHEAD_REGISTER_ROWS 8
#else
#define ARROWHEAD_REGISTER_ROWS 4
#endif
#include "tile_kernel.h"

namespace arrowhead::cpu {
namespace {

/// Fastest first.
int runnable(const TileKernel** kernels) {
  int count = 0;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    kernels[count++] = &avx512::kernel;
  }
  if (fma && __builtin_cpu_supports("avx2")) kernels[count++] = &avx2::kernel;
#endif
  kernels[count++] = &baseline::kernel;
  return count;
}

const TileKernel& choose() {
  const TileKernel* kernels[3];
  const int count = runnable(kernels);
  if (const char* wanted = std::getenv("ARROWHEAD_CPU_KERNEL")) {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(kernels[i]->name, wanted) == 0) return *kernels[i];
    }
  }
  return *kernels[0];
}

}  // namespace

const TileKernel& tile_kernel() {
  static const TileKernel& chosen = choose();
  return chosen;
}

}  // namespace arrowhead::cpu
