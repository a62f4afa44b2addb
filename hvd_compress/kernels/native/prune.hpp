// Stochastic pruning (Ye et al., ECCV 2020): what is below the threshold becomes it, or zero, without a bias.
#pragma once

#include "load.hpp"
#include "random.hpp"

namespace HC_LEVEL {

struct Pruned {
    double sum;  // of |x|
    uint64_t below;
};

// The pruned tensor itself, of the same type; what is not finite stays. `out` may be `x`.
template <bool NORMAL>
Pruned prune_dense_as(const float* x, size_t numel, float threshold, uint64_t key, float* out) {
    const Stream stream(key);
    const Uniform<NORMAL> uniform(threshold);
    const F8 thresholds = fset(threshold);
    D8 sum[2] = {dset(0), dset(0)};
    I8 below = iset(0);
    Pruned result = {0, 0};
    const auto take = [&](F8 v, I8 random, int k) {
        const F8 magnitude = fabs8(v);
        sum[k] = sum[k] + widen(magnitude);
        const Mask small = fless(magnitude, thresholds), chosen = fless(uniform(random), magnitude);
        below = below - small;
        const I8 sign = as_int(v) & iset(INT32_MIN);
        return select(small, as_float(sign | (chosen & as_int(thresholds))), v);
    };
    const auto settle = [&] {
        int32_t lanes[LANES];
        istore(lanes, below);
        for (int lane = 0; lane < LANES; lane++) {
            result.below += static_cast<uint64_t>(lanes[lane]);
        }
        below = iset(0);
    };
    size_t i = 0;
    for (; i + 4 * LANES <= numel; i += 4 * LANES) {
        prefetch_ahead(x + i, 4 * LANES);
        for (int row = 0; row < 4; row++) {
            const size_t first = i + static_cast<size_t>(row) * LANES;
            fstore(out + first, take(load(x + first), stream.bits(stream.counters(first)), row % 2));
        }
        if (i % (size_t{1} << 30) == 0) {
            settle();
        }
    }
    for (; i < numel; i += LANES) {
        const size_t present = numel - i < LANES ? numel - i : LANES;
        float eight[LANES];
        fstore(eight, take(load(x + i, present), stream.bits(stream.counters(i)), 0));
        std::memcpy(out + i, eight, present * sizeof(float));
        if (present < LANES) {  // the zeros that fill up the last eight are below, too
            result.below -= threshold > 0 ? LANES - present : 0;
        }
    }
    settle();
    double lanes[LANES];
    dstore(lanes, sum[0] + sum[1]);
    for (int lane = 0; lane < LANES; lane++) {
        result.sum += lanes[lane];
    }
    return result;
}

}  // namespace HC_LEVEL
