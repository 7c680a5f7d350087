// How threads divide blocks of channels and sequences when gradients are sums over either.
//
// Each thread adds up its own share, then shares are added in a fixed order: no atomics, and the same
// bits every time for the same number of threads.
#pragma once

#include "vec.h"

namespace effpass {

// `across` shares of the channels times `along` shares of the sequences.
struct Grid {
    int64_t across, along, blocks;

    Grid(int64_t channels, const Sequences& all, int64_t threads)
        : across(1), along(1), blocks((channels + W - 1) / W) {
        int64_t least = INT64_MAX;
        for (int64_t a = 1; a <= threads && a <= blocks; a++) {
            int64_t b = threads / a < all.count ? threads / a : all.count;
            if (b < 1) b = 1;
            int64_t most = (blocks + a - 1) / a * ((all.count + b - 1) / b);
            if (most <= least) least = most, across = a, along = b;
        }
    }
    int64_t shares() const { return across * along; }
    int64_t first_block(int64_t share) const { return blocks * (share % across) / across; }
    int64_t end_block(int64_t share) const { return blocks * (share % across + 1) / across; }

    // Sequences of a share: consecutive, and about as many tokens as those of the others.
    int64_t first_sequence(int64_t share, const Sequences& all) const {
        return boundary(share / across, all);
    }
    int64_t end_sequence(int64_t share, const Sequences& all) const {
        return boundary(share / across + 1, all);
    }

   private:
    int64_t boundary(int64_t part, const Sequences& all) const {
        if (part == along) return all.count;
        int64_t before = 0, target = all.total() * part / along, i = 0;
        while (i < all.count && before < target) before += all.length(i++);
        return i;
    }
};

// out[i] = sum of the `parts` arrays of `count` floats, first to last; `out` may be the first.
inline void add_up(const float* from, int64_t parts, int64_t count, float* out, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float total = 0.0f;
        for (int64_t p = 0; p < parts; p++) total += from[p * count + i];
        out[i] = total;
    }
}

}  // namespace effpass
