// Gap codes: positions and signs as tokens, and the sum of what several ranks sent. Layout: kernels/gaps.py.
#pragma once

#include "sparse.hpp"

namespace HC_LEVEL {

// Skips: `LIMIT` is reserved, for that many elements or, with the sign, for `FAR`.
template <class Token> struct Gap {
    static constexpr size_t LIMIT = (size_t{1} << (8 * sizeof(Token) - 1)) - 1;
    static constexpr size_t FAR = LIMIT * (LIMIT + 1);
};

// Writes tokens of ascending positions from `token` up to `end`, and counts on where they do not fit.
template <class Token> struct GapWriter {
    uint8_t *token, *end;
    size_t next;  // position after the last one
    bool full;

    void put(size_t bits) {
        if (static_cast<size_t>(end - token) < sizeof(Token)) {
            full = true;
            return;
        }
        const Token word = static_cast<Token>(bits);
        std::memcpy(token, &word, sizeof word);
        token += sizeof word;
    }
    __attribute__((noinline)) size_t skip_far(size_t skip) {
        using G = Gap<Token>;
        for (; skip >= G::FAR && !full; skip -= G::FAR) {
            put(2 * G::LIMIT + 1);
        }
        for (; skip >= G::LIMIT && !full; skip -= G::LIMIT) {
            put(G::LIMIT);
        }
        return skip;
    }
    HC_INLINE void mark(size_t position, bool negative) {
        size_t skip = position - next;
        if (skip >= Gap<Token>::LIMIT) {
            skip = skip_far(skip);
        }
        put(skip + negative * (Gap<Token>::LIMIT + 1));
        next = position + 1;
    }
    // Marks first + i for each bit i of `mask`, negative where `signs` has it, too.
    HC_INLINE void mark_each(size_t first, uint64_t mask, uint64_t signs) {
        for (; mask; mask &= mask - 1) {
            const int place = __builtin_ctzll(mask);
            mark(first + static_cast<size_t>(place), signs >> place & 1);
        }
    }
    // The same where some marks are likely. Few are written as if they were FEW, since how many there are cannot be
    // guessed.
    HC_INLINE void mark_all(size_t first, uint64_t mask, uint64_t signs) {
        constexpr size_t FEW = 4;
        const size_t count = static_cast<size_t>(__builtin_popcountll(mask));
        const size_t skip = mask ? first + static_cast<size_t>(__builtin_ctzll(mask)) - next : 0;
        if (count > FEW || skip >= Gap<Token>::LIMIT || static_cast<size_t>(end - token) < FEW * sizeof(Token)) {
            *this = after_many(*this, first, mask, signs);
            return;
        }
        Token words[FEW];
        size_t from = next;
        uint64_t left = mask;
        for (size_t j = 0; j < FEW; j++, left &= left - 1) {
            const size_t place = static_cast<size_t>(__builtin_ctzll(left | uint64_t{1} << 63));
            words[j] = static_cast<Token>(first + place - from + (signs >> place & 1) * (Gap<Token>::LIMIT + 1));
            from = first + place + 1;
        }
        std::memcpy(token, words, sizeof words);
        next = mask ? first + 64 - static_cast<size_t>(__builtin_clzll(mask)) : next;
        token += count * sizeof(Token);
    }

private:
    // By value: where its address is taken, the compiler expects every token that is written to change the writer.
    static __attribute__((noinline)) GapWriter after_many(GapWriter out, size_t first, uint64_t mask, uint64_t signs) {
        out.mark_each(first, mask, signs);
        return out;
    }
};

// Calls each(position, negative) for the tokens in [token, end) that mark a position below `limit`; `next` is the position
// after the one before. Returns where it stopped: at the first of the other tokens.
template <class Token, class F>
HC_INLINE inline const uint8_t* read_gaps(const uint8_t* token, const uint8_t* end, size_t* next, size_t limit, F each) {
    using G = Gap<Token>;
    size_t position = *next;
    for (; token != end; token += sizeof(Token)) {
        Token word;
        std::memcpy(&word, token, sizeof word);
        const size_t skip = word & G::LIMIT;
        const bool negative = word > G::LIMIT;
        if (skip == G::LIMIT) {
            position += negative ? G::FAR : G::LIMIT;
            continue;
        }
        if (position + skip >= limit) {
            break;
        }
        each(position + skip, negative);
        position += skip + 1;
    }
    *next = position;
    return token;
}

// What is wrong with a payload.
constexpr int GAPS_NOT_WHOLE = 1;  // no scale, or no whole number of tokens after it
constexpr int GAPS_PAST_END = 2;   // a position is past the end

struct GapReader {
    const uint8_t *token, *end;
    size_t next;
    int32_t scale;  // as bits
};

constexpr size_t GAP_CHUNK = 16384;  // elements that are added up in the caches at a time

inline size_t gaps_sum_scratch_bytes(int ranks) {
    return GAP_CHUNK * sizeof(float) + static_cast<size_t>(ranks) * sizeof(GapReader);
}

// out = (0 + payload of rank 0 + ...) / divisor, and a `bound` of all |out|, infinite where a scale is not finite. A payload
// is a scale, float32, then tokens. Returns 0, or -(ERROR_CODES * rank + code) for the first rank with a payload that makes
// no sense.
template <class Token>
int gaps_sum(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    float* bound, void* scratch) {
    float* sum = static_cast<float*>(scratch);
    GapReader* readers = reinterpret_cast<GapReader*>(sum + GAP_CHUNK);
    float total = 0;  // rounded as the sum is, hence never less
    int whole = 0;    // payloads up to the first with part of a token
    for (; whole < ranks; whole++) {
        if (lengths[whole] < 4 || (lengths[whole] - 4) % sizeof(Token)) {
            break;
        }
        float scale;
        std::memcpy(&scale, payloads[whole], 4);
        const int32_t magnitude = as_int(scale) & INT32_MAX;
        total += as_float(magnitude < INFINITY_BITS ? magnitude : INFINITY_BITS);
        readers[whole] = {payloads[whole] + 4, payloads[whole] + lengths[whole], 0, as_int(scale)};
    }
    const bool streamed = passes_caches(numel);
    std::memset(sum, 0, GAP_CHUNK * sizeof(float));
    for (size_t begin = 0; begin < numel; begin += GAP_CHUNK) {
        const size_t end = numel - begin < GAP_CHUNK ? numel : begin + GAP_CHUNK;
        for (int r = 0; r < whole; r++) {
            GapReader reader = readers[r];
            reader.token = read_gaps<Token>(
                reader.token, reader.end, &reader.next, end, [&](size_t position, bool negative) HC_INLINE {
                    sum[position - begin] += as_float(reader.scale ^ static_cast<int32_t>(uint32_t{negative} << 31));
                });
            readers[r] = reader;
        }
        settle(sum, end - begin, divisor, out + begin, streamed);
    }
    fence();
    for (int r = 0; r < whole; r++) {  // what remains may skip, but not mark
        GapReader& reader = readers[r];
        if (read_gaps<Token>(reader.token, reader.end, &reader.next, numel, [](size_t, bool) {}) != reader.end) {
            return -(ERROR_CODES * r + GAPS_PAST_END);
        }
    }
    *bound = divisor == 1 ? total : total / divisor;
    return whole == ranks ? 0 : -(ERROR_CODES * whole + GAPS_NOT_WHOLE);
}

}  // namespace HC_LEVEL
