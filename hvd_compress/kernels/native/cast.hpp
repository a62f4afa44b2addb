// bfloat16 on the wire: rounding to it, and the sum of what several ranks sent.
#pragma once

#include "blocks.hpp"
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
    constexpr size_t ROWS = CACHE_LINE / sizeof(BFloat) / LANES;  // whose values fill a line
    const auto add = [&](auto count, Place place, size_t rows, auto from, auto to) HC_INLINE {
        constexpr int COUNT = decltype(count)::value;
        const Place next = place.after(COUNT, ranks);
        const BFloat* values[GROUP];
        for (int r = 0; r < COUNT; r++) {
            values[r] = reinterpret_cast<const BFloat*>(payloads[place.rank + r]) + place.start;
        }
        const size_t full = (numel - place.start) / LANES;  // rows with eight elements, `rows` and more
        size_t row = 0;
        for (; row + ROWS <= rows && row + ROWS <= full; row += ROWS) {
            for (int r = 0; r < COUNT && next.rank + r < ranks; r++) {
                prefetch(payloads[next.rank + r] + sizeof(BFloat) * (next.start + row * LANES));
            }
            for (size_t k = row; k < row + ROWS; k++) {
                F8 total = from(k);
                for (int r = 0; r < COUNT; r++) {
                    total = total + load(values[r] + k * LANES);
                }
                to(k, total);
            }
        }
        for (; row < rows; row++) {
            const size_t left = numel - place.start - row * LANES;
            F8 total = from(row);
            for (int r = 0; r < COUNT; r++) {
                const BFloat* const eight = values[r] + row * LANES;
                total = total + (left >= LANES ? load(eight) : load(eight, left));
            }
            to(row, total);
        }
    };
    return sum_groups<STREAMED>(ranks, numel, divisor, out, add);
}

inline int32_t bfloat_sum(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    return (can_stream(out, numel) ? bfloat_sum_as<true> : bfloat_sum_as<false>)(payloads, ranks, numel, divisor, out);
}

}  // namespace HC_LEVEL
