#include "attention.h"

#include <cstring>

namespace arrowhead::cpu {
namespace {

constexpr int kCopyRows = 128;
constexpr float kLog2E = 1.4426950408889634f;

}  // namespace

Attention::Attention(const AttentionParams& params)
    : params_(params),
      shape_(work_shape(params.layout, params.batch, true, kTileRows, kCopyRows)) {
  RunCosts costs;
  table_.runs = 2 * params.heads;
  table_.total = 0;
  for (int run = 0; run < table_.runs; ++run) {
    costs.describe(run, mode(run / 2), params.tasks[run / 2].source, shape_);
  }
  for (int run = 0; run < table_.runs; ++run) table_.place(costs, run);
}

std::size_t Attention::scratch_floats() const { return cpu::scratch_floats(params_.head_dim); }

int Attention::mode(int head) const {
  return effective_mode(params_.layout, params_.tasks[head].mode);
}

int Attention::offset(Segment segment) const {
  if (segment == Segment::kText) return params_.text_first ? 0 : params_.layout.image_tokens;
  return params_.text_first ? params_.layout.text_tokens : 0;
}

void Attention::run(int ticket, float* scratch) const {
  const Work work = table_.find(ticket, shape_, [this](int head) { return mode(head); });
  if (mode(work.head) == kCached) {
    copy(work);
  } else {
    attend(work, scratch);
  }
}

void Attention::attend(const Work& work, float* scratch) const {
  const TokenLayout& layout = params_.layout;
  const std::int64_t seq_len = layout.image_tokens + layout.text_tokens;
  const int first_row = work.tile * kTileRows;  // inside its segment
  const std::int64_t row = work.batch * seq_len + offset(work.segment) + first_row;
  const std::int64_t head = std::int64_t{params_.tasks[work.head].source} * params_.head_dim;

  Tile tile{};
  tile.head_dim = params_.head_dim;
  tile.scale_log2 = params_.scale * kLog2E;
  tile.rows = min_of(kTileRows, layout.tokens(work.segment) - first_row);
  tile.token_stride = std::int64_t{params_.qkv_heads} * params_.head_dim;
  tile.out_stride = std::int64_t{params_.heads} * params_.head_dim;
  const std::int64_t sequence = work.batch * seq_len * tile.token_stride + head;
  tile.q = params_.q + row * tile.token_stride + head;
  tile.k = params_.k + sequence;
  tile.v = params_.v + sequence;
  tile.out = params_.out + row * tile.out_stride + std::int64_t{work.head} * params_.head_dim;

  if (mode(work.head) == kFull || work.segment == Segment::kText) {
    tile.shared = {0, static_cast<int>(seq_len)};
  } else {
    const int text = offset(Segment::kText);
    tile.shared = {text, text + layout.text_tokens};
    for (int strip = 0; strip * kStripRows < tile.rows; ++strip) {
      const int begin = first_row + strip * kStripRows;
      const int end = min_of(begin + kStripRows, layout.image_tokens);
      tile.bands[strip] = band({begin, end}, mode(work.head));
    }
  }
  tile_kernel().attend(tile, scratch);
}

Band Attention::band(Range rows, int half_window) const {
  const int image = offset(Segment::kImage);
  Band band;
  for (int i = 0; i < kStripRows; ++i) {
    const int row = min_of(rows.begin + i, rows.end - 1);
    const Range keys = arrow_kv_tokens(params_.layout, row, half_window);
    band.first[i] = image + keys.begin;
    band.last[i] = image + keys.end;
  }
  // Windows move with the rows: the outer ones bound what some see, the inner ones what all see.
  constexpr int kLast = kStripRows - 1;
  band.keys = {band.first[0], band.last[kLast]};
  band.open = {band.first[kLast], band.last[0]};
  return band;
}

void Attention::copy(const Work& work) const {
  const TokenLayout& layout = params_.layout;
  const std::int64_t seq_len = layout.image_tokens + layout.text_tokens;
  const int begin = work.tile * kCopyRows;
  const int rows = min_of(kCopyRows, layout.tokens(work.segment) - begin);
  const std::int64_t row = work.batch * seq_len + offset(work.segment) + begin;
  const int head_dim = params_.head_dim;
  const std::int64_t from_stride = std::int64_t{params_.cache_heads} * head_dim;
  const std::int64_t to_stride = std::int64_t{params_.heads} * head_dim;
  const int source = params_.tasks[work.head].source;
  const float* from = params_.cache + row * from_stride + std::int64_t{source} * head_dim;
  float* to = params_.out + row * to_stride + std::int64_t{work.head} * head_dim;
  for (int i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
    std::memcpy(to, from, sizeof(float) * head_dim);
  }
}

}  // namespace arrowhead::cpu
