// QSGD: one norm a bucket and `BITS` bits an element, stochastically rounded. Layout: kernels/quantise.py.
#pragma once

#include "load.hpp"
#include "random.hpp"
#include "ternary.hpp"

namespace HC_LEVEL {

constexpr size_t QUANTISED_BLOCK = 256;  // elements in 8 * BITS words: every lane is a stream of 32 codes
constexpr int BLOCK_ROWS = QUANTISED_BLOCK / LANES;

// Largest |x| as bits.
template <class T> int32_t bucket_largest(const T* x, size_t numel) {
    I8 a = iset(0), b = iset(0);
    size_t i = 0;
    for (; i + 2 * LANES <= numel; i += 2 * LANES) {
        a = imax(a, magnitude_bits(load(x + i)));
        b = imax(b, magnitude_bits(load(x + i + LANES)));
    }
    for (; i < numel; i += LANES) {
        a = imax(a, magnitude_bits(numel - i >= LANES ? load(x + i) : load(x + i, numel - i)));
    }
    return top(imax(a, b));
}

// Euclidean norm: squares in float64, added in eight lanes and these by halves.
template <class T> float bucket_l2(const T* x, size_t numel) {
    D8 sum = dset(0);
    for (size_t i = 0; i < numel; i += LANES) {
        const D8 d = widen(numel - i >= LANES ? load(x + i) : load(x + i, numel - i));
        sum = sum + d * d;
    }
    double lanes[LANES];
    dstore(lanes, sum);
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return static_cast<float>(__builtin_sqrt(lanes[0]));
}

// Levels an element can take above zero; one bit only tells the sign.
constexpr int levels_of(int bits) { return bits == 1 ? 1 : (1 << (bits - 1)) - 1; }

template <int BITS> I8 quantise(F8 x, F8 factor, I8 random) {
    const F8 u = to_float(random) * fset(0x1p-24f);
    if (BITS == 1) {
        return fless(u, (x * factor + fset(1)) * fset(0.5f)) & iset(1);
    }
    const F8 level = x * factor, whole = ffloor(level);
    const I8 up = fless(u, level - whole);  // -1 where it is rounded up
    return imax(imin(truncate(whole) - up + iset(levels_of(BITS)), iset(2 * levels_of(BITS))), iset(0));
}

// Where in a block the bucket ends that `start`, the first element of a row, is in: a row, `rows` at most.
inline size_t bucket_end(size_t start, size_t bucket, size_t row, size_t rows) {
    const size_t left = (bucket - start % bucket) / LANES;
    return rows - row < left ? rows : row + left;
}

// Returns 0, or -1 where a value is not finite. `bucket` is a multiple of eight.
template <int BITS, class T>
int quantise_encode_as(
    const T* x, size_t numel, size_t bucket, bool l2, uint64_t key, bool opposite, uint8_t* norms, uint8_t* codes) {
    const Stream stream(key, opposite);
    float factors[BLOCK_ROWS];
    size_t known = 0;  // buckets whose norm is known
    float factor = 0;
    for (size_t i = 0; i < numel; i += QUANTISED_BLOCK, codes += QUANTISED_BLOCK / 8 * BITS) {
        const size_t count = numel - i < QUANTISED_BLOCK ? numel - i : QUANTISED_BLOCK;
        const size_t rows = (count + LANES - 1) / LANES;
        for (size_t row = 0; row < rows;) {
            const size_t start = i + row * LANES;
            if (start == known * bucket) {
                const size_t members = numel - start < bucket ? numel - start : bucket;
                const int32_t largest = bucket_largest(x + start, members);
                if (largest >= INFINITY_BITS) {
                    return -1;
                }
                float norm = l2 ? bucket_l2(x + start, members) : as_float(largest);
                if (as_int(norm) >= INFINITY_BITS) {
                    norm = __FLT_MAX__;  // no value is larger
                }
                factor = levels_of(BITS) / norm;
                if (as_int(factor) >= INFINITY_BITS) {
                    norm = factor = 0;  // smaller than can be divided by
                }
                std::memcpy(norms + 4 * known++, &norm, 4);
            }
            for (const size_t end = bucket_end(start, bucket, row, rows); row < end; row++) {
                factors[row] = factor;
            }
        }
        I8 words[BITS];
        for (int w = 0; w < BITS; w++) {
            words[w] = iset(0);
        }
        const I8 counters = stream.counters(i);
        const auto put = [&](int row, I8 code) {
            const int bit = row * BITS, word = bit / 32, offset = bit % 32;
            words[word] = words[word] | shl(code, offset);
            if (offset + BITS > 32) {
                words[word + 1] = words[word + 1] | shr(code, 32 - offset);
            }
        };
        if (count == QUANTISED_BLOCK) {
            HC_UNROLL(32)
            for (int row = 0; row < BLOCK_ROWS; row++) {
                if (row * LANES * sizeof(T) % CACHE_LINE == 0) {
                    prefetch_ahead(x + i + row * LANES, CACHE_LINE / sizeof(T));
                }
                const I8 random = stream.bits(counters + iset(row * LANES));
                put(row, quantise<BITS>(load(x + i + row * LANES), fset(factors[row]), random));
            }
        } else {
            for (size_t row = 0; row < rows; row++) {
                const size_t first = i + row * LANES;
                const F8 v = numel - first >= LANES ? load(x + first) : load(x + first, numel - first);
                const int32_t present[LANES] = {0, 1, 2, 3, 4, 5, 6, 7};
                const Mask inside = igreater(iset(static_cast<int32_t>(numel - first)), iload(present));
                const I8 random = stream.bits(stream.counters(first));
                put(static_cast<int>(row), quantise<BITS>(v, fset(factors[row]), random) & inside);
            }
        }
        for (int w = 0; w < BITS; w++) {
            istore(codes + w * 32, words[w]);
        }
    }
    return 0;
}

}  // namespace HC_LEVEL
