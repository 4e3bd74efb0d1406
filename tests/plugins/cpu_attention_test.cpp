// The CPU kernel against attention written out in double, on random problems. Built with the
// sanitizers by test_cpu_attention.py; tensors end where their heap blocks end, so that a load or
// store beside them is seen.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention.h"

namespace {

using namespace arrowhead;
using Tensor = std::vector<float>;

struct Case {
  int image, text, block, batch, head_dim;
  bool text_first;
  std::vector<int> half_windows;  // of the computed heads
  int cache_heads;
  std::vector<int> source;  // of the output heads
};

struct Inputs {
  Tensor q, k, v, cache;
};

int seq_len(const Case& c) { return c.image + c.text; }

std::size_t at(const Case& c, int heads, int batch, int token, int head) {
  return ((std::size_t(batch) * seq_len(c) + token) * heads + head) * c.head_dim;
}

bool sees(const Case& c, int half_window, int row, int key) {
  const int offset = c.text_first ? c.text : 0;
  const auto is_image = [&](int token) { return token >= offset && token < offset + c.image; };
  if (half_window < 0 || !is_image(row) || !is_image(key)) return true;
  const int distance = (row - offset) / c.block - (key - offset) / c.block;
  return std::abs(distance) <= half_window;
}

/// One output row in double.
std::vector<double> expected_row(const Case& c, const Inputs& in, double scale, int batch, int row,
                                 int head) {
  const int heads = static_cast<int>(c.half_windows.size());
  const float* q = in.q.data() + at(c, heads, batch, row, head);
  std::vector<double> sum(c.head_dim, 0.0);
  std::vector<double> logits(seq_len(c));
  double max = -std::numeric_limits<double>::infinity();
  for (int key = 0; key < seq_len(c); ++key) {
    const float* k = in.k.data() + at(c, heads, batch, key, head);
    logits[key] = 0;
    for (int d = 0; d < c.head_dim; ++d) logits[key] += double(q[d]) * k[d];
    logits[key] *= scale;
    if (sees(c, c.half_windows[head], row, key)) max = std::fmax(max, logits[key]);
  }
  double total = 0;
  for (int key = 0; key < seq_len(c); ++key) {
    if (!sees(c, c.half_windows[head], row, key)) continue;
    const double p = std::exp(logits[key] - max);
    const float* v = in.v.data() + at(c, heads, batch, key, head);
    for (int d = 0; d < c.head_dim; ++d) sum[d] += p * v[d];
    total += p;
  }
  for (double& x : sum) x /= total;
  return sum;
}

Tensor run(const Case& c, const Inputs& in, float scale) {
  const int heads = static_cast<int>(c.half_windows.size());
  cpu::AttentionParams params{};
  params.layout = {c.image, c.text, c.block};
  params.text_first = c.text_first;
  params.batch = c.batch;
  params.heads = static_cast<int>(c.source.size());
  params.qkv_heads = heads;
  params.cache_heads = c.cache_heads;
  params.head_dim = c.head_dim;
  params.scale = scale;
  params.q = in.q.data();
  params.k = in.k.data();
  params.v = in.v.data();
  params.cache = in.cache.data();
  Tensor out(std::size_t(c.batch) * seq_len(c) * params.heads * c.head_dim, NAN);
  params.out = out.data();
  for (int i = 0; i < params.heads; ++i) {
    const int from = c.source[i];
    params.tasks[i] = from < heads ? HeadTask{c.half_windows[from], from, -1}
                                   : HeadTask{kCached, from - heads, -1};
  }
  const cpu::Attention attention(params);
  Tensor scratch(attention.scratch_floats(), NAN);
  // Backwards: the order of the tickets is for speed alone.
  for (int ticket = attention.tickets() - 1; ticket >= 0; --ticket) {
    attention.run(ticket, scratch.data());
  }
  return out;
}

/// The greatest difference from the truth.
double error_of(const Case& c, const Inputs& in, float scale) {
  const Tensor out = run(c, in, scale);
  const int heads = static_cast<int>(c.half_windows.size());
  const int out_heads = static_cast<int>(c.source.size());
  double worst = 0;
  for (int batch = 0; batch < c.batch; ++batch) {
    for (int row = 0; row < seq_len(c); ++row) {
      for (int head = 0; head < out_heads; ++head) {
        const float* got = out.data() + at(c, out_heads, batch, row, head);
        const int from = c.source[head];
        std::vector<double> want;
        if (from < heads) {
          want = expected_row(c, in, scale, batch, row, from);
        } else {
          const float* cached = in.cache.data() + at(c, c.cache_heads, batch, row, from - heads);
          want.assign(cached, cached + c.head_dim);
        }
        for (int d = 0; d < c.head_dim; ++d) {
          const double error = std::fabs(got[d] - want[d]);
          if (!(error <= worst)) worst = error;  // NaN, a place not written, is the worst
        }
      }
    }
  }
  return worst;
}

}  // namespace

int main() {
  std::mt19937 random(20240607);
  const auto pick = [&](std::vector<int> from) { return from[random() % from.size()]; };
  std::normal_distribution<float> normal;
  double worst = 0;
  for (int i = 0; i < 120; ++i) {
    Case c{pick({0, 1, 31, 32, 33, 50, 96, 137}), pick({0, 1, 7, 32, 40}),
           pick({1, 3, 16, 32, 50, 128, 1 << 28}), pick({1, 2}), pick({1, 3, 8, 20, 64, 128}),
           random() % 2 == 0, {}, pick({0, 1, 2}), {}};
    if (seq_len(c) == 0) c.text = 5;
    for (int head = pick({1, 2, 3}); head > 0; --head) {
      c.half_windows.push_back(pick({-1, 0, 1, 2, 5, 1 << 28}));
    }
    const int sources = static_cast<int>(c.half_windows.size()) + c.cache_heads;
    for (int head = pick({1, 2, 4}); head > 0; --head) c.source.push_back(random() % sources);
    const auto tensor = [&](std::size_t heads) {
      Tensor x(std::size_t(c.batch) * seq_len(c) * heads * c.head_dim);
      for (float& value : x) value = normal(random);
      return x;
    };
    const std::size_t heads = c.half_windows.size();
    const Inputs in{tensor(heads), tensor(heads), tensor(heads), tensor(c.cache_heads)};
    // Every other case has logits of some hundreds, as trained models have.
    const float scale = (i % 2 ? 0.5f : 30.f) / std::sqrt(float(c.head_dim));
    const double error = error_of(c, in, scale);
    if (!(error <= worst)) worst = error;
  }
  std::printf("%s: %.2g\n", cpu::tile_kernel().name, worst);
  return worst < 1e-4 ? 0 : 1;
}
