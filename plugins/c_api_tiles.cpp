// The part of the C interface that needs neither a device nor the CUDA toolkit.
#include "c_api.h"

using arrowhead::Range;
using arrowhead::Segment;
using arrowhead::TokenLayout;

extern "C" {

int arrowhead_params_size(void) { return sizeof(arrowhead::AttentionParams); }
int arrowhead_workspace_bytes(void) { return arrowhead::kWorkspaceBytes; }
int arrowhead_max_heads(void) { return arrowhead::kMaxHeads; }

void arrowhead_arrow_kv_blocks(TokenLayout layout, int q_block, int half_window, int* range) {
  const Range blocks = arrowhead::arrow_kv_blocks(layout, q_block, half_window);
  range[0] = blocks.begin;
  range[1] = blocks.end;
}

long long arrowhead_kept_pairs(TokenLayout layout, int mode, int text_queries) {
  return arrowhead::kept_pairs(layout, mode, text_queries != 0);
}

int arrowhead_kv_list(TokenLayout layout, int segment, int row_begin, int row_end, int mode,
                      int tile_k, int* out, int capacity) {
  const auto list =
      arrowhead::kv_list(layout, static_cast<Segment>(segment), {row_begin, row_end},
                         arrowhead::effective_mode(layout, mode), tile_k);
  if (list.size() > capacity) return -1;
  for (int i = 0; i < list.size(); ++i) {
    *out++ = static_cast<int>(list.segment(i));
    *out++ = list.tile(i);
    *out++ = list.is_masked(i);
  }
  return list.size();
}

int arrowhead_walk(TokenLayout layout, int segment, int row_begin, int row_end, int own_begin,
                   int own_end, int mode, int tile_k, int* out, int capacity) {
  mode = arrowhead::effective_mode(layout, mode);
  const auto list = [&](int begin, int end) {
    return arrowhead::kv_list(layout, static_cast<Segment>(segment), {begin, end}, mode, tile_k);
  };
  const auto walk = arrowhead::walk_of(list(row_begin, row_end), list(own_begin, own_end));
  if (walk.size() > capacity) return -1;
  for (int part = 0; part < 2; ++part) {
    *out++ = walk.visit.run[part];
    *out++ = walk.visit.skip[part];
  }
  for (int i = 0; i < walk.size(); ++i) *out++ = walk.is_masked(i);
  return walk.size();
}

void arrowhead_visible_keys(TokenLayout layout, int row_segment, int key_segment, int row,
                            int mode, int* range) {
  const Range keys = arrowhead::visible_keys(layout, static_cast<Segment>(row_segment),
                                             static_cast<Segment>(key_segment), row,
                                             arrowhead::effective_mode(layout, mode));
  range[0] = keys.begin;
  range[1] = keys.end;
}

int arrowhead_tickets(TokenLayout layout, int batch, int text_queries, int tile_q, int chunk,
                      int heads, const arrowhead::HeadTask* tasks, int* out, int capacity) {
  if (heads < 1 || heads > arrowhead::kMaxHeads) return -1;
  const auto shape = arrowhead::work_shape(layout, batch, text_queries != 0, tile_q, chunk);
  const auto mode_of = [&](int head) {
    return arrowhead::effective_mode(layout, tasks[head].mode);
  };
  static thread_local arrowhead::RunCosts costs;
  static thread_local arrowhead::RunTable table;
  table.runs = 2 * heads;
  for (int run = 0; run < table.runs; ++run) {
    costs.describe(run, mode_of(run / 2), tasks[run / 2].source, shape);
  }
  for (int run = 0; run < table.runs; ++run) table.place(costs, run);
  if (table.total > capacity) return -1;
  for (int ticket = 0; ticket < table.total; ++ticket) {
    const auto work = table.find(ticket, shape, mode_of);
    *out++ = work.head;
    *out++ = work.batch;
    *out++ = static_cast<int>(work.segment);
    *out++ = work.tile;
  }
  return table.total;
}

}  // extern "C"
