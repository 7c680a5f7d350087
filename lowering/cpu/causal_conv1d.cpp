// The short causal depthwise convolution and its gradient. See effpass/ops/causal_conv1d.py.
//
// Lanes are W neighbouring channels. A tile of tokens is staged as floats together with the w-1 tokens
// before it (of the sequence, or of its initial state), so the arithmetic knows no borders.
#include "denormals.h"
#include "share.h"

using namespace effpass;

// Field by field as in causal_conv1d.py.
struct Conv {
    Rows x;
    const float *weight, *bias, *start;  // (c, w), (c), (s, c, w-1); the last two may be null
    int64_t silu;
    Sequences sequences;
    int64_t channels, width, threads;
};
struct ForwardOut {
    Rows y, final_state;  // final_state (s, c, w-1): a channel is its "token"
};
struct BackwardOut {
    Rows grad_y;
    const float* grad_final;           // (s, c, w-1)
    Rows dx;
    float *dweight, *dbias, *dstart;  // contiguous; the last two may be null
};

namespace {

constexpr int64_t TILE = 32;  // tokens staged at once

// `count` channels from `channel`; tokens [first, end) of a sequence of `length`.
struct Piece {
    int64_t sequence, batch, begin, length, channel, count, first, end;
};

Piece piece_at(const Conv& s, int64_t sequence, int64_t block, int64_t first) {
    const Sequences& all = s.sequences;
    int64_t channel = block * W, left = s.channels - channel, length = all.length(sequence);
    int64_t end = first + TILE < length ? first + TILE : length;
    return {sequence, all.batch(sequence), all.begin(sequence), length,
            channel,  left < W ? left : W, first,               end};
}

// (c, columns) memory, one column of a block's channels.
F load_column(const float* from, int64_t columns, int64_t column, const Piece& p) {
    float lanes[W] = {};
    for (int64_t i = 0; i < p.count; i++) lanes[i] = from[(p.channel + i) * columns + column];
    return load(lanes);
}
void store_column(float* to, int64_t columns, int64_t column, const Piece& p, F v) {
    for (int64_t i = 0; i < p.count; i++) to[(p.channel + i) * columns + column] = v[i];
}

// Column of an array (s, c, w-1).
inline const float* states_of(const Conv& s, const float* from, const Piece& p) {
    return from + p.sequence * s.channels * (s.width - 1);
}

// The input at any token of the sequence; before its first: the initial state.
F input(const Conv& s, const Piece& p, int64_t token) {
    if (token >= 0) return s.x.load(p.batch, p.begin + token, p.channel, p.count);
    if (!s.start) return F{};
    return load_column(states_of(s, s.start, p), s.width - 1, token + s.width - 1, p);
}

// Inputs of tokens [p.first - (w-1), end) to window[0], window[W], ...
void stage(const Conv& s, const Piece& p, int64_t end, float* window) {
    for (int64_t t = p.first - s.width + 1; t < end; t++, window += W)
        store(window, input(s, p, t));
}

void stage_weights(const Conv& s, const Piece& p, float* weights) {
    for (int64_t j = 0; j < s.width; j++)
        store(weights + j * W, load_column(s.weight, s.width, j, p));
}

// bias + sum over j of weights[j] row[j]; K is the width, or 0 when only known at run time.
template <int K>
inline F convolve(const float* row, const float* weights, F bias, int64_t width) {
    for (int64_t j = 0; j < (K ? K : width); j++)
        bias = fma(load(row + j * W), load(weights + j * W), bias);
    return bias;
}

inline F bias_of(const Conv& s, const Piece& p) {
    return s.bias ? load(s.bias + p.channel, p.count) : F{};
}

// ---- forward -------------------------------------------------------------------------------------

template <int K>
void forward_tile(const Conv& s, const Piece& p, const Rows& y, float* window, const float* weights) {
    stage(s, p, p.end, window);
    F bias = bias_of(s, p);
    for (int64_t t = p.first; t < p.end; t++, window += W) {
        F out = convolve<K>(window, weights, bias, s.width);
        if (s.silu) out = silu(out);
        y.store(p.batch, p.begin + t, p.channel, out, p.count);
    }
}

// The last w-1 inputs of a sequence, those of its initial state where it is shorter.
void keep_last(const Conv& s, const Piece& p, const Rows& final_state) {
    for (int64_t j = 0; j < s.width - 1; j++) {
        F v = input(s, p, p.length - s.width + 1 + j);
        for (int64_t i = 0; i < p.count; i++)
            final_state.store(p.sequence, p.channel + i, j, splat(v[i]), 1);
    }
}

void forward_task(const Conv& s, const ForwardOut& out, int64_t sequence, int64_t block, float* window,
                  float* weights) {
    Piece p = piece_at(s, sequence, block, 0);
    stage_weights(s, p, weights);
    for (int64_t t = 0; t < p.length; t += TILE) {
        Piece tile = piece_at(s, sequence, block, t);
        if (s.width == 4) forward_tile<4>(s, tile, out.y, window, weights);
        else forward_tile<0>(s, tile, out.y, window, weights);
    }
    keep_last(s, p, out.final_state);
}

// ---- backward ------------------------------------------------------------------------------------

// A tile's scratch: [token][W], [column][W]; `turned` holds the weights, last column first.
struct Tile {
    float *window, *grad, *weights, *turned;
};

// The gradient before the activation, of tokens [p.first - (w-1), p.end + (w-1)) to grad[0], grad[W],
// ...; zero outside the sequence, and before p.first, where it is not asked for.
template <int K>
void stage_gradient(const Conv& s, const BackwardOut& out, const Piece& p, int64_t end, const Tile& a) {
    int64_t reach = s.width - 1;
    F bias = bias_of(s, p);
    float* to = a.grad + reach * W;
    std::memset(a.grad, 0, reach * W * 4);
    for (int64_t t = p.first; t < end; t++, to += W) {
        F dy = out.grad_y.load(p.batch, p.begin + t, p.channel, p.count);
        if (s.silu) {
            F pre = convolve<K>(a.window + (t - p.first) * W, a.weights, bias, s.width);
            dy = dy * silu_slope(pre, sigmoid(pre));
        }
        store(to, dy);
    }
    std::memset(to, 0, (p.end + reach - end) * W * 4);
}

// The gradient of the input of token `u` >= -(w-1): of every output it reached, and of the final state.
template <int K>
F input_gradient(const Conv& s, const BackwardOut& out, const Piece& p, int64_t u, const Tile& a) {
    int64_t reach = s.width - 1;
    F total = convolve<K>(a.grad + (u - p.first + reach) * W, a.turned, F{}, s.width);
    if (u + reach < p.length) return total;
    return total + load_column(states_of(s, out.grad_final, p), reach, u + reach - p.length, p);
}

// sums[j] += sum over t of grad[t] window[t + j], for N values of j.
template <int N>
void correlate(const float* grad, const float* window, int64_t tokens, float* sums) {
    F total[N];
    for (int j = 0; j < N; j++) total[j] = load(sums + j * W);
    for (int64_t t = 0; t < tokens; t++)
        for (int j = 0; j < N; j++)
            total[j] = fma(load(grad + t * W), load(window + (t + j) * W), total[j]);
    for (int j = 0; j < N; j++) store(sums + j * W, total[j]);
}

template <int K>
void backward_tile(const Conv& s, const BackwardOut& out, const Piece& p, const Tile& a,
                   float* dweight, float* dbias) {
    int64_t reach = s.width - 1, end = p.end + reach < p.length ? p.end + reach : p.length;
    const float* grad = a.grad + reach * W;
    stage_weights(s, p, a.weights);
    for (int64_t j = 0; j < s.width; j++) store(a.turned + j * W, load(a.weights + (reach - j) * W));
    stage(s, p, end, a.window);
    stage_gradient<K>(s, out, p, end, a);
    F total = load(dbias);
    for (int64_t t = p.first; t < p.end; t++) {
        F dx = input_gradient<K>(s, out, p, t, a);
        out.dx.store(p.batch, p.begin + t, p.channel, dx, p.count);
        total = total + load(grad + (t - p.first) * W);
    }
    store(dbias, total);
    if (K) correlate<K ? K : 1>(grad, a.window, p.end - p.first, dweight);
    for (int64_t j = 0; !K && j < s.width; j++)
        correlate<1>(grad, a.window + j * W, p.end - p.first, dweight + j * W);
    if (p.first || !out.dstart) return;
    float* dstart = out.dstart + p.sequence * s.channels * reach;
    for (int64_t j = 0; j < reach; j++)
        store_column(dstart, reach, j, p, input_gradient<K>(s, out, p, j - reach, a));
}

// One thread's blocks and sequences; sums are [block][w + 1][W]: dweight, then dbias.
void backward_share(const Conv& s, const BackwardOut& out, const Grid& grid, int64_t share,
                    float* sums) {
    FlushDenormals flush;
    Scratch scratch((2 * TILE + 8 * s.width) * W);
    Tile a;
    a.window = scratch.data, a.grad = a.window + (TILE + 2 * s.width) * W;
    a.weights = a.grad + (TILE + 2 * s.width) * W, a.turned = a.weights + s.width * W;
    int64_t last = grid.end_sequence(share, s.sequences);
    for (int64_t i = grid.first_sequence(share, s.sequences); i < last; i++)
        for (int64_t t = 0; t < s.sequences.length(i) || t == 0; t += TILE)
            for (int64_t b = grid.first_block(share); b < grid.end_block(share); b++) {
                Piece p = piece_at(s, i, b, t);
                float *dweight = sums + b * (s.width + 1) * W, *dbias = dweight + s.width * W;
                if (s.width == 4) backward_tile<4>(s, out, p, a, dweight, dbias);
                else backward_tile<0>(s, out, p, a, dweight, dbias);
            }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void causal_conv1d_forward(const Conv* conv,
                                                                             const ForwardOut* out) {
    const Conv& s = *conv;
    int64_t blocks = (s.channels + W - 1) / W;
#pragma omp parallel num_threads(s.threads)
    {
        FlushDenormals flush;
        Scratch scratch((TILE + 2 * s.width) * W);
        float *window = scratch.data, *weights = window + (TILE + s.width) * W;
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < blocks * s.sequences.count; task++)
            forward_task(s, *out, task / blocks, task % blocks, window, weights);
    }
}

extern "C" __attribute__((visibility("default"))) void causal_conv1d_backward(
    const Conv* conv, const BackwardOut* gradients) {
    const Conv& s = *conv;
    const BackwardOut& out = *gradients;
    Grid grid(s.channels, s.sequences, s.threads);
    int64_t size = grid.blocks * (s.width + 1) * W;
    Scratch sums(grid.along * size);
    std::memset(sums.data, 0, grid.along * size * 4);
#pragma omp parallel for num_threads(s.threads) schedule(static, 1)
    for (int64_t share = 0; share < grid.shares(); share++)
        backward_share(s, out, grid, share, sums.data + share / grid.across * size);
    add_up(sums.data, grid.along, size, sums.data, s.threads);
    for (int64_t block = 0; block < grid.blocks; block++) {
        Piece p{};
        p.channel = block * W, p.count = s.channels - p.channel < W ? s.channels - p.channel : W;
        const float* sum = sums.data + block * (s.width + 1) * W;
        for (int64_t j = 0; j < s.width; j++)
            store_column(out.dweight, s.width, j, p, load(sum + j * W));
        if (out.dbias) store(out.dbias + p.channel, load(sum + s.width * W), p.count);
    }
}
