// The tile kernel: attention with a running maximum, for one instruction set.
//
// Vector lanes are queries. Scores are held as [key][query] and the output as [d][query], so
// maximum, sum and mask are lane by lane and nothing is reduced across a vector. Both products
// have one form, a tile of C[row][query] += A[row][k] * B[k][query] in registers: A is K or V as
// the caller has it, B is the transposed queries or the probabilities, small and in L1.
//
// Included by tile.cpp once for each instruction set, with ARROWHEAD_ISA, ARROWHEAD_VECTOR_BYTES
// and ARROWHEAD_REGISTER_ROWS.
#define ARROWHEAD_STRING(x) #x
#define ARROWHEAD_NAME(x) ARROWHEAD_STRING(x)
#define ARROWHEAD_INLINE inline __attribute__((always_inline))

namespace arrowhead::cpu {
namespace ARROWHEAD_ISA {
namespace {

typedef float Floats __attribute__((vector_size(ARROWHEAD_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(ARROWHEAD_VECTOR_BYTES)));
typedef std::uint32_t Bits __attribute__((vector_size(ARROWHEAD_VECTOR_BYTES)));

constexpr int kLanes = ARROWHEAD_VECTOR_BYTES / 4;
constexpr int kWidth = 2 * kLanes;  // queries that are computed together: a pair of vectors
constexpr int kStripPairs = kStripRows / kWidth;
constexpr int kRegisterRows = ARROWHEAD_REGISTER_ROWS;  // rows of C in registers, a power of two
constexpr float kMasked = -1e30f;  // finite, so that a row that sees no key of a chunk gives no NaN

static_assert(kStripPairs * kWidth == kStripRows, "a strip is whole pairs of vectors");
static_assert((kRegisterRows & (kRegisterRows - 1)) == 0, "what is left is split into halves");

ARROWHEAD_INLINE Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

ARROWHEAD_INLINE void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }

struct Pair {
  Floats low, high;
};

ARROWHEAD_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

ARROWHEAD_INLINE void store_pair(float* p, Pair x) {
  store(p, x.low);
  store(p + kLanes, x.high);
}

/// C[row][query] = C[row][query] * correction[query] + sum over k of A[row][k] * B[k][query].
/// A's element (row, k) lies at a[row * a_row + k * a_k].
template <int Rows>
ARROWHEAD_INLINE void multiply_tile(const float* __restrict a, std::int64_t a_row,
                                    std::int64_t a_k, const float* __restrict b, int size_k,
                                    const Pair* correction, float* __restrict c) {
  Floats low[Rows];
  Floats high[Rows];
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    low[row] = high[row] = Floats{};
    if (correction) {
      low[row] = load(c + row * kWidth) * correction->low;
      high[row] = load(c + row * kWidth + kLanes) * correction->high;
    }
  }
  for (int k = 0; k < size_k; ++k) {
    const Floats b_low = load(b + k * kWidth);
    const Floats b_high = load(b + k * kWidth + kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const float element = a[row * a_row + k * a_k];
      low[row] += element * b_low;
      high[row] += element * b_high;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    store(c + row * kWidth, low[row]);
    store(c + row * kWidth + kLanes, high[row]);
  }
}

/// The same for any number of rows.
template <int Rows>
ARROWHEAD_INLINE void multiply(const float* a, std::int64_t a_row, std::int64_t a_k,
                               const float* b, int size_k, const Pair* correction, float* c,
                               int rows) {
  for (; rows >= Rows; rows -= Rows, a += Rows * a_row, c += Rows * kWidth) {
    multiply_tile<Rows>(a, a_row, a_k, b, size_k, correction, c);
  }
  if constexpr (Rows > 1) {
    if (rows > 0) multiply<Rows / 2>(a, a_row, a_k, b, size_k, correction, c, rows);
  }
}

/// 2^x for x <= 0, to 2 units in the last place; 0 below 2^-126; NaN stays NaN.
ARROWHEAD_INLINE Floats exp2_of(Floats x) {
  const float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  const Floats shifted = x + kRound;
  const Floats f = x - (shifted - kRound);  // -0.5 .. 0.5
  // Least maximum relative error on [-0.5, 0.5]: 2e-8 before rounding.
  Floats p = f * 1.535336188e-4f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1.0f;
  const Floats power = (Floats)((Bits)p + ((Bits)shifted << 23));
  return x < -126.f ? Floats{} : power;
}

/// Set the scores of keys begin .. end - 1 that a query does not see. `first` and `last` are
/// those of the pair's queries.
ARROWHEAD_INLINE void mask(const std::int32_t* first, const std::int32_t* last, int begin, int end,
                           float* scores) {
  for (int half = 0; half < 2; ++half) {
    Ints from;
    Ints to;
    __builtin_memcpy(&from, first + half * kLanes, sizeof from);
    __builtin_memcpy(&to, last + half * kLanes, sizeof to);
    float* at = scores + half * kLanes;
    for (int key = begin; key < end; ++key, at += kWidth) {
      const Ints seen = (from <= key) & (to > key);
      store(at, seen ? load(at) : Floats{} + kMasked);
    }
  }
}

/// The running state of a pair of vectors, one lane a query.
struct State {
  Pair max;
  Pair sum;
};

/// Turn the scores of some keys into probabilities. Gives what the output so far must be
/// multiplied with.
ARROWHEAD_INLINE Pair softmax(State& state, float* scores, int keys) {
  Pair max = state.max;
  for (int key = 0; key < keys; ++key) {
    const Pair s = load_pair(scores + key * kWidth);
    max.low = s.low > max.low ? s.low : max.low;
    max.high = s.high > max.high ? s.high : max.high;
  }
  const Pair correction{exp2_of(state.max.low - max.low), exp2_of(state.max.high - max.high)};
  Pair sum{state.sum.low * correction.low, state.sum.high * correction.high};
  for (int key = 0; key < keys; ++key) {
    const Pair s = load_pair(scores + key * kWidth);
    const Pair p{exp2_of(s.low - max.low), exp2_of(s.high - max.high)};
    store_pair(scores + key * kWidth, p);
    sum.low += p.low;
    sum.high += p.high;
  }
  state = {max, sum};
  return correction;
}

/// to[column][row] = from[row][column] * scale, in squares of four.
ARROWHEAD_INLINE void transpose(const float* __restrict from, std::int64_t from_stride, int rows,
                                int columns, float scale, float* __restrict to,
                                std::int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  const int row_squares = rows / 4 * 4;
  const int column_squares = columns / 4 * 4;
  for (int row = 0; row < row_squares; row += 4) {
    for (int column = 0; column < column_squares; column += 4) {
      Four in[4];
      for (int i = 0; i < 4; ++i) {
        __builtin_memcpy(&in[i], from + (row + i) * from_stride + column, sizeof(Four));
      }
      for (int i = 0; i < 4; ++i) {
        const Four out = Four{in[0][i], in[1][i], in[2][i], in[3][i]} * scale;
        __builtin_memcpy(to + (column + i) * to_stride + row, &out, sizeof(Four));
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int column = row < row_squares ? column_squares : 0; column < columns; ++column) {
      to[column * to_stride + row] = from[row * from_stride + column] * scale;
    }
  }
}

/// Write the queries as [pair][d][query], times the scale. The rest of q_t is left.
ARROWHEAD_INLINE void load_queries(const Tile& tile, float* q_t) {
  for (int row = 0; row < tile.rows; row += kWidth) {
    transpose(tile.q + row * tile.token_stride, tile.token_stride,
              min_of(kWidth, tile.rows - row), tile.head_dim, tile.scale_log2,
              q_t + row * tile.head_dim, kWidth);
  }
}

/// Divide [pair][d][query] by the queries' sums and write it as rows of the output.
ARROWHEAD_INLINE void store_output(const Tile& tile, const State* state, float* o_t) {
  for (int row = 0; row < tile.rows; row += kWidth, ++state) {
    const Pair inverse{1.f / state->sum.low, 1.f / state->sum.high};
    float* pair = o_t + row * tile.head_dim;
    for (int d = 0; d < tile.head_dim; ++d) {
      const Pair o = load_pair(pair + d * kWidth);
      store_pair(pair + d * kWidth, {o.low * inverse.low, o.high * inverse.high});
    }
    transpose(pair, kWidth, tile.head_dim, min_of(kWidth, tile.rows - row), 1.f,
              tile.out + row * tile.out_stride, tile.out_stride);
  }
}

/// What a tile needs beside its tensors.
struct Work {
  float* q_t;     // [pair][d][query]
  float* o_t;     // [pair][d][query]
  float* scores;  // [key][query] of one pair
  State state[kTileRows / kWidth];
};

/// One pair of the tile against keys begin .. end - 1, at most kChunk. `band`: the strip's, if the
/// keys may need its mask.
ARROWHEAD_INLINE void attend_chunk(const Tile& tile, const Band* band, int pair, int begin, int end,
                                   Work& work) {
  const float* k = tile.k + begin * tile.token_stride;
  const float* v = tile.v + begin * tile.token_stride;
  const float* q_t = work.q_t + pair * tile.head_dim * kWidth;
  float* o_t = work.o_t + pair * tile.head_dim * kWidth;
  const int keys = end - begin;
  multiply<kRegisterRows>(k, tile.token_stride, 1, q_t, tile.head_dim, nullptr, work.scores, keys);
  if (band) {
    const std::int32_t* first = band->first + pair % kStripPairs * kWidth;
    const std::int32_t* last = band->last + pair % kStripPairs * kWidth;
    const int left = min_of(end, band->open.begin);
    const int right = max_of(begin, max_of(left, band->open.end));
    mask(first, last, begin, left, work.scores);
    mask(first, last, right, end, work.scores + (right - begin) * kWidth);
  }
  const Pair correction = softmax(work.state[pair], work.scores, keys);
  multiply<kRegisterRows>(v, 1, tile.token_stride, work.scores, keys, &correction, o_t,
                          tile.head_dim);
}

/// A run of keys for some pairs of the tile, chunk after chunk: all pairs use a chunk while it is
/// near. Chunks have about one size: a short last one would cost as many corrections.
ARROWHEAD_INLINE void attend_run(const Tile& tile, Range keys, const Band* band, Range pairs,
                                 Work& work) {
  const int chunks = ceil_div(keys.size(), kChunk);
  const auto place = [&](int chunk) {
    return keys.begin + static_cast<int>(std::int64_t{keys.size()} * chunk / chunks);
  };
  for (int chunk = 0; chunk < chunks; ++chunk) {
    for (int pair = pairs.begin; pair < pairs.end; ++pair) {
      attend_chunk(tile, band, pair, place(chunk), place(chunk + 1), work);
    }
  }
}

void attend(const Tile& tile, float* scratch) {
  const int pairs = ceil_div(tile.rows, kWidth);
  const int floats = pairs * kWidth * tile.head_dim;
  Work work{scratch, scratch + floats, scratch + 2 * floats, {}};
  // Queries that the last pair lacks are zero: what is computed for them is dropped.
  __builtin_memset(scratch, 0, sizeof(float) * 2 * floats);
  load_queries(tile, work.q_t);
  const Floats lowest = Floats{} - __builtin_inff();
  for (State& state : work.state) state.max = {lowest, lowest};

  attend_run(tile, tile.shared, nullptr, {0, pairs}, work);
  for (int strip = 0; strip < ceil_div(tile.rows, kStripRows); ++strip) {
    const Band& band = tile.bands[strip];
    const int first = strip * kStripPairs;
    attend_run(tile, band.keys, &band, {first, min_of(first + kStripPairs, pairs)}, work);
  }
  store_output(tile, work.state, work.o_t);
}

}  // namespace

constexpr TileKernel kernel{ARROWHEAD_NAME(ARROWHEAD_ISA), attend};

}  // namespace ARROWHEAD_ISA
}  // namespace arrowhead::cpu

#undef ARROWHEAD_INLINE
#undef ARROWHEAD_NAME
#undef ARROWHEAD_STRING
#undef ARROWHEAD_REGISTER_ROWS
#undef ARROWHEAD_VECTOR_BYTES
#undef ARROWHEAD_ISA
