// Products of small row-major float matrices that lie in scratch memory.
//
// One register tile of PANEL rows by one or two vectors; no packing, since the operands are already
// dense and in cache. Row counts are rounded up to whole panels: `out` and `a` need that room, what
// the extra rows hold does not matter. Columns come in whole vectors.
#pragma once

#include <algorithm>
#include <utility>

#include "vec.h"

namespace effpass {

// PANEL * 2 accumulators: the two FMA units need 8 in flight, AVX2 has 16 registers, AVX-512 has 32.
#if defined(__AVX512F__)
constexpr int PANEL = 8;
#else
constexpr int PANEL = 4;
#endif
constexpr int64_t ROUND = 8;  // row counts are padded to this; a multiple of every PANEL

inline int64_t round_up(int64_t count, int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

// Which part of a product is wanted. A triangle is kept exactly: what lies beyond it is not read, so
// a NaN there stays there.
enum class Part {
    ALL,
    LOWER,     // out[i] sums k <= i only
    UPPER,     // out[i] sums k >= i only
    OUT_UPPER  // out[i][j] is wanted for j >= i only
};

// out[i][j] = beta * init[i][j] + row_scale[i] * sum_k a[i * row_step + k * k_step] * b[k][j]
// One of a's steps must be 1.
struct Product {
    float* out;
    int64_t out_step;
    int64_t rows, columns, depth;
    const float *a;
    int64_t row_step, k_step;
    const float* b;
    int64_t b_step;
    const float* init = nullptr;       // zeros when null; out's steps; may be out
    float beta = 1;
    const float* row_scale = nullptr;  // all ones
    Part part = Part::ALL;
};

template <int VECTORS, bool ROWS_ADJACENT> struct Tile {
    F sums[PANEL][VECTORS];
    const float *a, *b;
    int64_t a_step, b_step;  // a's step along rows, or along k when rows are adjacent

    inline __attribute__((always_inline)) float a_at(int64_t row, int64_t k) const {
        return ROWS_ADJACENT ? a[row + k * a_step] : a[row * a_step + k];
    }

    inline __attribute__((always_inline)) void step(int64_t k, int first, int last) {
        F columns[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) columns[v] = load(b + k * b_step + v * W);
#pragma GCC unroll 8
        for (int row = first; row < last; row++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] = fma(splat(a_at(row, k)), columns[v], sums[row][v]);
    }
};

template <int VECTORS, bool ROWS_ADJACENT>
__attribute__((noinline)) void tile(const Product& p, int64_t row, int64_t column) {
    Tile<VECTORS, ROWS_ADJACENT> t;
    t.a_step = ROWS_ADJACENT ? p.k_step : p.row_step;
    t.a = p.a + (ROWS_ADJACENT ? row : row * t.a_step);
    t.b = p.b + column;
    t.b_step = p.b_step;
#pragma GCC unroll 8
    for (int r = 0; r < PANEL; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) t.sums[r][v] = F{};
    int64_t begin = p.part == Part::UPPER ? std::min(row + PANEL, p.depth) : 0;
    int64_t end = p.part == Part::LOWER ? std::min(row, p.depth) : p.depth;
    for (int64_t k = begin; k < end; k++) t.step(k, 0, PANEL);
    if (p.part == Part::LOWER) {
#pragma GCC unroll 8
        for (int d = 0; d < PANEL; d++)
            if (row + d < p.depth) t.step(row + d, d, PANEL);
    } else if (p.part == Part::UPPER) {
#pragma GCC unroll 8
        for (int d = 0; d < PANEL; d++)
            if (row + d < p.depth) t.step(row + d, 0, d + 1);
    }
    F beta = splat(p.beta);
#pragma GCC unroll 8
    for (int r = 0; r < PANEL; r++) {
        int64_t at = (row + r) * p.out_step + column;
        F scale = splat(p.row_scale ? p.row_scale[row + r] : 1.0f);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            F sum = t.sums[r][v] * scale;
            if (p.init) sum = fma(beta, load(p.init + at + v * W), sum);
            store(p.out + at + v * W, sum);
        }
    }
}

template <bool ROWS_ADJACENT> void multiply_tiles(const Product& p) {
    int64_t column = 0;
    for (; column + 2 * W <= p.columns; column += 2 * W)
        for (int64_t row = 0; row < p.rows; row += PANEL)
            if (p.part != Part::OUT_UPPER || row < column + 2 * W)
                tile<2, ROWS_ADJACENT>(p, row, column);
    for (; column < p.columns; column += W)
        for (int64_t row = 0; row < p.rows; row += PANEL)
            if (p.part != Part::OUT_UPPER || row < column + W)
                tile<1, ROWS_ADJACENT>(p, row, column);
}

inline void multiply(const Product& p) {
    if (p.row_step == 1) multiply_tiles<true>(p);
    else multiply_tiles<false>(p);
}

// Of lanes i and i ^ BIT of two rows: where a lane of the result comes from, b's lanes counted from W.
template <int BIT, bool SET> constexpr int32_t lane_of(int32_t lane) {
    return (lane & BIT ? W : 0) + (SET ? lane | BIT : lane & ~BIT);
}

template <int BIT, bool SET, size_t... LANE>
inline F interleave(F a, F b, std::index_sequence<LANE...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, lane_of<BIT, SET>(LANE)...);
#else
    return __builtin_shuffle(a, b, I{lane_of<BIT, SET>(LANE)...});
#endif
}

template <int BIT> inline void transpose_step(F* rows) {
    constexpr std::make_index_sequence<W> lanes;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & BIT)) {
            F a = rows[i], b = rows[i | BIT];
            rows[i] = interleave<BIT, false>(a, b, lanes);
            rows[i | BIT] = interleave<BIT, true>(a, b, lanes);
        }
}

inline void transpose_block(float* to, int64_t to_step, const float* from, int64_t from_step) {
    F rows[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = load(from + i * from_step);
    transpose_step<1>(rows);
    transpose_step<2>(rows);
    if constexpr (W > 4) transpose_step<4>(rows);
    if constexpr (W > 8) transpose_step<8>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) store(to + i * to_step, rows[i]);
}

// to[j][i] = from[i][j] for i < rows, j < columns.
inline void transpose(float* to, int64_t to_step, const float* from, int64_t from_step,
                      int64_t rows, int64_t columns) {
    int64_t full_rows = rows / W * W, full_columns = columns / W * W;
    for (int64_t i = 0; i < full_rows; i += W)
        for (int64_t j = 0; j < full_columns; j += W)
            transpose_block(to + j * to_step + i, to_step, from + i * from_step + j, from_step);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < full_rows ? full_columns : 0; j < columns; j++)
            to[j * to_step + i] = from[i * from_step + j];
}

}  // namespace effpass
