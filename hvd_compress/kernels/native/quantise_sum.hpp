// The sum of the quantised gradients that several ranks sent. Layout: kernels/quantise.py.
#pragma once

#include "blocks.hpp"
#include "quantise.hpp"

namespace HC_LEVEL {

// Values of eight codes, in the low BITS bits of a word, of buckets with this unit (norm / levels); NaN for a code that
// encode never writes.
template <int BITS> struct Dequantiser {
    static constexpr bool TABLE = FAST_LOOKUPS && BITS <= 3;  // few bits choose among products with the unit
    static constexpr int LEVELS = levels_of(BITS);
    F8 factor;  // the unit, or with TABLE what each code stands for

    explicit Dequantiser(float unit) : factor(fset(unit)) {
        if (TABLE) {
            factor = product(iota());
        }
    }
    HC_INLINE F8 operator()(I8 word) const {
        if (TABLE) {
            return BITS == 3 ? lookup(factor, word) : lookup4(factor, word);
        }
        return product(word);
    }

private:
    HC_INLINE F8 product(I8 word) const {
        const I8 code = word & iset((1 << BITS) - 1), level = BITS == 1 ? code + code - iset(1) : code - iset(LEVELS);
        const F8 value = to_float(level) * factor;
        return BITS == 1 ? value : select(igreater(level, iset(LEVELS)), fset(__builtin_nanf("")), value);
    }
};

// Adds the codes of a block to `totals`; unit(row) is that of a row's bucket.
template <int BITS, class F> HC_INLINE inline void add_codes(const uint8_t* codes, float* totals, F unit) {
    I8 words[BITS];
    for (int w = 0; w < BITS; w++) {
        words[w] = iload(codes + w * 32);
    }
    HC_UNROLL(32)
    for (int row = 0; row < BLOCK_ROWS; row++) {
        const int bit = row * BITS, word = bit / 32, offset = bit % 32;
        I8 code = shr(words[word], offset);
        if (offset + BITS > 32) {
            code = code | shl(words[word + 1], 32 - offset);
        }
        fstore(totals + row * LANES, fload(totals + row * LANES) + unit(row)(code));
    }
}

// The same where half of a block is a bucket, whose norms are at `norms`.
template <int BITS> void add_halves(const uint8_t* codes, const uint8_t* norms, float* totals) {
    float both[2];
    std::memcpy(both, norms, sizeof both);
    const Dequantiser<BITS> first(both[0] / levels_of(BITS)), second(both[1] / levels_of(BITS));
    add_codes<BITS>(codes, totals, [&](int row) HC_INLINE { return row < BLOCK_ROWS / 2 ? first : second; });
}

// The same where the rows from `start` on are in several buckets.
template <int BITS>
void add_bucketed(const uint8_t* codes, const uint8_t* norms, size_t start, size_t bucket, size_t rows, float* totals) {
    float units[BLOCK_ROWS] = {};
    for (size_t row = 0; row < rows;) {
        float norm;
        std::memcpy(&norm, norms + 4 * ((start + row * LANES) / bucket), 4);
        for (const size_t end = bucket_end(start + row * LANES, bucket, row, rows); row < end; row++) {
            units[row] = norm / levels_of(BITS);
        }
    }
    add_codes<BITS>(codes, totals, [&](int row) HC_INLINE { return Dequantiser<BITS>(units[row]); });
}

// Adds up what the ranks sent: payloads of norms and codes. Returns the largest magnitude as bits.
template <int BITS, bool STREAMED>
int32_t quantise_sum_as(
    const uint8_t* const* payloads, int ranks, size_t numel, size_t bucket, float divisor, float* out) {
    const size_t start_of_codes = 4 * ((numel + bucket - 1) / bucket);
    const bool aligned = bucket % QUANTISED_BLOCK == 0;
    Quotients<STREAMED> quotients(out, numel, divisor);
    alignas(32) float totals[SUM_BLOCK];
    for (size_t start = 0; start < numel; start += SUM_BLOCK) {
        const size_t end = numel - start < SUM_BLOCK ? numel : start + SUM_BLOCK;
        std::memset(totals, 0, sizeof totals);
        for (int r = 0; r < ranks; r++) {
            const Place next = Place{r, start}.after(1, ranks);
            const uint8_t* codes = payloads[r] + start_of_codes + start / 8 * BITS;
            const uint8_t* ahead = payloads[next.rank] + start_of_codes + next.start / 8 * BITS;
            for (size_t i = start; i < end; i += QUANTISED_BLOCK, codes += 32 * BITS, ahead += 32 * BITS) {
                prefetch_bytes(ahead, 32 * BITS);
                if (aligned) {
                    float norm;
                    std::memcpy(&norm, payloads[r] + 4 * (i / bucket), 4);
                    const Dequantiser<BITS> unit(norm / levels_of(BITS));
                    add_codes<BITS>(codes, totals + (i - start), [&](int) HC_INLINE { return unit; });
                } else if (bucket == QUANTISED_BLOCK / 2 && end - i > bucket) {
                    add_halves<BITS>(codes, payloads[r] + 4 * (i / bucket), totals + (i - start));
                } else {
                    const size_t rows = end - i < QUANTISED_BLOCK ? (end - i + LANES - 1) / LANES : BLOCK_ROWS;
                    add_bucketed<BITS>(codes, payloads[r], i, bucket, rows, totals + (i - start));
                }
            }
        }
        for (size_t i = start; i < end; i += LANES) {
            quotients.put(i, fload(totals + (i - start)));
        }
    }
    return quotients.end();
}

template <int BITS>
int32_t quantise_sum_as(
    const uint8_t* const* payloads, int ranks, size_t numel, size_t bucket, float divisor, float* out) {
    const auto sum = can_stream(out, numel) ? quantise_sum_as<BITS, true> : quantise_sum_as<BITS, false>;
    return sum(payloads, ranks, numel, bucket, divisor, out);
}

}  // namespace HC_LEVEL
