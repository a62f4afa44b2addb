// What sums over the ranks end with: a division, the largest magnitude, and a result that may go around the caches.
#pragma once

#include "load.hpp"

namespace HC_LEVEL {

struct Divisor {
    bool exact;  // a power of two: its reciprocal gives the same bits
    F8 factor;

    explicit Divisor(float divisor)
        : exact((as_int(divisor) & 0x7fffff) == 0), factor(fset(exact ? 1 / divisor : divisor)) {}

    F8 operator()(F8 total) const { return exact ? total * factor : total / factor; }
};

template <bool STREAMED> struct Quotients {
    float* out;
    size_t numel;
    Divisor divide;
    I8 largest;

    Quotients(float* out, size_t numel, float divisor)
        : out(out), numel(numel), divide(divisor), largest(iset(0)) {}

    // Of the eight sums from `first` on, those that there are.
    HC_INLINE void put(size_t first, F8 total) {
        F8 quotient = divide(total);
        if (numel - first >= LANES) {
            STREAMED ? fstream(out + first, quotient) : fstore(out + first, quotient);
        } else {
            fstore(out + first, quotient, numel - first);
            quotient = load(out + first, numel - first);
        }
        largest = imax(largest, magnitude_bits(quotient));
    }

    // The largest |quotient| as bits.
    int32_t end() const {
        if (STREAMED) {
            fence();
        }
        return top(largest);
    }
};

inline bool can_stream(const float* out, size_t numel) {
    return passes_caches(numel) && reinterpret_cast<uintptr_t>(out) % 32 == 0;
}

}  // namespace HC_LEVEL
