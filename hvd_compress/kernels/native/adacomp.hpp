// AdaComp: of each bin what its newest gradient pushes past its largest. Layout of the payload: kernels/gaps.py, after
// the scale.
#pragma once

#include "gaps.hpp"

namespace HC_LEVEL {

constexpr size_t ADACOMP_BLOCK = 2048;  // elements, or one bin, that stay in the first cache

inline size_t adacomp_block(size_t bin_size) {
    return bin_size < ADACOMP_BLOCK ? ADACOMP_BLOCK / bin_size * bin_size : bin_size;
}
constexpr size_t ADACOMP_WORD = 64;  // elements whose choice is one mask

inline size_t adacomp_scratch_bytes(size_t bin_size) { return (adacomp_block(bin_size) + ADACOMP_WORD) * 8; }

inline int32_t largest_magnitude(const float* values, size_t count) {
    if (count < LANES) {
        return top(magnitude_bits(load(values, count)));
    }
    I8 largest = magnitude_bits(fload(values + count - LANES));
    for (size_t j = 0; j + LANES <= count; j += LANES) {
        largest = imax(largest, magnitude_bits(fload(values + j)));
    }
    return top(largest);
}

// Of `count` <= 64 reaches those that are at least `least`, as bits. Seven more can be read.
inline uint64_t reached(const int32_t* reach, size_t count, int32_t least) {
    const I8 below = iset(least - 1);
    uint64_t mask = 0;
    for (size_t j = 0; j < count; j += LANES) {
        mask |= static_cast<uint64_t>(bits(igreater(iload(reach + j), below))) << j;
    }
    return mask & ~uint64_t{0} >> (64 - count);
}

// Packs what AdaComp sends; `kept` becomes what has accumulated, less that. The scale is the mean over all bins of the
// largest |accumulated|, in float64: bin b is added to sum b % 8, in order; sums 4 to 7 are added to 0 to 3, then 2 and 3
// to 0 and 1, then 1 to 0; then comes the division, then the rounding to float32. Returns the length of the payload; -1
// where a value is not finite; -2 for more bytes than `capacity` >= 4, with all that has accumulated in `kept`.
template <class T, class Token>
int64_t adacomp_encode(
    const T* gradient, const float* residual, float* kept, size_t numel, size_t bin_size, uint8_t* payload,
    size_t capacity, void* scratch) {
    const Accumulated<T> x = {gradient, residual};
    const bool streamed = passes_caches(numel);
    const size_t block = adacomp_block(bin_size);
    float* values = static_cast<float*>(scratch);
    int32_t* reach = reinterpret_cast<int32_t*>(values + block + ADACOMP_WORD);
    GapWriter<Token> out = {payload + 4, payload + capacity, 0, false};
    double sums[LANES] = {};
    int32_t most = 0;
    size_t bin = 0;
    for (size_t begin = 0; begin < numel; begin += block) {
        const size_t end = numel - begin < block ? numel : begin + block;
        write_rows(kept, begin, end, streamed, [&](size_t i, size_t present) HC_INLINE {
            const F8 g = x.gradients(i, present), v = x.add_residual(g, i, present);
            const Mask zero = igreater(iset(1), magnitude_bits(v));
            fstore(values + (i - begin), v);
            istore(reach + (i - begin), magnitude_bits(v + g) | zero);  // -1 for what is never sent
            return v;
        });
        for (size_t start = begin; start < end; start += bin_size, bin++) {
            const size_t size = end - start < bin_size ? end - start : bin_size;
            const float* inside = values + (start - begin);
            const int32_t largest = largest_magnitude(inside, size);
            most = largest > most ? largest : most;
            sums[bin % LANES] += static_cast<double>(as_float(largest));
            for (size_t j = 0; j < size; j += ADACOMP_WORD) {
                const size_t few = size - j < ADACOMP_WORD ? size - j : ADACOMP_WORD;
                uint64_t mask = reached(reach + (start - begin) + j, few, largest);
                if (sizeof(Token) == 1) {  // one word a bin, which mostly sends some
                    out.mark_all(start, mask, inside);
                    continue;
                }
                for (; mask; mask &= mask - 1) {
                    const size_t place = j + static_cast<size_t>(__builtin_ctzll(mask));
                    out.mark(start + place, as_int(inside[place]) < 0);
                }
            }
        }
    }
    fence();
    if (most >= INFINITY_BITS) {
        return -1;
    }
    if (out.full) {
        return -2;
    }
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) {
            sums[i] += sums[i + half];
        }
    }
    const float scale = bin ? static_cast<float>(sums[0] / static_cast<double>(bin)) : 0;
    std::memcpy(payload, &scale, 4);
    size_t next = 0;
    read_gaps<Token>(payload + 4, out.token, &next, numel, [&](size_t position, bool negative) HC_INLINE {
        kept[position] -= negative ? -scale : scale;
    });
    return out.token - payload;
}

}  // namespace HC_LEVEL
