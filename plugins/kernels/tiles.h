// Tile arithmetic of arrow attention: names and meaning as in plans/tiles.py, for host and device.
//
// Letters: B batch, V image tokens, T text tokens, H heads, D head_dim. Text and image are two
// *segments* with tiles of their own, so no tile straddles them and token order does not matter
// here. Ranges are half open.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ARROWHEAD_HD __host__ __device__ __forceinline__
#else
#define ARROWHEAD_HD inline
#endif

namespace arrowhead {

constexpr int kCached = -2;
constexpr int kFull = -1;  // modes >= 0 are arrow heads: the half window in blocks

ARROWHEAD_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
ARROWHEAD_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }
ARROWHEAD_HD constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

struct Range {
  int begin;
  int end;
  ARROWHEAD_HD constexpr int size() const { return end > begin ? end - begin : 0; }
  ARROWHEAD_HD constexpr bool contains(int i) const { return begin <= i && i < end; }
};

enum class Segment : int { kText = 0, kImage = 1 };

struct TokenLayout {
  int image_tokens;
  int text_tokens;
  int block;

  /// Image blocks; the last may be short.
  ARROWHEAD_HD constexpr int blocks() const { return ceil_div(image_tokens, block); }
  ARROWHEAD_HD constexpr int tokens(Segment segment) const {
    return segment == Segment::kText ? text_tokens : image_tokens;
  }
};

/// The image key blocks that one image query block attends.
ARROWHEAD_HD constexpr Range arrow_kv_blocks(TokenLayout layout, int q_block, int half_window) {
  return {max_of(0, q_block - half_window), min_of(layout.blocks(), q_block + half_window + 1)};
}

/// A window that reaches every block is FULL at the same price, and needs no mask.
ARROWHEAD_HD constexpr int effective_mode(TokenLayout layout, int mode) {
  return mode >= 0 && mode >= layout.blocks() - 1 ? kFull : mode;
}

/// The image keys that one image row attends in an arrow head.
ARROWHEAD_HD constexpr Range arrow_kv_tokens(TokenLayout layout, int row, int half_window) {
  const Range blocks = arrow_kv_blocks(layout, row / layout.block, half_window);
  return {blocks.begin * layout.block, min_of(blocks.end * layout.block, layout.image_tokens)};
}

/// The query/key pairs one head computes in `mode`; text_queries=false leaves text rows out.
ARROWHEAD_HD constexpr std::int64_t kept_pairs(TokenLayout layout, int mode, bool text_queries) {
  if (mode == kCached) return 0;
  const std::int64_t seq_len = layout.image_tokens + layout.text_tokens;
  const std::int64_t text_rows = text_queries ? layout.text_tokens : 0;
  if (mode == kFull) return (layout.image_tokens + text_rows) * seq_len;
  std::int64_t pairs = text_rows * seq_len;
  for (int q_block = 0; q_block < layout.blocks(); ++q_block) {
    const int first_row = q_block * layout.block;
    const int rows = min_of(layout.block, layout.image_tokens - first_row);
    const Range keys = arrow_kv_tokens(layout, first_row, mode);
    pairs += std::int64_t{rows} * (keys.size() + layout.text_tokens);
  }
  return pairs;
}

/// The key tiles of some query rows: text tiles from tile 0, then one run of image tiles.
/// Tiles outside `open` hold keys that some of the rows must not see: they need a mask.
struct KvList {
  int text_tiles;
  int text_open;
  Range image;
  Range image_open;

  ARROWHEAD_HD constexpr int size() const { return text_tiles + image.size(); }
  ARROWHEAD_HD constexpr Segment segment(int i) const {
    return i < text_tiles ? Segment::kText : Segment::kImage;
  }
  ARROWHEAD_HD constexpr int tile(int i) const {
    return i < text_tiles ? i : image.begin + (i - text_tiles);
  }
  ARROWHEAD_HD constexpr bool is_masked(int i) const {
    return i < text_tiles ? i >= text_open : !image_open.contains(tile(i));
  }
};

/// List the key tiles of query rows `rows` of `segment`. Rows past the segment's end do not count;
/// no rows, no tiles. `mode` is kFull or a half window.
ARROWHEAD_HD constexpr KvList kv_list(TokenLayout layout, Segment segment, Range rows, int mode,
                                      int tile_k) {
  const int last_row = min_of(rows.end, layout.tokens(segment)) - 1;
  if (last_row < rows.begin) return {0, 0, {0, 0}, {0, 0}};
  Range any{0, layout.image_tokens};  // keys that at least one row sees
  Range all = any;                    // keys that every row sees
  if (segment == Segment::kImage && mode >= 0) {
    const Range first = arrow_kv_tokens(layout, rows.begin, mode);
    const Range last = arrow_kv_tokens(layout, last_row, mode);
    any = {first.begin, last.end};
    all = {last.begin, first.end};
  }
  const Range open{ceil_div(all.begin, tile_k), all.end / tile_k};
  return {ceil_div(layout.text_tokens, tile_k), layout.text_tokens / tile_k,
          Range{any.begin / tile_k, ceil_div(any.end, tile_k)},
          Range{open.begin, max_of(open.begin, open.end)}};
}

/// The keys of segment `keys` that row `row` of segment `rows` attends.
ARROWHEAD_HD constexpr Range visible_keys(TokenLayout layout, Segment rows, Segment keys, int row,
                                          int mode) {
  if (mode < 0 || rows == Segment::kText || keys == Segment::kText) {
    return {0, layout.tokens(keys)};
  }
  return arrow_kv_tokens(layout, row, mode);
}

/// How some rows of a query tile walk the whole tile's list: compute `run[0]` tiles, pass over
/// `skip[0]` that none of the rows sees, compute `run[1]`, pass over `skip[1]`.
struct Visit {
  int run[2];
  int skip[2];
};

/// `own` lists a part of the rows that `whole` lists.
ARROWHEAD_HD constexpr Visit visit_of(const KvList& whole, const KvList& own) {
  if (own.size() == 0) return {{0, 0}, {whole.size(), 0}};
  const int before = own.image.size() ? own.image.begin - whole.image.begin : 0;
  const int after = whole.image.size() - before - own.image.size();
  if (before == 0) return {{own.size(), 0}, {0, after}};
  return {{own.text_tiles, own.image.size()}, {before, after}};
}

/// A part's way through the whole tile's list. Its own tiles are counted without what it passes
/// over; those below open[0], and from open[1] to open[2] - 1, need no mask.
struct Walk {
  Visit visit;
  int open[3];

  ARROWHEAD_HD constexpr int size() const { return visit.run[0] + visit.run[1]; }
  ARROWHEAD_HD constexpr bool is_masked(int i) const {
    return i >= open[0] && (i < open[1] || i >= open[2]);
  }
};

ARROWHEAD_HD constexpr Walk walk_of(const KvList& whole, const KvList& own) {
  const int image = own.text_tiles - own.image.begin;
  return {visit_of(whole, own),
          {own.text_open, image + own.image_open.begin, image + own.image_open.end}};
}

}  // namespace arrowhead
