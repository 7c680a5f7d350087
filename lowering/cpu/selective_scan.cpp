// Mamba's selective scan and its gradient. See effpass/ops/selective_scan.py for the mathematics.
//
// Lanes are W neighbouring channels; the states of one block of channels stay in registers while time
// passes. Tokens go through in chunks: a chunk's rows are first brought to float ("staged") with dt's
// bias and softplus applied, then every group of states walks over them. Nothing of shape
// (b, t, d, n) exists: backward keeps one state a chunk and recomputes those between.
#include "denormals.h"
#include "share.h"

using namespace effpass;

// Field by field as in selective_scan.py.
struct Scan {
    Rows x, dt, B, C, z;
    const float *A, *D, *dt_bias, *start;  // (d, n), (d), (d), (s, d, n); null where not given
    int64_t softplus;
    Sequences sequences;
    int64_t channels, states, threads;
};
struct ForwardOut {
    Rows y;
    float* final_state;  // (s, d, n)
};
struct BackwardOut {
    Rows grad_y;
    const float* grad_final;                       // (s, d, n)
    Rows dx, ddt, dz;                              // dz null without z
    float *dA, *dB, *dC, *dD, *dt_bias, *dstart;  // contiguous; the last three may be null
};

namespace {

constexpr int64_t TILE = 32;   // tokens staged at once, forward
constexpr int64_t GROUP = 8;   // most blocks of channels that share a tile's pages, forward
constexpr int64_t CHUNK = 16;  // tokens between two states kept for backward
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

// The staged rows of one block of channels: `count` channels from `channel`, tokens from `begin`.
struct Block {
    int64_t batch, begin, channel, count;
};

Block block_at(const Scan& s, int64_t sequence, int64_t block, int64_t token) {
    int64_t channel = block * W, left = s.channels - channel;
    const Sequences& all = s.sequences;
    return {all.batch(sequence), all.begin(sequence) + token, channel, left < W ? left : W};
}

// dt as the recurrence sees it, and before its softplus.
inline F raw_step(const Scan& s, const Block& b, int64_t t) {
    F dt = s.dt.load(b.batch, b.begin + t, b.channel, b.count);
    return s.dt_bias ? dt + load(s.dt_bias + b.channel, b.count) : dt;
}

void stage_steps(const Scan& s, const Block& b, int64_t t, F x, float* step_at, float* drive_at) {
    F step = raw_step(s, b, t);
    if (s.softplus) step = softplus(step);
    store(step_at + t * W, step);
    store(drive_at + t * W, step * x);
}

inline F channel_or_zero(const float* p, const Block& b) {
    return p ? load(p + b.channel, b.count) : F{};
}

// Where the states of a block begin in an array (s, d, n).
inline int64_t corner(const Scan& s, int64_t sequence, const Block& b) {
    return (sequence * s.channels + b.channel) * s.states;
}

// (channel, state) memory <-> [state][W] registers' order.
void gather(const float* from, int64_t states, int64_t count, float* to, float factor = 1.0f) {
    for (int64_t n = 0; n < states; n++)
        for (int64_t lane = 0; lane < W; lane++)
            to[n * W + lane] = lane < count ? from[lane * states + n] * factor : 0.0f;
}
void scatter(const float* from, int64_t states, int64_t count, float* to) {
    for (int64_t lane = 0; lane < count; lane++)
        for (int64_t n = 0; n < states; n++) to[lane * states + n] = from[n * W + lane];
}

inline const float* row(const Rows& r, const Block& b, int64_t t) {
    return (const float*)r.at(b.batch, b.begin + t, 0);
}

// ---- forward -------------------------------------------------------------------------------------

struct Tile {
    alignas(64) float step[TILE * W], drive[TILE * W], y[TILE * W];
};

void stage(const Scan& s, const Block& b, int64_t tokens, Tile& tile) {
    F skip = channel_or_zero(s.D, b);
    for (int64_t t = 0; t < tokens; t++) {
        F x = s.x.load(b.batch, b.begin + t, b.channel, b.count);
        stage_steps(s, b, t, x, tile.step, tile.drive);
        store(tile.y + t * W, s.D ? skip * x : F{});
    }
}

// Asks for a row that is wanted next (it may lie beyond the end), behind arithmetic that hides the wait.
inline void prefetch(const Rows& r, const Block& b, int64_t t) {
    if (r) __builtin_prefetch(r.at(b.batch, b.begin + t, b.channel));
}

// N states from `n` on walk over a staged tile; y gathers their share when `read`.
template <int N, bool read>
void walk(const Scan& s, const Block& b, int64_t tokens, int64_t n, const float* decay, float* state,
          Tile& tile, const Block& next) {
    F h[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) h[i] = load(state + (n + i) * W);
    for (int64_t t = 0; t < tokens; t++) {
        const float *B = row(s.B, b, t) + n, *C = row(s.C, b, t) + n;
        F step = load(tile.step + t * W), drive = load(tile.drive + t * W), y{};
        if (n == 0) {
            prefetch(s.x, next, t);
            prefetch(s.dt, next, t);
            if (read) prefetch(s.z, next, t);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            h[i] = fma(h[i], exp2(step * load(decay + (n + i) * W)), drive * B[i]);
            if (read) y = fma(h[i], splat(C[i]), y);
        }
        if (read) store(tile.y + t * W, load(tile.y + t * W) + y);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) store(state + (n + i) * W, h[i]);
}

template <bool read>
void walk_all(const Scan& s, const Block& b, int64_t tokens, const float* decay, float* state,
              Tile& tile, const Block& next) {
    int64_t n = 0;
    for (; n + 16 <= s.states; n += 16) walk<16, read>(s, b, tokens, n, decay, state, tile, next);
    for (; n + 4 <= s.states; n += 4) walk<4, read>(s, b, tokens, n, decay, state, tile, next);
    for (; n < s.states; n++) walk<1, read>(s, b, tokens, n, decay, state, tile, next);
}

void emit(const Scan& s, const Block& b, int64_t tokens, const Tile& tile, const Rows& y) {
    for (int64_t t = 0; t < tokens; t++) {
        F out = load(tile.y + t * W);
        if (s.z) out = out * silu(s.z.load(b.batch, b.begin + t, b.channel, b.count));
        y.store(b.batch, b.begin + t, b.channel, out, b.count);
    }
}

// Blocks [first, end) of a sequence: all of a tile before the next, so that pages are used whole.
void forward_blocks(const Scan& s, const ForwardOut& out, int64_t sequence, int64_t first,
                    int64_t end, float* decay, float* state) {
    int64_t size = s.states * W, length = s.sequences.length(sequence);
    for (int64_t block = first; block < end; block++) {
        Block b = block_at(s, sequence, block, 0);
        float* start = state + (block - first) * size;
        gather(s.A + b.channel * s.states, s.states, b.count, decay + (block - first) * size, LOG2E);
        if (s.start) gather(s.start + corner(s, sequence, b), s.states, b.count, start);
        else std::memset(start, 0, size * 4);
    }
    Tile tile;
    for (int64_t t = 0; t < length; t += TILE) {
        int64_t tokens = length - t < TILE ? length - t : TILE;
        for (int64_t block = first; block < end; block++) {
            Block b = block_at(s, sequence, block, t);
            bool last = block + 1 == end;
            Block next = block_at(s, sequence, last ? first : block + 1, last ? t + TILE : t);
            int64_t at = (block - first) * size;
            stage(s, b, tokens, tile);
            walk_all<true>(s, b, tokens, decay + at, state + at, tile, next);
            emit(s, b, tokens, tile, out.y);
        }
    }
    for (int64_t block = first; block < end; block++) {
        Block b = block_at(s, sequence, block, 0);
        scatter(state + (block - first) * size, s.states, b.count,
                out.final_state + corner(s, sequence, b));
    }
}

// ---- backward ------------------------------------------------------------------------------------

// A staged chunk with what its gradients gather: sums over states, one entry a token and lane.
struct Chunk {
    alignas(64) float step[CHUNK * W], drive[CHUNK * W], x[CHUNK * W];
    alignas(64) float grad[CHUNK * W];     // of y before the gate
    alignas(64) float y[CHUNK * W];        // before the gate, when there is one
    alignas(64) float d_drive[CHUNK * W];  // sum over n of g B
    alignas(64) float d_log[CHUNK * W];    // sum over n of d(decay) decay A log2(e)
};

// One thread's share: some blocks of channels of some sequences, and its scratch. All arrays are
// [block][state][W] unless said; `begin` and `end` count blocks and sequences.
struct Share {
    int64_t first_block, end_block, first_sequence, end_sequence;
    float *decay, *adjoint, *dA;  // decay: A log2(e)
    float *dD, *dt_bias;          // [block][W]
    float *kept;                  // [chunk][block][state][W]: the state before each chunk
    float *before, *factor;       // [token of chunk][state][W]: h[t-1], exp(dt[t] A)
    float *dB, *dC;               // [token of chunk][state][W]: partial over lanes
    float *dB_rows, *dC_rows;     // [batch][token][state]: this share's channels only
};

void stage(const Scan& s, const BackwardOut& out, const Block& b, int64_t tokens, Chunk& c) {
    for (int64_t t = 0; t < tokens; t++) {
        F x = s.x.load(b.batch, b.begin + t, b.channel, b.count);
        F grad = out.grad_y.load(b.batch, b.begin + t, b.channel, b.count);
        if (s.z) grad = grad * silu(s.z.load(b.batch, b.begin + t, b.channel, b.count));
        stage_steps(s, b, t, x, c.step, c.drive);
        store(c.x + t * W, x);
        store(c.grad + t * W, grad);
        store(c.y + t * W, F{});
        store(c.d_drive + t * W, F{});
        store(c.d_log + t * W, F{});
    }
}

// Forward over a chunk once more, keeping h[t-1] and exp(dt A), and adding to dC.
template <int N>
void recompute(const Scan& s, const BackwardOut& out, const Block& b, int64_t tokens, int64_t n, const float* decay,
               const float* state, const Share& w, Chunk& c) {
    F h[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) h[i] = load(state + (n + i) * W);
    for (int64_t t = 0; t < tokens; t++) {
        const float *B = row(s.B, b, t) + n, *C = row(s.C, b, t) + n;
        int64_t at = (t * s.states + n) * W;
        F step = load(c.step + t * W), drive = load(c.drive + t * W), grad = load(c.grad + t * W), y{};
        if (n == 0) {
            Block next = b;
            next.channel += W;
            prefetch(s.x, next, t);
            prefetch(s.dt, next, t);
            prefetch(s.z, next, t);
            prefetch(out.grad_y, next, t);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            F factor = exp2(step * load(decay + (n + i) * W));
            store(w.before + at + i * W, h[i]);
            store(w.factor + at + i * W, factor);
            h[i] = fma(h[i], factor, drive * B[i]);
            y = fma(h[i], splat(C[i]), y);
            store(w.dC + at + i * W, fma(h[i], grad, load(w.dC + at + i * W)));
        }
        store(c.y + t * W, load(c.y + t * W) + y);
    }
}

// The adjoint g[t] = C[t] grad[t] + exp(dt[t+1] A) g[t+1] over a chunk, last token first.
template <int N>
void reverse(const Scan& s, const BackwardOut& out, const Block& b, int64_t tokens, int64_t n, const float* decay,
             float* adjoint, float* dA, const Share& w, Chunk& c) {
    F g[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) g[i] = load(adjoint + (n + i) * W);
    for (int64_t t = tokens - 1; t >= 0; t--) {
        const float *B = row(s.B, b, t) + n, *C = row(s.C, b, t) + n;
        int64_t at = (t * s.states + n) * W;
        F step = load(c.step + t * W), drive = load(c.drive + t * W), grad = load(c.grad + t * W);
        F d_drive{}, d_log{};
        if (n == 0) {
            prefetch(out.dx, b, t);
            prefetch(out.ddt, b, t);
            prefetch(out.dz, b, t);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            g[i] = fma(grad, splat(C[i]), g[i]);
            store(w.dB + at + i * W, fma(g[i], drive, load(w.dB + at + i * W)));
            d_drive = fma(g[i], splat(B[i]), d_drive);
            g[i] = g[i] * load(w.factor + at + i * W);
            F d_exponent = g[i] * load(w.before + at + i * W);
            d_log = fma(d_exponent, load(decay + (n + i) * W), d_log);
            store(dA + (n + i) * W, fma(d_exponent, step, load(dA + (n + i) * W)));
        }
        store(c.d_drive + t * W, load(c.d_drive + t * W) + d_drive);
        store(c.d_log + t * W, load(c.d_log + t * W) + d_log);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) store(adjoint + (n + i) * W, g[i]);
}

// From sums over states to the gradients of x, dt, z, D and dt_bias.
void emit(const Scan& s, const BackwardOut& out, const Block& b, int64_t tokens, const Chunk& c,
          float* dD, float* dt_bias) {
    F skip = channel_or_zero(s.D, b), sum_D = load(dD), sum_bias = load(dt_bias);
    for (int64_t t = 0; t < tokens; t++) {
        F x = load(c.x + t * W), grad = load(c.grad + t * W), d_drive = load(c.d_drive + t * W);
        F dx = load(c.step + t * W) * d_drive;
        F ddt = fma(load(c.d_log + t * W), splat(LN2), x * d_drive);
        if (s.D) dx = fma(grad, skip, dx);
        if (s.softplus) ddt = ddt * sigmoid(raw_step(s, b, t));
        out.dx.store(b.batch, b.begin + t, b.channel, dx, b.count);
        out.ddt.store(b.batch, b.begin + t, b.channel, ddt, b.count);
        sum_D = fma(grad, x, sum_D);
        sum_bias = sum_bias + ddt;
        if (!s.z) continue;
        F z = s.z.load(b.batch, b.begin + t, b.channel, b.count);
        F y = load(c.y + t * W), gated = out.grad_y.load(b.batch, b.begin + t, b.channel, b.count);
        if (s.D) y = fma(skip, x, y);
        F dz = y * gated * silu_slope(z, sigmoid(z));
        out.dz.store(b.batch, b.begin + t, b.channel, dz, b.count);
    }
    store(dD, sum_D);
    store(dt_bias, sum_bias);
}

// The state before every chunk of a sequence, into `kept`.
void keep_states(const Scan& s, const Share& w, int64_t sequence) {
    int64_t size = s.states * W, blocks = w.end_block - w.first_block;
    int64_t length = s.sequences.length(sequence);
    Tile tile;
    for (int64_t local = 0; local < blocks; local++) {
        Block b = block_at(s, sequence, w.first_block + local, 0);
        float* state = w.kept + local * size;
        if (s.start) gather(s.start + corner(s, sequence, b), s.states, b.count, state);
        else std::memset(state, 0, size * 4);
    }
    for (int64_t t = 0; t + CHUNK < length; t += CHUNK) {
        float* chunk = w.kept + (t / CHUNK + 1) * blocks * size;
        std::memcpy(chunk, chunk - blocks * size, blocks * size * 4);
        for (int64_t local = 0; local < blocks; local++) {
            Block b = block_at(s, sequence, w.first_block + local, t), next = b;
            next.channel += W;
            for (int64_t i = 0; i < CHUNK; i++)
                stage_steps(s, b, i, s.x.load(b.batch, b.begin + i, b.channel, b.count), tile.step,
                            tile.drive);
            walk_all<false>(s, b, CHUNK, w.decay + local * size, chunk + local * size, tile, next);
        }
    }
}

void backward_chunk(const Scan& s, const BackwardOut& out, const Share& w, int64_t sequence,
                    int64_t block, int64_t t, int64_t tokens) {
    int64_t size = s.states * W, blocks = w.end_block - w.first_block, local = block - w.first_block;
    const float *decay = w.decay + local * size, *state = w.kept + (t / CHUNK * blocks + local) * size;
    float *adjoint = w.adjoint + local * size, *dA = w.dA + local * size;
    Block b = block_at(s, sequence, block, t);
    Chunk c;
    stage(s, out, b, tokens, c);
    int64_t n = 0;
    for (; n + 16 <= s.states; n += 16) {
        recompute<16>(s, out, b, tokens, n, decay, state, w, c);
        reverse<16>(s, out, b, tokens, n, decay, adjoint, dA, w, c);
    }
    for (; n + 4 <= s.states; n += 4) {
        recompute<4>(s, out, b, tokens, n, decay, state, w, c);
        reverse<4>(s, out, b, tokens, n, decay, adjoint, dA, w, c);
    }
    for (; n < s.states; n++) {
        recompute<1>(s, out, b, tokens, n, decay, state, w, c);
        reverse<1>(s, out, b, tokens, n, decay, adjoint, dA, w, c);
    }
    emit(s, out, b, tokens, c, w.dD + local * W, w.dt_bias + local * W);
}

void backward_sequence(const Scan& s, const BackwardOut& out, const Share& w, int64_t sequence) {
    int64_t size = s.states * W, length = s.sequences.length(sequence);
    for (int64_t block = w.first_block; block < w.end_block; block++) {
        Block b = block_at(s, sequence, block, 0);
        gather(out.grad_final + corner(s, sequence, b), s.states, b.count,
               w.adjoint + (block - w.first_block) * size);
    }
    if (length) keep_states(s, w, sequence);
    for (int64_t t = (length - 1) / CHUNK * CHUNK; length && t >= 0; t -= CHUNK) {
        int64_t tokens = length - t < CHUNK ? length - t : CHUNK;
        std::memset(w.dB, 0, tokens * size * 4);
        std::memset(w.dC, 0, tokens * size * 4);
        for (int64_t block = w.first_block; block < w.end_block; block++)
            backward_chunk(s, out, w, sequence, block, t, tokens);
        Block b = block_at(s, sequence, w.first_block, t);
        int64_t at = (b.batch * s.sequences.tokens + b.begin) * s.states;
        for (int64_t i = 0; i < tokens * s.states; i++) {
            w.dB_rows[at + i] = sum(load(w.dB + i * W));
            w.dC_rows[at + i] = sum(load(w.dC + i * W));
        }
    }
    if (!out.dstart) return;
    for (int64_t block = w.first_block; block < w.end_block; block++) {
        Block b = block_at(s, sequence, block, 0);
        scatter(w.adjoint + (block - w.first_block) * size, s.states, b.count,
                out.dstart + corner(s, sequence, b));
    }
}

int64_t longest(const Sequences& all) {
    int64_t most = 0;
    for (int64_t i = 0; i < all.count; i++) most = all.length(i) > most ? all.length(i) : most;
    return most;
}

void backward_share(const Scan& s, const BackwardOut& out, Share& w, int64_t kept_chunks) {
    FlushDenormals flush;
    int64_t size = s.states * W, blocks = w.end_block - w.first_block;
    Scratch decay(blocks * size), adjoint(blocks * size), kept(kept_chunks * blocks * size);
    Scratch chunk(4 * CHUNK * size);
    w.decay = decay.data, w.adjoint = adjoint.data, w.kept = kept.data;
    w.before = chunk.data, w.factor = w.before + CHUNK * size;
    w.dB = w.factor + CHUNK * size, w.dC = w.dB + CHUNK * size;
    for (int64_t block = w.first_block; block < w.end_block; block++) {
        Block b = block_at(s, 0, block, 0);
        gather(s.A + b.channel * s.states, s.states, b.count,
               w.decay + (block - w.first_block) * size, LOG2E);
    }
    for (int64_t i = w.first_sequence; i < w.end_sequence; i++) backward_sequence(s, out, w, i);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void selective_scan_forward(const Scan* scan,
                                                                              const ForwardOut* out) {
    const Scan& s = *scan;
    int64_t blocks = (s.channels + W - 1) / W, group = blocks * s.sequences.count / (4 * s.threads);
    group = group < 1 ? 1 : group > GROUP ? GROUP : group;
    int64_t groups = (blocks + group - 1) / group;
#pragma omp parallel num_threads(s.threads)
    {
        FlushDenormals flush;
        Scratch scratch(2 * group * s.states * W);
        float *decay = scratch.data, *state = decay + group * s.states * W;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * s.sequences.count; task++) {
            int64_t first = task % groups * group, end = first + group;
            forward_blocks(s, *out, task / groups, first, end < blocks ? end : blocks, decay, state);
        }
    }
}

extern "C" __attribute__((visibility("default"))) void selective_scan_backward(
    const Scan* scan, const BackwardOut* gradients) {
    const Scan& s = *scan;
    const BackwardOut& out = *gradients;
    const Sequences& all = s.sequences;
    Grid grid(s.channels, all, s.threads);
    int64_t size = s.states * W, row_count = all.total() * s.states;
    int64_t per_channel = grid.blocks * (size + 2 * W), chunks = (longest(all) + CHUNK - 1) / CHUNK;
    Scratch rows(2 * grid.across * row_count), sums(grid.along * per_channel);
    std::memset(sums.data, 0, grid.along * per_channel * 4);
#pragma omp parallel for num_threads(s.threads) schedule(static, 1)
    for (int64_t i = 0; i < grid.shares(); i++) {
        int64_t across = i % grid.across, along = i / grid.across;
        Share w{};
        w.first_block = grid.first_block(i), w.end_block = grid.end_block(i);
        w.first_sequence = grid.first_sequence(i, all), w.end_sequence = grid.end_sequence(i, all);
        float* sum = sums.data + along * per_channel;
        w.dA = sum + w.first_block * size;
        w.dD = sum + grid.blocks * size + w.first_block * W;
        w.dt_bias = sum + grid.blocks * (size + W) + w.first_block * W;
        w.dB_rows = rows.data + across * row_count;
        w.dC_rows = rows.data + (grid.across + across) * row_count;
        backward_share(s, out, w, chunks);
    }
    add_up(rows.data, grid.across, row_count, out.dB, s.threads);
    add_up(rows.data + grid.across * row_count, grid.across, row_count, out.dC, s.threads);
    add_up(sums.data, grid.along, per_channel, sums.data, s.threads);
    for (int64_t block = 0; block < grid.blocks; block++) {
        Block b = block_at(s, 0, block, 0);
        scatter(sums.data + block * size, s.states, b.count, out.dA + b.channel * s.states);
        const float* last = sums.data + grid.blocks * size + block * W;
        if (out.dD) store(out.dD + b.channel, load(last), b.count);
        if (out.dt_bias) store(out.dt_bias + b.channel, load(last + grid.blocks * W), b.count);
    }
}
