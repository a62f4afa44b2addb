// Whole numbers from -most to most, as sums of ternary numbers are, in `BITS` bits each. Layout: kernels/counts.py.
#pragma once

#include "quantise.hpp"
#include "quotient.hpp"

namespace HC_LEVEL {

template <int BITS> void counts_encode_as(const float* x, size_t numel, int most, uint8_t* codes) {
    for (size_t i = 0; i < numel; i += QUANTISED_BLOCK, codes += QUANTISED_BLOCK / 8 * BITS) {
        I8 words[BITS];
        for (int w = 0; w < BITS; w++) {
            words[w] = iset(0);
        }
        const auto put = [&](int row, I8 code) HC_INLINE {
            const int bit = row * BITS, word = bit / 32, offset = bit % 32;
            words[word] = words[word] | shl(code, offset);
            if (offset + BITS > 32) {
                words[word + 1] = words[word + 1] | shr(code, 32 - offset);
            }
        };
        if (numel - i >= QUANTISED_BLOCK) {
            HC_UNROLL(32)
            for (int row = 0; row < BLOCK_ROWS; row++) {
                put(row, truncate(load(x + i + row * LANES)) + iset(most));
            }
        } else {
            const int32_t lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7};
            for (size_t first = i; first < numel; first += LANES) {
                const F8 v = numel - first >= LANES ? load(x + first) : load(x + first, numel - first);
                const Mask inside = igreater(iset(static_cast<int32_t>(numel - first)), iload(lanes));
                put(static_cast<int>((first - i) / LANES), (truncate(v) + iset(most)) & inside);
            }
        }
        for (int w = 0; w < BITS; w++) {
            istore(codes + w * 32, words[w]);
        }
    }
}

// out = number * scaler / divisor, NaN for a code past the largest; returns the largest |out| as bits.
template <int BITS>
int32_t counts_decode_as(const uint8_t* codes, size_t numel, int most, float scaler, float divisor, float* out) {
    Quotients<false> quotients(out, numel, divisor);
    const F8 scale = fset(scaler), invalid = fset(__builtin_nanf(""));
    for (size_t i = 0; i < numel; i += QUANTISED_BLOCK, codes += QUANTISED_BLOCK / 8 * BITS) {
        I8 words[BITS];
        for (int w = 0; w < BITS; w++) {
            words[w] = iload(codes + w * 32);
        }
        const auto take = [&](int row) HC_INLINE {
            const int bit = row * BITS, word = bit / 32, offset = bit % 32;
            I8 code = shr(words[word], offset);
            if (offset + BITS > 32) {
                code = code | shl(words[word + 1], 32 - offset);
            }
            code = code & iset((1 << BITS) - 1);
            const F8 value = to_float(code - iset(most)) * scale;
            quotients.put(i + row * LANES, select(igreater(code, iset(2 * most)), invalid, value));
        };
        if (numel - i >= QUANTISED_BLOCK) {
            HC_UNROLL(32)
            for (int row = 0; row < BLOCK_ROWS; row++) {
                take(row);
            }
        } else {
            for (int row = 0; i + row * LANES < numel; row++) {
                take(row);
            }
        }
    }
    return quotients.end();
}

}  // namespace HC_LEVEL
