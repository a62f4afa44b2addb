// One bit an element, its sign, and the mean magnitude of its bucket, with error feedback. Layout: kernels/quantise.py,
// of one bit; quantise_sum.hpp adds them up.
#pragma once

#include "feedback.hpp"
#include "quantise.hpp"

namespace HC_LEVEL {

// Writes what has accumulated of a bucket to `kept`. Returns its mean magnitude, summed in float64 in eight lanes and
// these by halves; the largest magnitude goes to `largest`, as bits.
template <class T> float accumulate_bucket(const Accumulated<T>& x, float* kept, size_t begin, size_t end, I8* largest) {
    D8 sum = dset(0);
    I8 most = *largest;
    for (size_t i = begin; i < end; i += LANES) {
        const size_t count = end - i < LANES ? end - i : LANES;
        const F8 v = x(i, count);
        most = imax(most, magnitude_bits(v));
        sum = sum + widen(fabs8(v));
        count == LANES ? fstore(kept + i, v) : fstore(kept + i, v, count);
    }
    *largest = most;
    double lanes[LANES];
    dstore(lanes, sum);
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return static_cast<float>(lanes[0] / static_cast<double>(end - begin));
}

// Writes the signs of a block of 256 elements, of which `count` are there, and takes what they say off `kept`.
inline void take_signs(float* kept, size_t count, float mean, uint8_t* codes) {
    const I8 means = iset(as_int(mean)), sign = iset(INT32_MIN), one = iset(1);
    I8 words = iset(0);
    const auto take = [&](F8 v, int row) HC_INLINE {
        words = words | shl(shr(as_int(v), 31) ^ one, row);
        return v - as_float((as_int(v) & sign) | means);
    };
    if (count == QUANTISED_BLOCK) {
        HC_UNROLL(32)
        for (int row = 0; row < BLOCK_ROWS; row++) {
            fstore(kept + row * LANES, take(fload(kept + row * LANES), row));
        }
    } else {
        for (size_t i = 0; i < count; i += LANES) {
            const size_t present = count - i < LANES ? count - i : LANES;
            F8 v = load(kept + i, present);
            if (present < LANES) {  // whose bits are 0, as those of negative numbers
                const Mask absent = igreater(iota(), iset(static_cast<int32_t>(present) - 1));
                v = as_float(as_int(v) | (absent & sign));
            }
            fstore(kept + i, take(v, static_cast<int>(i / LANES)), present);
        }
    }
    istore(codes, words);
}

// Returns 0, or -1 where a value is not finite. `bucket` is a multiple of 256.
template <class T>
int sign_encode_as(const Accumulated<T>& x, float* kept, size_t numel, size_t bucket, uint8_t* means, uint8_t* codes) {
    I8 largest = iset(0);
    for (size_t start = 0; start < numel; start += bucket, means += 4) {
        const size_t end = numel - start < bucket ? numel : start + bucket;
        prefetch_ahead(x.gradient + start, end - start);
        const float mean = accumulate_bucket(x, kept, start, end, &largest);
        std::memcpy(means, &mean, 4);
        for (size_t i = start; i < end; i += QUANTISED_BLOCK, codes += QUANTISED_BLOCK / 8) {
            take_signs(kept + i, end - i < QUANTISED_BLOCK ? end - i : QUANTISED_BLOCK, mean, codes);
        }
    }
    return top(largest) >= INFINITY_BITS ? -1 : 0;
}

}  // namespace HC_LEVEL
