// ssd_scan (Dao and Gu 2024, arXiv 2405.21060, section 6) and its gradient, chunk by chunk with products.
//
// Within a chunk, with c[t] = sum over its tokens up to t of dt A, u[t] = dt[t] x[t], and the state S
// (n, p) at its start:
//     y[i] = e^c[i] C[i] S + sum_{j <= i} (C[i] . B[j]) e^(c[i] - c[j]) u[j]
//     S'   = e^c[last] S + sum_j B[j]^T e^(c[last] - c[j]) u[j]
// Only differences of c are exponentiated; chunks begin anew with each sequence. A job is some heads
// of one group of one sequence: they share the products C B^T. Arithmetic is float.
#include "ssd_chunk.h"

namespace {
using namespace effpass;

// ---- forward -------------------------------------------------------------------------------------

struct Forward {
    const Scan& s;
    const ForwardOut& out;
    int64_t P, N;  // p and n, padded
    Shared shared;
    Scratch X, U, Y, M, states;  // (CHUNK, P) three times, (CHUNK, CHUNK), (job's heads, N, P)
    Steps steps;

    Forward(const Scan& s, const ForwardOut& out, int64_t job_heads)
        : s(s), out(out), P(round_up(s.p, BLOCK)), N(round_up(s.n, BLOCK)), shared(s),
          X(CHUNK * P), U(CHUNK * P), Y(CHUNK * P), M(CHUNK * CHUNK), states(job_heads * N * P) {}

    void run(const Job& job) {
        if (job.length <= SHORT) return run_short(job);
        for (int64_t i = 0; i < job.heads && s.start; i++)
            transpose(states.data + i * N * P, P, s.start + head_state(job, i), s.n, s.p, s.n);
        for (int64_t start = 0; start < job.length; start += CHUNK) {
            int64_t length = std::min(CHUNK, job.length - start);
            shared.read_all(s, job, start, length);
            for (int64_t i = 0; i < job.heads; i++)
                chunk({job, start, length, job.head + i}, states.data + i * N * P, start == 0 && !s.start);
        }
        for (int64_t i = 0; i < job.heads; i++)
            transpose(out.final_state + head_state(job, i), s.n, states.data + i * N * P, P, s.n, s.p);
    }

    int64_t head_state(const Job& job, int64_t i) const { return state_at(s, job.sequence, job.head + i); }

    // `fresh`: the state is zero, and not yet written.
    void chunk(const Piece& at, float* state, bool fresh) {
        int64_t length = at.length;
        steps.read(s, at);
        for (int64_t t = 0; t < length; t++)
            read(X.data + t * P, s.x, at.row, at.token + t, at.head * s.p, s.p);
        scale_rows(U.data, X.data, steps.dt, length, P);
        for (int64_t j = 0; j < length; j++)
            for (int64_t i = j / W * W; i < length; i += W)
                store(M.data + j * CHUNK + i, load(shared.CB.data + j * CHUNK + i) * steps.decay(j, i));
        Product y{.out = Y.data, .out_step = P, .rows = length, .columns = P, .depth = s.n,
                  .a = shared.C.data, .row_step = N, .k_step = 1, .b = state, .b_step = P,
                  .row_scale = steps.enter};
        if (!fresh) multiply(y);
        multiply({.out = Y.data, .out_step = P, .rows = length, .columns = P, .depth = length,
                  .a = M.data, .row_step = 1, .k_step = CHUNK, .b = U.data, .b_step = P,
                  .init = fresh ? nullptr : Y.data, .part = Part::LOWER});
        for (int64_t t = 0; t < length; t++) finish(at, t);
        scale_rows(U.data, U.data, steps.leave, length, P);
        multiply({.out = state, .out_step = P, .rows = s.n, .columns = P, .depth = length,
                  .a = shared.B.data, .row_step = 1, .k_step = N, .b = U.data, .b_step = P,
                  .init = fresh ? nullptr : state, .beta = steps.total});
    }

    // y = (Y + D x) silu(z), in y's storage.
    void finish(const Piece& at, int64_t t) {
        float *y = Y.data + t * P, *x = X.data + t * P;
        F skip = splat(s.D ? s.D[at.head] : 0.0f);
        for (int64_t i = 0; i < P && s.D; i += W) store(y + i, fma(skip, load(x + i), load(y + i)));
        if (s.z) {
            read(x, s.z, at.row, at.token + t, at.head * s.p, s.p);  // x is needed no more
            for (int64_t i = 0; i < P; i += W) store(y + i, load(y + i) * silu(load(x + i)));
        }
        write(out.y, at.row, at.token + t, at.head * s.p, y, s.p);
    }

    // Reads and writes the states once a token, as they lie in memory: (p, n).
    void run_short(const Job& job) {
        for (int64_t i = 0; i < job.heads; i++) {
            float* state = out.final_state + head_state(job, i);
            const float* before = s.start ? s.start + head_state(job, i) : nullptr;
            if (!job.length) {
                if (before) std::copy(before, before + s.p * s.n, state);
                else std::fill(state, state + s.p * s.n, 0.0f);
                continue;
            }
            Piece at(job, 0, job.length, job.head + i);
            steps.read(s, at);
            for (int64_t t = 0; t < job.length; t++, before = state)
                one_token(at, job.group, t, before, state);
        }
    }

    void one_token(const Piece& at, int64_t group, int64_t t, const float* before, float* state) {
        float *x = X.data + t * P, *y = Y.data + t * P, *B = shared.B.data, *C = shared.C.data;
        int64_t token = at.token + t;
        read(x, s.x, at.row, token, at.head * s.p, s.p);
        read(B, s.B, at.row, token, group * s.n, s.n);
        read(C, s.C, at.row, token, group * s.n, s.n);
        F decay = exp(splat(steps.dt[t] * s.A[at.head]));
        for (int64_t i = 0; i < s.p; i++) {
            F u = splat(steps.dt[t] * x[i]), total{};
            for (int64_t k = 0; k < s.n; k += W) {
                F h = u * load(B + k);
                if (before) h = fma(decay, load(before + i * s.n + k, s.n - k), h);
                store(state + i * s.n + k, h, s.n - k);
                total = fma(h, load(C + k), total);
            }
            y[i] = sum(total);
        }
        finish(at, t);
    }
};

// ---- backward ------------------------------------------------------------------------------------
//
// G (p, n) is the gradient of the state at the end of a chunk. With L = dt A, du = gradient of u:
//     du[j] = e^(c[last]-c[j]) B[j] G + sum_{i >= j} (C[i] . B[j]) e^(c[i]-c[j]) dy[i]
//     K[i,j] = sum over heads of e^(c[i]-c[j]) u[j] . dy[i]
//     dC[i] = e^c[i] dy[i] S + sum_{j <= i} K[i,j] B[j]
//     dB[j] = e^(c[last]-c[j]) u[j] G + sum_{i >= j} K[i,j] C[i]
//     dL[t] = what passes over token t: the terms of y[i] from u[j] with j < t <= i, of y[i >= t] from
//             S, of S' from u[j < t], of S' from S. No two of them cancel.
// Chunk-boundary states are recomputed and kept for the heads of a job.

struct Backward {
    const Scan& s;
    const BackwardOut& out;
    int64_t P, N;
    Shared shared;
    Scratch X, U, V, dY, dY_turned, dU, Y;  // (CHUNK, P), (P, CHUNK) for the turned one
    Scratch M, K, K_head, outer;            // (CHUNK, CHUNK); outer (CHUNK, N)
    Scratch turned, after;                  // (N, P); the job's heads' G (P, N)
    Scratch dB, dC;                         // (CHUNK, N)
    Steps steps;
    alignas(64) float crossing[CHUNK], entering[CHUNK], leaving[CHUNK], direct[CHUNK], dstep[CHUNK];

    Backward(const Scan& s, const BackwardOut& out, int64_t job_heads)
        : s(s), out(out), P(round_up(s.p, BLOCK)), N(round_up(s.n, BLOCK)), shared(s),
          X(CHUNK * P), U(CHUNK * P), V(CHUNK * P), dY(CHUNK * P), dY_turned(CHUNK * P),
          dU(CHUNK * P), Y(CHUNK * P), M(CHUNK * CHUNK), K(CHUNK * CHUNK), K_head(CHUNK * CHUNK),
          outer(CHUNK * N), turned(N * P), after(job_heads * P * N), dB(CHUNK * N), dC(CHUNK * N) {}

    // to_dB and to_dC: where this job's share of dB and dC goes, (tokens of a row, group, n) steps.
    void run(const Job& job, const Rows& to_dB, const Rows& to_dC) {
        int64_t chunks = (job.length + CHUNK - 1) / CHUNK;
        Scratch before(job.heads * chunks * P * N);  // states at the start of each chunk (P, N)
        for (int64_t i = 0; i < job.heads; i++) {
            start_head(job, job.head + i, before.data + i * chunks * P * N, after.data + i * P * N);
            int64_t total = job.sequence * s.heads + job.head + i;
            out.dA[total] = out.dD[total] = out.ddt_bias[total] = 0;
        }
        states(job, chunks, before.data);
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            int64_t start = chunk * CHUNK, length = std::min(CHUNK, job.length - start);
            shared.read_all(s, job, start, length);
            std::fill(dB.data, dB.data + length * N, 0.0f);
            std::fill(dC.data, dC.data + length * N, 0.0f);
            std::fill(K.data, K.data + length * CHUNK, 0.0f);
            for (int64_t i = 0; i < job.heads; i++) {
                const float* state = before.data + (i * chunks + chunk) * P * N;
                bool fresh = chunk == 0 && !s.start;
                head_chunk({job, start, length, job.head + i}, state, after.data + i * P * N, fresh);
            }
            shared_gradients(length);
            for (int64_t t = 0; t < length; t++) {
                write(to_dB, job.row, job.token + start + t, job.group * s.n, dB.data + t * N, s.n);
                write(to_dC, job.row, job.token + start + t, job.group * s.n, dC.data + t * N, s.n);
            }
        }
        for (int64_t i = 0; i < job.heads && out.dstart; i++) {
            float* to = out.dstart + state_at(s, job.sequence, job.head + i);
            for (int64_t k = 0; k < s.p; k++) std::copy_n(after.data + (i * P + k) * N, s.n, to + k * s.n);
        }
    }

    void start_head(const Job& job, int64_t head, float* state, float* gradient) {
        int64_t at = state_at(s, job.sequence, head);
        std::fill(gradient, gradient + P * N, 0.0f);
        for (int64_t k = 0; k < s.p; k++) std::copy_n(out.dfinal_state + at + k * s.n, s.n, gradient + k * N);
        if (!job.length) return;
        std::fill(state, state + P * N, 0.0f);
        for (int64_t k = 0; k < s.p && s.start; k++)
            std::copy_n(s.start + at + k * s.n, s.n, state + k * N);
    }

    void states(const Job& job, int64_t chunks, float* before) {
        for (int64_t chunk = 0; chunk + 1 < chunks; chunk++) {
            shared.read_B(s, job, chunk * CHUNK, CHUNK);
            for (int64_t i = 0; i < job.heads; i++) {
                float* state = before + (i * chunks + chunk) * P * N;
                read_x({job, chunk * CHUNK, CHUNK, job.head + i});
                multiply({.out = state + P * N, .out_step = N, .rows = s.p, .columns = N, .depth = CHUNK,
                          .a = V.data, .row_step = 1, .k_step = P, .b = shared.B.data, .b_step = N,
                          .init = state, .beta = steps.total});
            }
        }
    }

    // x, u = dt x, and u e^(c[last] - c).
    void read_x(const Piece& at) {
        int64_t length = at.length;
        steps.read(s, at);
        for (int64_t t = 0; t < length; t++)
            read(X.data + t * P, s.x, at.row, at.token + t, at.head * s.p, s.p);
        scale_rows(U.data, X.data, steps.dt, length, P);
        scale_rows(V.data, U.data, steps.leave, length, P);
    }

    // The gradient of y before the gate.
    void read_dy(const Piece& at) {
        int64_t length = at.length;
        for (int64_t t = 0; t < length; t++) {
            float *dy = dY.data + t * P, *z = Y.data;  // Y is not yet in use
            read(dy, out.dy, at.row, at.token + t, at.head * s.p, s.p);
            if (!s.z) continue;
            read(z, s.z, at.row, at.token + t, at.head * s.p, s.p);
            for (int64_t i = 0; i < P; i += W) store(dy + i, load(dy + i) * silu(load(z + i)));
        }
        int64_t padded = round_up(length, W);
        std::fill(dY.data + length * P, dY.data + padded * P, 0.0f);
        transpose(dY_turned.data, CHUNK, dY.data, P, padded, P);
    }

    void head_chunk(const Piece& at, const float* state, float* G, bool fresh) {
        int64_t length = at.length;
        read_x(at);
        read_dy(at);
        within_chunk(length);
        if (s.z) gate_gradient(at, state, fresh);
        from_after(length, G);
        multiply({.out = dU.data, .out_step = P, .rows = length, .columns = P, .depth = length,
                  .a = M.data, .row_step = CHUNK, .k_step = 1, .b = dY.data, .b_step = P,
                  .init = dU.data, .part = Part::UPPER});
        float over = steps.total * (fresh ? 0.0f : dot(G, state, s.p * N));
        write_dx(at);
        scale_rows(dY.data, dY.data, steps.enter, length, P);  // from here on e^c dy
        from_before(length, state, fresh);
        multiply({.out = G, .out_step = N, .rows = s.p, .columns = N, .depth = length,
                  .a = dY.data, .row_step = 1, .k_step = P, .b = shared.C.data, .b_step = N,
                  .init = G, .beta = steps.total});
        write_ddt(at, over);
    }

    // M[j][i] = (C[i] . B[j]) e^(c[i] - c[j]), K += its gradient by C B^T, and crossing = dL's share.
    void within_chunk(int64_t length) {
        multiply({.out = K_head.data, .out_step = CHUNK, .rows = length,
                  .columns = round_up(length, W), .depth = s.p,
                  .a = U.data, .row_step = P, .k_step = 1, .b = dY_turned.data, .b_step = CHUNK,
                  .part = Part::OUT_UPPER});
        alignas(64) float over[CHUNK] = {};  // over[i]: terms of y[i] from all u up to j
        I lane;
        for (int i = 0; i < W; i++) lane[i] = i;
        crossing[0] = 0;
        for (int64_t j = 0; j < length; j++) {
            F total{};
            for (int64_t i = j / W * W; i < length; i += W) {
                int64_t at = j * CHUNK + i;
                F decay = steps.decay(j, i), cb = load(shared.CB.data + at);
                F k = load(K_head.data + at) * decay;
                store(M.data + at, cb * decay);
                store(K.data + at, load(K.data + at) + k);
                F sums = fma(k, cb, load(over + i));
                store(over + i, sums);
                total += select(lane + int32_t(i) > int32_t(j), sums, F{});
            }
            if (j + 1 < length) crossing[j + 1] = sum(total);
        }
    }

    // dz = dy (y before the gate) silu'(z); y is computed again.
    void gate_gradient(const Piece& at, const float* state, bool fresh) {
        int64_t length = at.length;
        transpose(turned.data, P, state, N, P, N);
        Product y{.out = Y.data, .out_step = P, .rows = length, .columns = P, .depth = s.n,
                  .a = shared.C.data, .row_step = N, .k_step = 1, .b = turned.data, .b_step = P,
                  .row_scale = steps.enter};
        if (!fresh) multiply(y);
        multiply({.out = Y.data, .out_step = P, .rows = length, .columns = P, .depth = length,
                  .a = M.data, .row_step = 1, .k_step = CHUNK, .b = U.data, .b_step = P,
                  .init = fresh ? nullptr : Y.data, .part = Part::LOWER});
        float *dy = dU.data, *z = dU.data + P;  // dU is not yet in use
        F skip = splat(s.D ? s.D[at.head] : 0.0f);
        for (int64_t t = 0; t < length; t++) {
            float *y_row = Y.data + t * P, *x = X.data + t * P;
            read(dy, out.dy, at.row, at.token + t, at.head * s.p, s.p);
            read(z, s.z, at.row, at.token + t, at.head * s.p, s.p);
            for (int64_t i = 0; i < P; i += W) {
                F v = load(z + i), ungated = load(y_row + i);
                if (s.D) ungated = fma(skip, load(x + i), ungated);
                store(y_row + i, load(dy + i) * ungated * silu_slope(v, sigmoid(v)));
            }
            write(out.dz, at.row, at.token + t, at.head * s.p, y_row, s.p);
        }
    }

    // What reaches the chunk from the state after it: into dU, dB, and leaving = its share of dL.
    void from_after(int64_t length, const float* G) {
        transpose(turned.data, P, G, N, P, N);
        multiply({.out = dU.data, .out_step = P, .rows = length, .columns = P, .depth = s.n,
                  .a = shared.B.data, .row_step = N, .k_step = 1, .b = turned.data, .b_step = P,
                  .row_scale = steps.leave});
        for (int64_t t = 0; t < length; t++) leaving[t] = dot(U.data + t * P, dU.data + t * P, P);
        multiply({.out = dB.data, .out_step = N, .rows = length, .columns = N, .depth = s.p,
                  .a = V.data, .row_step = P, .k_step = 1, .b = G, .b_step = N,
                  .init = dB.data});
    }

    // What the chunk's y took from the state before it: into dC, and entering = its share of dL.
    void from_before(int64_t length, const float* state, bool fresh) {
        std::fill(entering, entering + length, 0.0f);
        if (fresh) return;
        multiply({.out = outer.data, .out_step = N, .rows = length, .columns = N, .depth = s.p,
                  .a = dY.data, .row_step = P, .k_step = 1, .b = state, .b_step = N});
        for (int64_t t = 0; t < length; t++) {
            float *from = outer.data + t * N, *to = dC.data + t * N;
            entering[t] = dot(from, shared.C.data + t * N, N);
            for (int64_t i = 0; i < N; i += W) store(to + i, load(to + i) + load(from + i));
        }
    }

    // dx = dt du + D dy; direct = x . du; dD.
    void write_dx(const Piece& at) {
        int64_t length = at.length;
        F skip = splat(s.D ? s.D[at.head] : 0.0f), dD{};
        for (int64_t t = 0; t < length; t++) {
            float *du = dU.data + t * P, *x = X.data + t * P, *dy = dY.data + t * P;
            direct[t] = dot(x, du, P);
            for (int64_t i = 0; i < P; i += W) {
                F dx = load(du + i) * splat(steps.dt[t]);
                dD = fma(load(x + i), load(dy + i), dD);
                store(du + i, s.D ? fma(skip, load(dy + i), dx) : dx);
            }
            write(out.dx, at.row, at.token + t, at.head * s.p, du, s.p);
        }
        out.dD[at.sequence * s.heads + at.head] += sum(dD);
    }

    void write_ddt(const Piece& at, float over) {
        int64_t length = at.length;
        double left = 0, right = 0, dA = 0, dbias = 0;
        for (int64_t t = 0; t < length; t++) {
            dstep[t] = crossing[t] + over + (float)left;
            left += leaving[t];
        }
        for (int64_t t = length - 1; t >= 0; t--) {
            right += entering[t];
            dstep[t] += (float)right;
            dA += (double)steps.dt[t] * dstep[t];
        }
        for (int64_t t = 0; t < length; t += W) {
            F soft = load(steps.soft + t), d = fma(splat(s.A[at.head]), load(dstep + t), load(direct + t));
            I inside = (soft >= splat(s.dt_min)) & (soft <= splat(s.dt_max));
            d = d * select(inside, splat(1.0f), F{});
            store(dstep + t, s.softplus ? d * sigmoid(load(steps.raw + t)) : d);
        }
        for (int64_t t = 0; t < length; t++) {
            write_one(out.ddt, at.row, at.token + t, at.head, dstep[t]);
            dbias += dstep[t];
        }
        out.dA[at.sequence * s.heads + at.head] += (float)dA;
        out.ddt_bias[at.sequence * s.heads + at.head] += (float)dbias;
    }

    void shared_gradients(int64_t length) {
        multiply({.out = dC.data, .out_step = N, .rows = length, .columns = N, .depth = length,
                  .a = K.data, .row_step = 1, .k_step = CHUNK, .b = shared.B.data, .b_step = N,
                  .init = dC.data, .part = Part::LOWER});
        multiply({.out = dB.data, .out_step = N, .rows = length, .columns = N, .depth = length,
                  .a = K.data, .row_step = CHUNK, .k_step = 1, .b = shared.C.data, .b_step = N,
                  .init = dB.data, .part = Part::UPPER});
    }
};

// Sums the shares (parts, rows of the batch, tokens, channels) of a gradient, in order, into `to`.
void add_shares(const Rows& to, const float* shares, int64_t parts, const Scan& s) {
    int64_t channels = s.groups * s.n, total = s.sequences.total(), tokens = s.sequences.tokens;
#pragma omp parallel for num_threads(s.threads)
    for (int64_t at = 0; at < total; at++)
        for (int64_t i = 0; i < channels; i += W) {
            F v{};
            for (int64_t part = 0; part < parts; part++)
                v += load(shares + (part * total + at) * channels + i, channels - i);
            to.store(at / tokens, at % tokens, i, v, channels - i);
        }
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void ssd_scan_forward(const Scan* scan, const ForwardOut* out) {
    const Scan& s = *scan;
    Jobs jobs(s, 16);
#pragma omp parallel num_threads(jobs.threads())
    {
        FlushDenormals flush;
        Forward forward(s, *out, jobs.job_heads);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < jobs.count; i++) forward.run(jobs.at(i));
    }
}

EXPORT void ssd_scan_backward(const Scan* scan, const BackwardOut* gradients) {
    const Scan& s = *scan;
    const BackwardOut& out = *gradients;
    Jobs jobs(s, 4);
    bool add = jobs.group_jobs > 1;  // then dB and dC are sums over jobs
    int64_t channels = s.groups * s.n, row = s.sequences.tokens * channels;
    int64_t share = add ? s.sequences.total() * channels : 0;
    Scratch dB(jobs.group_jobs * share), dC(jobs.group_jobs * share);
#pragma omp parallel num_threads(jobs.threads())
    {
        FlushDenormals flush;
        Backward backward(s, out, jobs.job_heads);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < jobs.count; i++) {
            int64_t at = i % jobs.group_jobs * share;
            Rows to_dB{(char*)(dB.data + at), FLOAT32, row, channels}, to_dC = to_dB;
            to_dC.data = (char*)(dC.data + at);
            backward.run(jobs.at(i), add ? to_dB : out.dB, add ? to_dC : out.dC);
        }
    }
    if (!add) return;
    add_shares(out.dB, dB.data, jobs.group_jobs, s);
    add_shares(out.dC, dC.data, jobs.group_jobs, s);
}
