// One bit an element, its sign, and the mean magnitude of its bucket, with error feedback. Layout: kernels/quantise.py,
// of one bit; quantise_sum.hpp adds them up.
#pragma once

#include "feedback.hpp"
#include "quantise.hpp"

namespace HC_LEVEL {

constexpr size_t SIGN_ROOM = 1024;  // elements of a bucket that wait in the first cache for its mean

// Writes what has accumulated of the elements from `begin` to `end`, a bucket, to `into`. Returns their mean magnitude,
// summed in float64 in eight lanes and these by halves; the largest magnitude goes to `largest`, as bits.
template <class T> float accumulate_bucket(const Accumulated<T>& x, float* into, size_t begin, size_t end, I8* largest) {
    D8 sum = dset(0);
    I8 most = *largest;
    for (size_t i = begin; i < end; i += LANES) {
        const size_t count = end - i < LANES ? end - i : LANES;
        const F8 v = x(i, count);
        most = imax(most, magnitude_bits(v));
        sum = sum + widen(fabs8(v));
        count == LANES ? fstore(into + (i - begin), v) : fstore(into + (i - begin), v, count);
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

// Writes the signs of a block of 256 elements at `from`, of which `count` are there, and to `kept` what they do not say.
template <bool STREAMED> void take_signs(const float* from, float* kept, size_t count, float mean, uint8_t* codes) {
    const I8 means = iset(as_int(mean)), sign = iset(INT32_MIN), one = iset(1);
    I8 words = iset(0);
    const auto take = [&](F8 v, int row) HC_INLINE {
        words = words | shl(shr(as_int(v), 31) ^ one, row);
        return v - as_float((as_int(v) & sign) | means);
    };
    if (count == QUANTISED_BLOCK) {
        HC_UNROLL(32)
        for (int row = 0; row < BLOCK_ROWS; row++) {
            const F8 rest = take(fload(from + row * LANES), row);
            STREAMED ? fstream(kept + row * LANES, rest) : fstore(kept + row * LANES, rest);
        }
    } else {
        for (size_t i = 0; i < count; i += LANES) {
            const size_t present = count - i < LANES ? count - i : LANES;
            F8 v = load(from + i, present);
            if (present < LANES) {  // whose bits are 0, as those of negative numbers
                const Mask absent = igreater(iota(), iset(static_cast<int32_t>(present) - 1));
                v = as_float(as_int(v) | (absent & sign));
            }
            fstore(kept + i, take(v, static_cast<int>(i / LANES)), present);
        }
    }
    istore(codes, words);
}

// Returns 0, or -1 where a value is not finite. `bucket` is a multiple of 256; STREAMED, SIGN_ROOM at most, and `kept`
// aligned.
template <bool STREAMED, class T>
int sign_encode_as(const Accumulated<T>& x, float* kept, size_t numel, size_t bucket, uint8_t* means, uint8_t* codes) {
    alignas(32) float room[SIGN_ROOM];
    I8 largest = iset(0);
    for (size_t start = 0; start < numel; start += bucket, means += 4) {
        const size_t end = numel - start < bucket ? numel : start + bucket;
        prefetch_ahead(x.gradient + start, end - start);
        if (x.residual) {
            prefetch_ahead(x.residual + start, end - start);
        }
        float* const into = STREAMED ? room : kept + start;
        const float mean = accumulate_bucket(x, into, start, end, &largest);
        std::memcpy(means, &mean, 4);
        for (size_t i = start; i < end; i += QUANTISED_BLOCK, codes += QUANTISED_BLOCK / 8) {
            const size_t count = end - i < QUANTISED_BLOCK ? end - i : QUANTISED_BLOCK;
            take_signs<STREAMED>(into + (i - start), kept + i, count, mean, codes);
        }
    }
    if (STREAMED) {
        fence();
    }
    return top(largest) >= INFINITY_BITS ? -1 : 0;
}

template <class T>
int sign_encode_as(const Accumulated<T>& x, float* kept, size_t numel, size_t bucket, uint8_t* means, uint8_t* codes) {
    const bool streamed = passes_caches(numel) && bucket <= SIGN_ROOM && reinterpret_cast<uintptr_t>(kept) % 32 == 0;
    return (streamed ? sign_encode_as<true, T> : sign_encode_as<false, T>)(x, kept, numel, bucket, means, codes);
}

}  // namespace HC_LEVEL
