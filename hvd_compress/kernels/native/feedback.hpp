// Error feedback: what has accumulated of a gradient, written once to where the new residual goes.
#pragma once

#include "compact.hpp"
#include "load.hpp"

namespace HC_LEVEL {

// residual + gradient; without a residual, the gradient.
template <class T> struct Accumulated {
    const T* gradient;
    const float* residual;

    F8 gradients(size_t i, size_t count) const {
        return count == LANES ? load(gradient + i) : load(gradient + i, count);
    }
    F8 add_residual(F8 v, size_t i, size_t count) const {
        if (!residual) {
            return v;
        }
        return (count == LANES ? fload(residual + i) : load(residual + i, count)) + v;
    }
    F8 operator()(size_t i, size_t count) const { return add_residual(gradients(i, count), i, count); }
};

// Elements up to the next multiple of 32 bytes, `limit` at most.
inline size_t unaligned(const float* p, size_t limit) {
    const size_t count = (32 - reinterpret_cast<uintptr_t>(p) % 32) % 32 / sizeof(float);
    return count < limit ? count : limit;
}

// Writes step(i, count), for `count` elements from i, to kept[i], ..., for all of [begin, end). `count` is eight but for
// the first, so that the stores are aligned where they are `streamed`, and the last.
template <class F>
HC_INLINE inline void write_rows(float* kept, size_t begin, size_t end, bool streamed, F step) {
    size_t i = begin;
    if (streamed) {
        const size_t head = unaligned(kept + i, end - i);
        if (head) {
            fstore(kept + i, step(i, head), head);
            i += head;
        }
    }
    constexpr size_t ROWS = 4;
    for (; i + ROWS * LANES <= end; i += ROWS * LANES) {
        for (size_t row = i; row < i + ROWS * LANES; row += LANES) {
            const F8 v = step(row, size_t{LANES});
            streamed ? fstream(kept + row, v) : fstore(kept + row, v);
        }
    }
    for (; i < end; i += LANES) {
        const size_t count = end - i < LANES ? end - i : LANES;
        fstore(kept + i, step(i, count), count);
    }
}

// The bytes that are not zero, as bits.
inline int nonzero_bytes(uint64_t word) {
    constexpr uint64_t LOW = 0x7f7f7f7f7f7f7f7f;
    const uint64_t any = (((word & LOW) + LOW) | word) >> 7 & 0x0101010101010101;
    return static_cast<int>(any * 0x0102040810204080 >> 56);
}

// Writes what has accumulated to `kept`, or 0 for what is chosen, and calls each(i, mask, v) for every eight elements v
// from i on some of which are chosen: those with magnitudes, as bits, above `floor`, which may rise meanwhile. No branch
// depends on the data: the processor's guess would be wrong for every other word.
template <bool ZEROED, class T, class F>
HC_INLINE inline void choose_rows(
    const Accumulated<T>& x, float* kept, size_t begin, size_t end, bool streamed, const int32_t& floor, I8* largest,
    F each) {
    constexpr size_t WORD = 64, WORDS = 16;  // of which the elements stay in the first cache
    I8 floors = iset(floor), most = *largest;
    uint64_t masks[WORDS];
    uint16_t rows[WORDS * LANES + LANES];  // of eight elements, those with any that are chosen
    const auto row = [&](size_t i, size_t count, bool stream) HC_INLINE {
        const F8 v = x(i, count);
        const I8 magnitude = magnitude_bits(v);
        const Mask chosen = igreater(magnitude, floors);
        const F8 rest = ZEROED ? as_float(select(chosen, iset(0), as_int(v))) : v;
        most = imax(most, magnitude);
        if (kept && count < LANES) {
            fstore(kept + i, rest, count);
        } else if (kept) {
            stream ? fstream(kept + i, rest) : fstore(kept + i, rest);
        }
        return bits(chosen);
    };
    const auto some = [&](size_t i, size_t count) {
        const int mask = row(i, count, false) & ((1 << count) - 1);
        if (mask) {
            each(i, mask, x(i, count));
        }
    };
    size_t i = begin;
    const size_t head = streamed ? unaligned(kept + i, end - i) : 0;
    if (head) {
        some(i, head);
        i += head;
    }
    while (i + WORD <= end) {
        const size_t words = (end - i) / WORD < WORDS ? (end - i) / WORD : WORDS;
        floors = iset(floor);
        for (size_t w = 0; w < words; w++) {
            uint64_t mask = 0;
            HC_UNROLL(8)
            for (size_t r = 0; r < WORD / LANES; r++) {
                mask |= static_cast<uint64_t>(row(i + w * WORD + r * LANES, LANES, streamed)) << (r * LANES);
            }
            masks[w] = mask;
        }
        size_t found = 0;
        for (size_t w = 0; w < words; w++) {
            const int any = nonzero_bytes(masks[w]);
            compact_places(rows + found, w * LANES, any);
            found += static_cast<size_t>(__builtin_popcount(static_cast<unsigned>(any)));
        }
        for (size_t r = 0; r < found; r++) {
            const size_t first = i + rows[r] * LANES;
            each(first, static_cast<int>(masks[rows[r] / LANES] >> rows[r] % LANES * LANES & 255), x(first, LANES));
        }
        i += words * WORD;
    }
    for (; i < end; i += LANES) {
        some(i, end - i < LANES ? end - i : LANES);
    }
    *largest = most;
}

}  // namespace HC_LEVEL
