// ONNX Runtime's own threads, for the operators on the CPU provider.
#pragma once

#include <cstddef>
#include <thread>

#include "call.h"

namespace arrowhead::ort {

inline int max_workers() {
  static const int threads = static_cast<int>(std::thread::hardware_concurrency());
  return max_of(1, threads);
}

/// Call body(worker) for each worker on the threads of the session.
template <class Body>
void parallel(const Ort::KernelContext& context, int workers, Body body) {
  context.ParallelFor(
      [](void* data, std::size_t worker) { (*static_cast<Body*>(data))(worker); },
      static_cast<std::size_t>(workers), 0, &body);
}

/// Call each(i) for i below size, in as many parts as there may be threads.
template <class Each>
void parallel_each(const Ort::KernelContext& context, std::size_t size, Each each) {
  const std::size_t parts = max_workers();
  parallel(context, static_cast<int>(parts), [&](std::size_t part) {
    for (std::size_t i = size * part / parts; i < size * (part + 1) / parts; ++i) each(i);
  });
}

}  // namespace arrowhead::ort
