// Stochastic pruning (Ye et al., ECCV 2020): what is below the threshold becomes it, or zero, without a bias.
// Layout of payloads: kernels/prune.py.
#pragma once

#include "compact.hpp"
#include "load.hpp"
#include "random.hpp"
#include "ternary.hpp"

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

// Codes of 128 elements, or of the `present` that are left: 0; 1 and 2, plus and minus the threshold; 3, sent as it is.
// These go to `exact`, which has room for all and eight more; their number is returned.
template <class T, class U>
HC_INLINE inline size_t prune_block(
    const T* x, size_t present, I8 below, const U& uniform, const Stream& stream, I8 counters, I8* largest,
    uint8_t* codes, uint8_t* exact) {
    I8 words = iset(0);
    size_t count = 0;
    const auto take = [&](F8 v, int row) HC_INLINE {
        const I8 magnitude = magnitude_bits(v);
        *largest = imax(*largest, magnitude);
        const Mask sent = igreater(magnitude, below);
        const Mask chosen = fless(uniform(stream.bits(counters + iset(row * LANES))), as_float(magnitude));
        const I8 sign = by_sign(v, iset(1 << (2 * row)), iset(static_cast<int32_t>(2u << (2 * row))));
        words = words | (chosen & sign) | (sent & iset(static_cast<int32_t>(3u << (2 * row))));
        count += compact_bytes(exact + 4 * count, v, bits(sent));
    };
    if (present == TERNARY_BLOCK) {
        prefetch_ahead(x, TERNARY_BLOCK);
        HC_UNROLL(16)
        for (int row = 0; row < 16; row++) {
            take(load(x + row * LANES), row);
        }
    } else {
        for (size_t i = 0; i < present; i += LANES) {
            const F8 v = present - i >= LANES ? load(x + i) : load(x + i, present - i);
            take(v, static_cast<int>(i / LANES));
        }
    }
    istore(codes, words);
    return count;
}

// Writes codes, and after them the elements that are sent as they are. Returns how many those are; -1 where an element is
// not finite; -2 where there are more than `capacity`.
template <bool NORMAL, class T>
int64_t prune_encode_as(const T* x, size_t numel, float threshold, uint64_t key, uint8_t* codes, size_t capacity) {
    const Stream stream(key);
    const Uniform<NORMAL> uniform(threshold);
    const int32_t bits = as_int(threshold);
    const I8 below = iset(bits > 1 ? bits - 1 : 0);  // zeros are never sent
    uint8_t* values = codes + ternary_code_bytes(numel);
    I8 largest = iset(0);
    size_t count = 0;
    bool full = false;
    for (size_t i = 0; i < numel; i += TERNARY_BLOCK, codes += TERNARY_BLOCK / 4) {
        const size_t present = numel - i < TERNARY_BLOCK ? numel - i : TERNARY_BLOCK;
        const I8 counters = stream.counters(i);
        if (!full && capacity - count >= TERNARY_BLOCK + LANES) {
            uint8_t* const exact = values + 4 * count;
            count += prune_block(x + i, present, below, uniform, stream, counters, &largest, codes, exact);
            continue;
        }
        uint8_t exact[4 * (TERNARY_BLOCK + LANES)];
        const size_t more = prune_block(x + i, present, below, uniform, stream, counters, &largest, codes, exact);
        full = full || more > capacity - count;
        if (!full) {
            std::memcpy(values + 4 * count, exact, 4 * more);
            count += more;
        }
    }
    return top(largest) >= INFINITY_BITS ? -1 : full ? -2 : static_cast<int64_t>(count);
}

template <class T>
int64_t prune_encode(const T* x, size_t numel, float threshold, uint64_t key, uint8_t* codes, size_t capacity) {
    return (is_normal(threshold) ? prune_encode_as<true, T> : prune_encode_as<false, T>)(
        x, numel, threshold, key, codes, capacity);
}

}  // namespace HC_LEVEL
