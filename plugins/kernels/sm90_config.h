// The tuning of the Hopper kernel and what it is given.
#pragma once

#include <cuda.h>

#include "problem.h"

namespace arrowhead::sm90 {

constexpr int kSlabColumns = 64;  // tiles lie in slabs of 64 columns:
constexpr int kSlabRowBytes = 128;  // the width of the swizzle

struct Tuning {
  int groups;              // consumer warpgroups, 64 query rows each
  int tile_k;              // keys a tile
  int stages;              // tiles of K, and of V, in flight
  int producer_registers;  // of the planner, too
  int consumer_registers;
};

/// `wide` is the D = 64 tile of 192 rows; elsewhere it changes nothing.
constexpr Tuning tuning(int head_dim, bool wide) {
  // 128 keys: at block 128 no tile of a band needs a mask, and a band starts on a tile.
  // D 128: 64 scores, 32 weights, 64 outputs and 32 queries a thread need two groups. Two
  // stages of 64 KB leave room for an output buffer, so that the next Q need not wait for a store.
  if (head_dim == 128) return {2, 128, 2, 32, 232};
  // D 64: exp2 takes as long as the products; a third group gives the scheduler more to overlap.
  if (wide) return {3, 128, 4, 32, 160};
  return {2, 128, 4, 40, 232};
}

template <class T_, int kHeadDim_, bool kWide_>
struct Config {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Tuning kTuning = tuning(kHeadDim, kWide_);
  static constexpr int kGroups = kTuning.groups;
  static constexpr int kTileQ = 64 * kGroups;
  static constexpr int kTileK = kTuning.tile_k;
  static constexpr int kStages = kTuning.stages;
  static constexpr int kSlabs = kHeadDim / kSlabColumns;
  static constexpr int kThreads = 128 * (kGroups + 1);  // warpgroup 0: producer, planner
  static constexpr int kGroupBytes = 64 * kHeadDim * 2;    // one group's rows of Q or O
  static constexpr int kKvBytes = kTileK * kHeadDim * 2;
  static constexpr int kScores = kTileK / 2;  // accumulator registers of a thread
  // At D 128 shared memory paces the products unless Q is in registers; at D 64 there is no room.
  static constexpr bool kQueriesInRegisters = kHeadDim == 128;
  static constexpr int kQueries = kQueriesInRegisters ? kHeadDim / 4 : 1;
  // Where exponentials set the pace, the tensor cores add up the weights: V has eight more columns,
  // of ones. At D 128 they would not fit behind V's two slabs.
  static constexpr bool kOnes = kHeadDim == 64;
  static constexpr int kOutputs = kHeadDim / 2 + (kOnes ? 4 : 0);

  static_assert(kHeadDim == 64 || kHeadDim == 128, "whole slabs, and a P V instruction for them");
  static_assert(kTileK == 128, "the Q K instruction is written for 128 keys");
  static_assert(kTileK >= 2 * 64, "a copy moves two boxes of 64 rows through one K buffer");
};

/// Tiles before an item's end at which the next ticket is taken: sooner than its queries take to
/// arrive, late enough for tickets to go to whoever is free.
constexpr int kTilesAhead = 4;

/// Rows of a cached head that one ticket copies: enough to pay for the ticket, few enough to fill
/// gaps evenly.
constexpr int kCopyRows = 512;
constexpr int kCopyStep = 128;  // rows through one K buffer

/// Tensor maps by segment. Q, O, second and cache have boxes of 64 rows, K and V of kTileK.
struct Params {
  CUtensorMap q[2];
  CUtensorMap k[2];
  CUtensorMap v[2];
  CUtensorMap out[2];
  CUtensorMap second[2];
  CUtensorMap cache[2];
  Problem problem;
};

}  // namespace arrowhead::sm90
