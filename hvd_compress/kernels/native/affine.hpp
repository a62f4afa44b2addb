// Codes of BITS bits between the smallest and the largest value of each block of 256. Layout: kernels/affine.py.
#pragma once

#include "quantise.hpp"

namespace HC_LEVEL {

struct Range {
    float low, unit;  // the smallest value, and what a code adds to it
};

inline float smallest(F8 a) {
    float lanes[LANES];
    fstore(lanes, a);
    for (int i = 1; i < LANES; i++) {
        lanes[0] = lanes[i] < lanes[0] ? lanes[i] : lanes[0];
    }
    return lanes[0];
}

// One block, filled up to 256 values. Returns 0, or -1 where a value, or the difference of two, is not finite.
template <int BITS>
__attribute__((noinline)) int affine_block(float* values, size_t count, const Stream& stream, size_t start_of_block,
                                           uint8_t* range_out, uint8_t* codes) {
    F8 low = fload(values), negated_high = fset(0) - low;
    I8 largest = iset(0);
    for (size_t k = 0; k < QUANTISED_BLOCK; k += LANES) {
        const F8 v = fload(values + k);
        low = fmin(low, v);
        negated_high = fmin(negated_high, fset(0) - v);
        largest = imax(largest, magnitude_bits(v));
    }
    const float start = smallest(low) + 0.0f, span = -smallest(negated_high) - start;  // no negative zero
    if (top(largest) >= INFINITY_BITS || as_int(span) >= INFINITY_BITS) {
        return -1;
    }
    const float most = (1 << BITS) - 1, factor = most / span;
    const bool flat = !(span > 0) || as_int(factor) >= INFINITY_BITS;
    const Range range = {start, flat ? 0 : span / most};
    std::memcpy(range_out, &range, sizeof range);
    for (size_t k = count; k < QUANTISED_BLOCK; k++) {
        values[k] = start;  // its code is 0
    }
    I8 words[BITS];
    for (int w = 0; w < BITS; w++) {
        words[w] = iset(0);
    }
    const F8 levels = fset(most);
    const I8 counters = stream.counters(start_of_block);
    HC_UNROLL(32)
    for (int row = 0; row < BLOCK_ROWS; row++) {
        const F8 u = to_float(stream.bits(counters + iset(row * LANES))) * fset(0x1p-24f);
        const F8 place = (fload(values + row * LANES) - fset(start)) * fset(flat ? 0 : factor);
        const I8 code = truncate(fmin(place + u, levels));
        const int bit = row * BITS, word = bit / 32, offset = bit % 32;
        words[word] = words[word] | shl(code, offset);
        if (offset + BITS > 32) {
            words[word + 1] = words[word + 1] | shr(code, 32 - offset);
        }
    }
    for (int w = 0; w < BITS; w++) {
        istore(codes + w * 32, words[w]);
    }
    return 0;
}

using AffineBlock = int (*)(float*, size_t, const Stream&, size_t, uint8_t*, uint8_t*);

// Every block through one function, which is compiled once for all types. Returns what that does.
template <class T>
int affine_encode(const T* x, size_t numel, int bits, AffineBlock block, uint64_t key, uint8_t* payload) {
    const Stream stream(key);
    uint8_t* codes = payload + (numel + QUANTISED_BLOCK - 1) / QUANTISED_BLOCK * sizeof(Range);
    for (size_t i = 0; i < numel; i += QUANTISED_BLOCK, payload += sizeof(Range), codes += 32 * bits) {
        const size_t count = numel - i < QUANTISED_BLOCK ? numel - i : QUANTISED_BLOCK;
        float values[QUANTISED_BLOCK];
        for (size_t k = 0; k < count; k += LANES) {
            fstore(values + k, count - k >= LANES ? load(x + i + k) : load(x + i + k, count - k));
        }
        for (size_t k = count; k < QUANTISED_BLOCK; k++) {
            values[k] = values[0];
        }
        if (block(values, count, stream, i, payload, codes)) {
            return -1;
        }
    }
    return 0;
}

template <int BITS> void affine_decode_as(const uint8_t* payload, size_t numel, float* out) {
    const uint8_t* codes = payload + (numel + QUANTISED_BLOCK - 1) / QUANTISED_BLOCK * sizeof(Range);
    for (size_t i = 0; i < numel; i += QUANTISED_BLOCK, payload += sizeof(Range), codes += 32 * BITS) {
        Range range;
        std::memcpy(&range, payload, sizeof range);
        const F8 low = fset(range.low), unit = fset(range.unit);
        float tail[QUANTISED_BLOCK];
        float* const to = numel - i < QUANTISED_BLOCK ? tail : out + i;
        I8 words[BITS];
        for (int w = 0; w < BITS; w++) {
            words[w] = iload(codes + w * 32);
        }
        HC_UNROLL(32)
        for (int row = 0; row < BLOCK_ROWS; row++) {
            const int bit = row * BITS, word = bit / 32, offset = bit % 32;
            I8 code = shr(words[word], offset);
            if (offset + BITS > 32) {
                code = code | shl(words[word + 1], 32 - offset);
            }
            fstore(to + row * LANES, low + to_float(code & iset((1 << BITS) - 1)) * unit);
        }
        if (to == tail) {
            std::memcpy(out + i, tail, (numel - i) * sizeof(float));
        }
    }
}

}  // namespace HC_LEVEL
