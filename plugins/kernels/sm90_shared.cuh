// The shared memory of a Hopper CTA: tiles, barriers, and what the planner tells.
#pragma once

#include "sm90_config.h"
#include "sm90_wgmma.cuh"
#include "tile_scheduler.cuh"

namespace arrowhead::sm90 {

/// A ticket, decoded by the planner.
struct WorkItem {
  enum Kind : int { kStop, kAttend, kCopy };
  int kind;
  int head;
  int source;
  int second;
  int batch;
  int segment;
  int token;  // first row
  int mode;
};

constexpr int kWorkSlots = 2;  // the planner decodes one ticket ahead

/// The tiles of an item, and each group's way through them.
template <class C>
struct Ways {
  KvList list;
  Walk walk[C::kGroups];
};

template <class C>
struct SharedStorage {
  // Swizzle patterns repeat every 1024 bytes of the address.
  // An item's queries and, when these are no longer needed, its outputs; the next item's queries
  // come meanwhile.
  alignas(1024) unsigned char rows[2][C::kGroups][C::kGroupBytes];
  alignas(1024) unsigned char k[C::kStages][C::kKvBytes];
  alignas(1024) unsigned char v[C::kStages][C::kKvBytes];
  // After V: the descriptors' offsets to them are positive.
  alignas(1024) unsigned char ones[C::kOnes ? 16 * kSlabRowBytes : 1];
  Barrier q_full[2][C::kGroups];
  Barrier q_empty[2][C::kGroups];
  Barrier k_full[C::kStages];
  Barrier k_empty[C::kStages];
  Barrier v_full[C::kStages];
  Barrier v_empty[C::kStages];
  Barrier work_full[kWorkSlots];
  Barrier work_empty[kWorkSlots];
  Barrier ticket_wanted;
  WorkItem work[kWorkSlots];
  Ways<C> ways[kWorkSlots];
  RunTable table;
  RunCosts costs;
};

template <class C>
constexpr int shared_bytes() {
  static_assert(sizeof(SharedStorage<C>) <= 227 * 1024, "a Hopper CTA has 227 KB");
  return sizeof(SharedStorage<C>);
}

}  // namespace arrowhead::sm90
