// bfloat16 on the wire: rounding to it, and the sum of what several ranks sent.
#pragma once

#include "load.hpp"

namespace HC_LEVEL {

// Nearest bfloat16, ties to even, in the low half of each lane.
inline I8 round_to_bfloat(F8 x) {
    const I8 word = as_int(x);
    return shr<16>(word + iset(0x7fff) + (shr<16>(word) & iset(1)));
}

// Returns 0, or -1 where a value is not finite, or not after rounding.
template <class T> int bfloat_encode(const T* x, size_t numel, uint8_t* out) {
    I8 largest = iset(0);
    for (size_t i = 0; i < numel; i += LANES) {
        const size_t present = numel - i < LANES ? numel - i : LANES;
        const F8 v = present == LANES ? load(x + i) : load(x + i, present);
        const I8 rounded = round_to_bfloat(v);
        // A NaN may round past the end of its exponent: its own bits tell.
        largest = imax(largest, imax(shl<16>(rounded) & iset(INT32_MAX), magnitude_bits(v)));
        int32_t words[LANES];
        uint16_t halves[LANES];
        istore(words, rounded);
        for (int lane = 0; lane < LANES; lane++) {
            halves[lane] = static_cast<uint16_t>(words[lane]);
        }
        std::memcpy(out + 2 * i, halves, 2 * present);
    }
    return top(largest) >= INFINITY_BITS ? -1 : 0;
}

inline void bfloat_sum(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    const F8 divisors = fset(divisor);
    for (size_t i = 0; i < numel; i += LANES) {
        const size_t present = numel - i < LANES ? numel - i : LANES;
        F8 total = fset(0);
        for (int r = 0; r < ranks; r++) {
            BFloat values[LANES] = {};
            std::memcpy(values, payloads[r] + 2 * i, 2 * present);
            total = total + load(values);
        }
        float eight[LANES];
        fstore(eight, divisor == 1 ? total : total / divisors);
        std::memcpy(out + i, eight, present * sizeof(float));
    }
}

}  // namespace HC_LEVEL
