// What the forward and the backward of ssd_scan share: arguments, jobs, and the parts of a chunk that
// depend on dt alone (Steps) or on a group's B and C alone (Shared).
#pragma once

#include "denormals.h"
#include "gemm.h"

namespace effpass {

constexpr int64_t CHUNK = 64;   // tokens; the products inside a chunk grow with it, those with states shrink
constexpr int64_t SHORT = 4;    // sequences up to this length go token by token: no products, no transposing
constexpr int64_t BLOCK = 16;   // scratch rows are padded to this: a multiple of W and of ROUND

// ---- arguments: the same fields as in ssd_scan.py ------------------------------------------------

struct Scan {
    Rows x, dt, B, C, z;  // channels: heads * p, heads, groups * n twice, heads * p
    const float *A, *D, *dt_bias, *start;
    Sequences sequences;
    int64_t heads, groups, p, n, softplus, threads;
    float dt_min, dt_max;
};

struct ForwardOut {
    Rows y;
    float* final_state;
};

struct BackwardOut {
    Rows dy, dx, ddt, dB, dC, dz;
    const float* dfinal_state;
    float* dstart;             // null without start
    float *dA, *dD, *ddt_bias;  // (sequences, heads), to be summed over sequences
};

// `count` channels of a token to `to`, zeros up to a multiple of BLOCK.
inline void read(float* to, const Rows& from, int64_t row, int64_t token, int64_t channel, int64_t count) {
    int64_t i = 0;
    for (; i < count; i += W) store(to + i, from.load(row, token, channel + i, count - i));
    for (; i < round_up(count, BLOCK); i += W) store(to + i, F{});
}

inline void write(const Rows& to, int64_t row, int64_t token, int64_t channel, const float* from,
                  int64_t count) {
    for (int64_t i = 0; i < count; i += W)
        to.store(row, token, channel + i, load(from + i), count - i);
}

inline float read_one(const Rows& from, int64_t row, int64_t token, int64_t channel) {
    if (from.storage == FLOAT32) return *(const float*)from.at(row, token, channel);
    return from.load(row, token, channel, 1)[0];
}

inline void write_one(const Rows& to, int64_t row, int64_t token, int64_t channel, float v) {
    if (to.storage == FLOAT32) *(float*)to.at(row, token, channel) = v;
    else to.store(row, token, channel, splat(v), 1);
}

// ---- what forward and backward share -------------------------------------------------------------

struct Job {
    int64_t sequence, group, head, heads;
    int64_t row, token, length;  // where the sequence lies
};

struct Piece {  // one head of a job in one chunk
    int64_t sequence, row, token, length, head;

    Piece(const Job& job, int64_t start, int64_t length, int64_t head)
        : sequence(job.sequence), row(job.row), token(job.token + start), length(length), head(head) {}
};

// Where the state (p, n) of a head begins.
inline int64_t state_at(const Scan& s, int64_t sequence, int64_t head) {
    return (sequence * s.heads + head) * s.p * s.n;
}

struct Jobs {
    const Scan& s;
    int64_t group_heads, job_heads, group_jobs, count;

    // As many heads a job, up to `most`, as leaves each thread a few jobs.
    Jobs(const Scan& s, int64_t most) : s(s) {
        group_heads = s.heads / s.groups;
        int64_t wanted = s.sequences.count * s.heads / (3 * s.threads);
        job_heads = std::max<int64_t>(1, std::min({wanted, most, group_heads}));
        group_jobs = (group_heads + job_heads - 1) / job_heads;
        count = s.sequences.count * s.groups * group_jobs;
    }

    int64_t threads() const { return std::clamp<int64_t>(count, 1, s.threads); }

    Job at(int64_t i) const {
        Job job;
        int64_t part = i % group_jobs * job_heads;
        job.group = i / group_jobs % s.groups;
        job.sequence = i / group_jobs / s.groups;
        job.head = job.group * group_heads + part;
        job.heads = std::min(job_heads, group_heads - part);
        job.row = s.sequences.batch(job.sequence);
        job.token = s.sequences.begin(job.sequence);
        job.length = s.sequences.length(job.sequence);
        return job;
    }
};

struct Steps {  // of one head in one chunk
    alignas(64) float raw[CHUNK], soft[CHUNK], dt[CHUNK];  // with bias; after softplus; after clamping
    alignas(64) float high[CHUNK], low[CHUNK];             // c = high + low
    alignas(64) float enter[CHUNK], leave[CHUNK];          // e^c[t], e^(c[last] - c[t])
    float total;                                           // e^c[last]

    void read(const Scan& s, const Piece& at) {
        int64_t length = at.length;
        float bias = s.dt_bias ? s.dt_bias[at.head] : 0.0f;
        for (int64_t t = 0; t < CHUNK; t++)
            raw[t] = t < length ? read_one(s.dt, at.row, at.token + t, at.head) + bias : 0.0f;
        for (int64_t t = 0; t < length; t += W) {
            F v = load(raw + t);
            v = s.softplus ? effpass::softplus(v) : v;
            store(soft + t, v);
            store(dt + t, at_most(splat(s.dt_max), at_least(splat(s.dt_min), v)));
        }
        accumulate(s.A[at.head], length);
    }

    // Beyond 1e6 an exponential is 0 or inf already; the bound keeps the digits of what follows.
    void accumulate(float A, int64_t length) {
        double sum = 0;
        for (int64_t t = 0; t < CHUNK; t++) {
            if (t < length) {
                double v = (double)dt[t] * A;
                sum += v < -1e6 ? -1e6 : v > 1e6 ? 1e6 : v;
            }
            high[t] = (float)sum;
            low[t] = (float)(sum - high[t]);
        }
        F last_high = splat(high[CHUNK - 1]), last_low = splat(low[CHUNK - 1]);
        for (int64_t t = 0; t < length; t += W) {
            F h = load(high + t), l = load(low + t);
            store(enter + t, exp(h + l));
            store(leave + t, exp((last_high - h) + (last_low - l)));
        }
        total = enter[length - 1];
    }

    // e^(c[i] - c[j]) for W tokens i from `at`.
    F decay(int64_t j, int64_t at) const {
        return exp((load(high + at) - splat(high[j])) + (load(low + at) - splat(low[j])));
    }
};

// The chunk's B and C, and their products, for all heads of a group.
struct Shared {
    int64_t N;  // n, padded
    Scratch B, C, C_turned, CB;  // (CHUNK, N), (CHUNK, N), (N, CHUNK); C[i] . B[j] at [j][i], i >= j

    explicit Shared(const Scan& s)
        : N(round_up(s.n, BLOCK)), B(CHUNK * N), C(CHUNK * N), C_turned(N * CHUNK), CB(CHUNK * CHUNK) {}

    void read_B(const Scan& s, const Job& job, int64_t start, int64_t length) {
        for (int64_t t = 0; t < length; t++)
            read(B.data + t * N, s.B, job.row, job.token + start + t, job.group * s.n, s.n);
    }

    void read_all(const Scan& s, const Job& job, int64_t start, int64_t length) {
        read_B(s, job, start, length);
        for (int64_t t = 0; t < length; t++)
            read(C.data + t * N, s.C, job.row, job.token + start + t, job.group * s.n, s.n);
        int64_t padded = round_up(length, W);
        std::fill(C.data + length * N, C.data + padded * N, 0.0f);
        transpose(C_turned.data, CHUNK, C.data, N, padded, N);
        multiply({.out = CB.data, .out_step = CHUNK, .rows = length, .columns = padded, .depth = s.n,
                  .a = B.data, .row_step = N, .k_step = 1, .b = C_turned.data, .b_step = CHUNK,
                  .part = Part::OUT_UPPER});
    }
};

inline void scale_rows(float* to, const float* from, const float* by, int64_t rows, int64_t columns) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < columns; i += W)
            store(to + t * columns + i, load(from + t * columns + i) * splat(by[t]));
}

inline float dot(const float* a, const float* b, int64_t count) {  // count: a multiple of W
    F total{};
    for (int64_t i = 0; i < count; i += W) total = fma(load(a + i), load(b + i), total);
    return sum(total);
}

}  // namespace effpass
