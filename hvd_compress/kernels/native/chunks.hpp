// The largest of each chunk, as ScaleCom's leader picks them.
#pragma once

#include "load.hpp"

namespace HC_LEVEL {

// Puts the position of the largest |x|, of equals the first, of each chunk of `chunk` >= 1 into `positions`; `x` finite.
inline void chunk_largest(const float* x, size_t numel, size_t chunk, int64_t* positions) {
    for (size_t begin = 0; begin < numel; begin += chunk) {
        const size_t end = numel - begin < chunk ? numel : begin + chunk;
        I8 largest = iset(0);
        size_t i = begin;
        for (; i + LANES <= end; i += LANES) {
            largest = imax(largest, magnitude_bits(fload(x + i)));
        }
        if (i < end) {
            largest = imax(largest, magnitude_bits(load(x + i, end - i)));
        }
        const int32_t most = top(largest);
        for (i = begin; (as_int(x[i]) & INT32_MAX) != most; i++) {
        }
        *positions++ = static_cast<int64_t>(i);
    }
}

}  // namespace HC_LEVEL
