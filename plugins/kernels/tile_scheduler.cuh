// Tickets: each CTA makes the run table for itself, then takes work until there is none.
#pragma once

#include "problem.h"

namespace arrowhead {

/// Called by all threads of a CTA; the table is ready when it returns, and the costs are free.
__device__ __forceinline__ void build_run_table(RunTable& table, RunCosts& costs,
                                                const Problem& problem) {
  if (threadIdx.x == 0) table.runs = 2 * problem.heads;
  for (int run = threadIdx.x; run < 2 * problem.heads; run += blockDim.x) {
    const HeadTask task = problem.task(run / 2);
    costs.describe(run, task.mode, task.source, problem.shape);
  }
  __syncthreads();
  for (int run = threadIdx.x; run < 2 * problem.heads; run += blockDim.x) table.place(costs, run);
  __syncthreads();
}

/// The first wave of tickets goes by CTA index; later ones to whoever comes first.
__device__ __forceinline__ int next_ticket(const Problem& problem) {
  return static_cast<int>(gridDim.x + atomicAdd(problem.tickets, 1u));
}

}  // namespace arrowhead
