// bfloat16 on the wire: rounding to it, and the sum of what several ranks sent.
#pragma once

#include "load.hpp"
#include "quotient.hpp"

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
        uint8_t halves[2 * LANES];
        store_halves(present == LANES ? out + 2 * i : halves, rounded);
        if (present < LANES) {
            std::memcpy(out + 2 * i, halves, 2 * present);
        }
    }
    return top(largest) >= INFINITY_BITS ? -1 : 0;
}

// Adds up what the ranks sent. Returns the largest magnitude as bits.
template <bool STREAMED>
int32_t bfloat_sum_as(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    Quotients<STREAMED> quotients(out, numel, divisor);
    for (size_t i = 0; i < numel; i += LANES) {
        F8 total = fset(0);
        for (int r = 0; r < ranks; r++) {
            const BFloat* values = reinterpret_cast<const BFloat*>(payloads[r]) + i;
            total = total + (numel - i >= LANES ? load(values) : load(values, numel - i));
        }
        quotients.put(i, total);
    }
    return quotients.end();
}

inline int32_t bfloat_sum(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    return (can_stream(out, numel) ? bfloat_sum_as<true> : bfloat_sum_as<false>)(payloads, ranks, numel, divisor, out);
}

}  // namespace HC_LEVEL
