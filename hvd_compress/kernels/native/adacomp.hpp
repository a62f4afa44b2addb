// AdaComp: of each bin what its newest gradient pushes past its largest. Layout of the payload: kernels/gaps.py, after
// the scale.
#pragma once

#include "gaps.hpp"

namespace HC_LEVEL {

constexpr size_t ADACOMP_BLOCK = 2048;  // elements, or one bin, whose gradients and residuals stay in the first cache
constexpr size_t ADACOMP_WORD = 64;     // elements whose choice is one mask

inline size_t adacomp_block(size_t bin_size) {
    return bin_size < ADACOMP_BLOCK ? ADACOMP_BLOCK / bin_size * bin_size : bin_size;
}

struct Choice {
    uint64_t sent, negative;
};

inline size_t adacomp_scratch_bytes(size_t bin_size) {
    const size_t words_of_bin = (bin_size + ADACOMP_WORD - 1) / ADACOMP_WORD;
    return adacomp_block(bin_size) / bin_size * words_of_bin * sizeof(Choice);
}

// Largest |x| of `size` elements from `start`, as bits.
template <class T> int32_t largest_of_bin(const Accumulated<T>& x, size_t start, size_t size) {
    if (size < LANES) {
        return top(magnitude_bits(x(start, size)));
    }
    const size_t end = start + size;
    I8 largest = magnitude_bits(x(end - LANES, LANES));
    for (size_t i = start; i + LANES <= end; i += LANES) {
        largest = imax(largest, magnitude_bits(x(i, LANES)));
    }
    return top(largest);
}

// Of `count` <= 64 elements from `start`: those that the newest gradient brings to `least`, and the signs of all.
template <class T> Choice choose(const Accumulated<T>& x, size_t numel, size_t start, size_t count, int32_t least) {
    const I8 below = iset(least - 1);
    Choice choice = {0, 0};
    for (size_t j = 0; j < count; j += LANES) {
        const size_t i = start + j, present = numel - i < LANES ? numel - i : LANES;
        const F8 g = x.gradients(i, present), v = x.add_residual(g, i, present);
        const Mask sent = igreater(magnitude_bits(v + g), below) & igreater(magnitude_bits(v), iset(0));
        choice.sent |= static_cast<uint64_t>(bits(sent)) << j;
        choice.negative |= static_cast<uint64_t>(bits(as_int(v))) << j;
    }
    choice.sent &= ~uint64_t{0} >> (64 - count);
    return choice;
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
    Choice* const choices = static_cast<Choice*>(scratch);
    GapWriter<Token> out = {payload + 4, payload + capacity, 0, false};
    double sums[LANES] = {};
    int32_t most = 0;
    size_t bin = 0;
    for (size_t begin = 0; begin < numel; begin += block) {
        const size_t end = numel - begin < block ? numel : begin + block;
        const auto each_word = [&](size_t start, auto step) HC_INLINE {  // of the bin at `start`
            const size_t size = end - start < bin_size ? end - start : bin_size;
            for (size_t j = 0; j < size; j += ADACOMP_WORD) {
                step(start + j, size - j < ADACOMP_WORD ? size - j : ADACOMP_WORD);
            }
        };
        Choice* choice = choices;
        for (size_t start = begin; start < end; start += bin_size, bin++) {
            const int32_t largest = largest_of_bin(x, start, end - start < bin_size ? end - start : bin_size);
            most = largest > most ? largest : most;
            sums[bin % LANES] += static_cast<double>(as_float(largest));
            each_word(start, [&](size_t i, size_t count) HC_INLINE { *choice++ = choose(x, numel, i, count, largest); });
        }
        write_rows(kept, begin, end, streamed, x);
        choice = choices;
        for (size_t start = begin; start < end; start += bin_size) {
            each_word(start, [&](size_t i, size_t) HC_INLINE {
                const Choice c = *choice++;
                if (sizeof(Token) == 1) {  // short bins, each of which mostly sends some
                    out.mark_all(i, c.sent, c.negative);
                } else {
                    out.mark_each(i, c.sent, c.negative);
                }
            });
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
        kept[position] -= as_float(as_int(scale) ^ static_cast<int32_t>(uint32_t{negative} << 31));
    });
    return out.token - payload;
}

}  // namespace HC_LEVEL
