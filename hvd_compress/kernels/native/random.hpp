// Counter-based random bits: the same hash as kernels/random.py, eight counters at a time.
#pragma once

#include "vec.hpp"

namespace HC_LEVEL {

constexpr int32_t OPPOSITE = 0xffffff;  // by exclusive or with it, random bits become their opposites

struct Stream {
    I8 low, high, flips;

    explicit Stream(uint64_t key, bool opposite = false)
        : low(iset(static_cast<int32_t>(key)) + iota()), high(iset(static_cast<int32_t>(key >> 32))),
          flips(iset(opposite ? OPPOSITE : 0)) {}

    // The counters of the elements first, ..., first + 7.
    I8 counters(size_t first) const { return low + iset(static_cast<int32_t>(first)); }

    // Uniform integers in [0, 2^24), one of each counter.
    I8 bits(I8 counters) const {
        I8 x = counters;
        x = x ^ shr<16>(x);
        x = x * iset(0x7feb352d);
        x = x + high;
        x = x ^ shr<15>(x);
        x = x * iset(static_cast<int32_t>(0x846ca68b));
        x = x ^ shr<16>(x);
        return shr<8>(x) ^ flips;
    }
};

// Uniform in [0, scale): bits * 2^-24 * scale, rounded once. NORMAL says that 2^-24 * scale is exact.
template <bool NORMAL> struct Uniform {
    F8 first, second;

    explicit Uniform(float scale) : first(fset(NORMAL ? 0x1p-24f * scale : 0x1p-24f)), second(fset(scale)) {}

    F8 operator()(I8 bits) const {
        const F8 x = to_float(bits) * first;
        return NORMAL ? x : x * second;
    }
};
inline bool is_normal(float scale) { return scale >= 0x1p-100f; }

}  // namespace HC_LEVEL
