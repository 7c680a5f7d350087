// linear_recurrence, h[t] = a[t] h[t-1] + b[t], and its gradient.
//
// A job is a range of channels of one sequence. It goes through CHUNK tokens at a time, and through a
// chunk a few vectors of channels at a time, so that a page of memory is done with before the next.
// The gradient needs h[t-1]: the states at the start of every chunk are computed first, then, from the
// last chunk to the first, the states inside the chunk once more.
#include <algorithm>

#include "denormals.h"
#include "vec.h"

namespace {
using namespace effpass;

constexpr int64_t CHUNK = 64;
constexpr int VECTORS = 4;  // enough independent recurrences to hide the latency of one
constexpr int64_t WIDTH = VECTORS * W;

// ---- arguments: the same fields as in linear_recurrence.py ---------------------------------------

struct Recurrence {
    Rows a, b;
    const float* start;  // (sequences, channels), or null
    Sequences sequences;
    int64_t channels, threads;
};

struct ForwardOut {
    Rows h;
    float* final_state;
};

struct BackwardOut {
    Rows dh, da, db;
    const float* dfinal_state;
    float* dstart;  // null without start
};

struct Jobs {
    const Recurrence& r;
    int64_t ranges, width;  // of channels, in one sequence; a multiple of WIDTH

    explicit Jobs(const Recurrence& r) : r(r) {
        int64_t most = (r.channels + WIDTH - 1) / WIDTH;
        ranges = std::min(most, 1 + 2 * r.threads / std::max<int64_t>(1, r.sequences.count));
        width = ranges ? (most + ranges - 1) / ranges * WIDTH : WIDTH;
    }
    int64_t count() const { return r.sequences.count * ranges; }
};

struct Job {
    int64_t row, begin, length, first, last, state;  // channels first..last; index of the sequence's states

    Job(const Jobs& jobs, int64_t i) {
        int64_t sequence = i / jobs.ranges;
        row = jobs.r.sequences.batch(sequence);
        begin = jobs.r.sequences.begin(sequence);
        length = jobs.r.sequences.length(sequence);
        first = std::min(jobs.r.channels, i % jobs.ranges * jobs.width);
        last = std::min(jobs.r.channels, first + jobs.width);
        state = sequence * jobs.r.channels;
    }
};

struct Block {  // up to WIDTH channels of a job
    int64_t row, begin, channel, count;
};

// Visits the blocks of a job.
template <class Visit> inline void each_block(const Job& job, Visit visit) {
    for (int64_t channel = job.first; channel < job.last; channel += WIDTH)
        visit(Block{job.row, job.begin, channel, std::min(WIDTH, job.last - channel)});
}

struct Lanes {
    F v[VECTORS];

    void read(const float* from, int64_t count) {
        for (int i = 0; i < VECTORS; i++)
            v[i] = from && i * W < count ? load(from + i * W, count - i * W) : F{};
    }
    void write(float* to, int64_t count) const {
        for (int i = 0; i < VECTORS && i * W < count; i++) store(to + i * W, v[i], count - i * W);
    }
    void read(const Rows& from, const Block& block, int64_t t) {
        for (int i = 0; i < VECTORS; i++)
            v[i] = i * W < block.count
                       ? from.load(block.row, block.begin + t, block.channel + i * W, block.count - i * W)
                       : F{};
    }
    void write(const Rows& to, const Block& block, int64_t t) const {
        for (int i = 0; i < VECTORS && i * W < block.count; i++)
            to.store(block.row, block.begin + t, block.channel + i * W, v[i], block.count - i * W);
    }
};

inline void advance(const Recurrence& r, const Block& block, int64_t t, Lanes& h) {
    Lanes a, b;
    a.read(r.a, block, t);
    b.read(r.b, block, t);
    for (int i = 0; i < VECTORS; i++) h.v[i] = fma(a.v[i], h.v[i], b.v[i]);
}

void copy_states(float* to, const float* from, const Job& job) {
    if (from) std::copy(from + job.first, from + job.last, to + job.first);
    else std::fill(to + job.first, to + job.last, 0.0f);
}

void forward(const Recurrence& r, const ForwardOut& out, const Job& job) {
    float* state = out.final_state + job.state;
    copy_states(state, r.start ? r.start + job.state : nullptr, job);
    for (int64_t start = 0; start < job.length; start += CHUNK)
        each_block(job, [&](const Block& block) {
            Lanes h;
            h.read(state + block.channel, block.count);
            for (int64_t t = start; t < std::min(start + CHUNK, job.length); t++) {
                advance(r, block, t, h);
                h.write(out.h, block, t);
            }
            h.write(state + block.channel, block.count);
        });
}

// g[t] = dh[t] + a[t+1] g[t+1]; da[t] = g[t] h[t-1]; db[t] = g[t]. `h` enters as the state before
// `start`, `g` as the gradient of the state after `end`; `before` holds CHUNK states.
void backward_block(const Recurrence& r, const BackwardOut& out, const Block& block, int64_t start,
                    int64_t end, Lanes h, Lanes& g, float* before) {
    for (int64_t t = start; t < end; t++) {
        h.write(before + (t - start) * WIDTH, WIDTH);
        advance(r, block, t, h);
    }
    for (int64_t t = end - 1; t >= start; t--) {
        Lanes a, dh;
        a.read(r.a, block, t);
        dh.read(out.dh, block, t);
        h.read(before + (t - start) * WIDTH, WIDTH);
        for (int i = 0; i < VECTORS; i++) {
            g.v[i] = g.v[i] + dh.v[i];
            h.v[i] = g.v[i] * h.v[i];
        }
        g.write(out.db, block, t);
        h.write(out.da, block, t);
        for (int i = 0; i < VECTORS; i++) g.v[i] = g.v[i] * a.v[i];
    }
}

void backward(const Recurrence& r, const BackwardOut& out, const Job& job) {
    int64_t chunks = (job.length + CHUNK - 1) / CHUNK, width = job.last - job.first;
    Scratch starts((chunks + 1) * width), after(width), before(CHUNK * WIDTH);
    auto states = [&](int64_t chunk, const Block& block) {
        return starts.data + chunk * width + block.channel - job.first;
    };
    each_block(job, [&](const Block& block) {
        Lanes h, g;
        h.read(r.start ? r.start + job.state + block.channel : nullptr, block.count);
        h.write(states(0, block), block.count);
        g.read(out.dfinal_state + job.state + block.channel, block.count);
        g.write(after.data + block.channel - job.first, block.count);
    });
    for (int64_t chunk = 0; chunk + 1 < chunks; chunk++)
        each_block(job, [&](const Block& block) {
            Lanes h;
            h.read(states(chunk, block), block.count);
            for (int64_t t = 0; t < CHUNK; t++) advance(r, block, chunk * CHUNK + t, h);
            h.write(states(chunk + 1, block), block.count);
        });
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--)
        each_block(job, [&](const Block& block) {
            Lanes h, g;
            float* gradient = after.data + block.channel - job.first;
            int64_t start = chunk * CHUNK, end = std::min(start + CHUNK, job.length);
            h.read(states(chunk, block), block.count);
            g.read(gradient, block.count);
            backward_block(r, out, block, start, end, h, g, before.data);
            g.write(gradient, block.count);
        });
    if (out.dstart) std::copy_n(after.data, width, out.dstart + job.state + job.first);
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void linear_recurrence_forward(const Recurrence* recurrence, const ForwardOut* out) {
    const Recurrence& r = *recurrence;
    Jobs jobs(r);
#pragma omp parallel num_threads(r.threads)
    {
        FlushDenormals flush;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < jobs.count(); i++) forward(r, *out, Job(jobs, i));
    }
}

EXPORT void linear_recurrence_backward(const Recurrence* recurrence, const BackwardOut* out) {
    const Recurrence& r = *recurrence;
    Jobs jobs(r);
#pragma omp parallel num_threads(r.threads)
    {
        FlushDenormals flush;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < jobs.count(); i++) backward(r, *out, Job(jobs, i));
    }
}
