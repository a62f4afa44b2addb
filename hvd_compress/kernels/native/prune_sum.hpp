// The sum of the pruned gradients that several ranks sent. Layout: kernels/prune.py.
#pragma once

#include "blocks.hpp"
#include "compact.hpp"
#include "ternary.hpp"

namespace HC_LEVEL {

// How many of eight words' codes are 3, which says that an element is sent as it is.
inline size_t exact_codes(I8 words) {
    uint64_t pairs[4];
    istore(pairs, words & shr<1>(words) & iset(0x55555555));
    size_t count = 0;
    for (const uint64_t pair : pairs) {
        count += static_cast<size_t>(__builtin_popcountll(pair));
    }
    return count;
}

// The codes of the first `present` of 128 elements, zeros after them.
inline I8 first_codes(I8 words, size_t present) {
    uint32_t lanes[LANES];
    istore(lanes, words);
    for (size_t lane = 0; lane < LANES; lane++) {
        const size_t rows = present > lane ? (present - lane + LANES - 1) / LANES : 0;
        lanes[lane] &= rows < 16 ? (1u << (2 * rows)) - 1 : ~0u;
    }
    return iload(lanes);
}

// Where reading has come to in the payload of one rank.
struct PrunedReader {
    F8 table;
    const uint8_t *codes, *values, *end;

    // Adds the next `present` <= 128 elements to `totals`, which has room for 128. Returns whether there were values
    // enough.
    HC_INLINE bool add(float* totals, size_t present) {
        constexpr int ROWS = TERNARY_BLOCK / LANES;
        const I8 words = present < TERNARY_BLOCK ? first_codes(iload(codes), present) : iload(codes);
        const I8 exact = words & shl<1>(words);  // the upper bits of codes 3
        const size_t count = exact_codes(words), left = static_cast<size_t>(end - values) / 4;
        codes += TERNARY_BLOCK / 4;
        if (left < count) {
            return false;
        }
        const uint8_t* next = values;
        uint8_t copy[4 * (TERNARY_BLOCK + LANES)];
        if (left < count + LANES) {  // eight are read where the last few are
            std::memcpy(copy, values, 4 * count);
            next = copy;
        }
        values += 4 * count;
        HC_UNROLL(16)
        for (int row = 0; row < ROWS; row++) {
            const F8 sign = as_float(shl(exact, 30 - 2 * row));
            const int mask = bits(as_int(sign));
            const I8 known = as_int(lookup4(table, shr(words, 2 * row)));
            const F8 value = as_float(by_sign(sign, known, as_int(expand(next, mask))));
            next += 4 * static_cast<size_t>(__builtin_popcount(static_cast<unsigned>(mask)));
            fstore(totals + row * LANES, fload(totals + row * LANES) + value);
        }
        return true;
    }
};

inline size_t prune_sum_scratch_bytes(int ranks) { return static_cast<size_t>(ranks) * sizeof(PrunedReader) + 32; }

// Sets up a reader. Returns whether there are a threshold and all codes.
inline bool open_pruned(const uint8_t* payload, size_t length, size_t numel, PrunedReader* reader) {
    const size_t start = 4 + ternary_code_bytes(numel);
    float t;
    if (length < start || (std::memcpy(&t, payload, 4), !(t >= 0) || as_int(t) >= INFINITY_BITS)) {
        return false;
    }
    *reader = {ternary_table(t), payload + 4, payload + start, payload + length};
    return true;
}

// Adds a block of up to SUM_BLOCK elements, and asks for what `next`, which is read then, will need about as far on.
// Returns whether there were values enough.
inline bool add_pruned(PrunedReader* from, const PrunedReader& next, size_t elements, float* totals) {
    PrunedReader reader = *from;
    const uint8_t *codes = next.codes, *values = next.values;
    bool enough = true;
    for (size_t i = 0; i < elements; i += TERNARY_BLOCK) {
        const uint8_t* const before = reader.values;
        enough &= reader.add(totals + i, elements - i < TERNARY_BLOCK ? elements - i : TERNARY_BLOCK);
        const size_t sent = static_cast<size_t>(reader.values - before);
        prefetch(codes);
        prefetch_bytes(values, sent);
        codes += TERNARY_BLOCK / 4;
        values += sent;
    }
    *from = reader;
    return enough;
}

// out = (0 + payload of rank 0 + ...) / divisor, and the `largest` |out| as bits. A payload is a threshold, codes and
// values. Returns 0, or -(rank + 1) for the first rank with a threshold that is none, or with more or fewer values than
// its codes say.
template <bool STREAMED>
int prune_sum_as(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    int32_t* largest, PrunedReader* readers) {
    int whole = 0;
    while (whole < ranks && open_pruned(payloads[whole], lengths[whole], numel, &readers[whole])) {
        whole++;
    }
    int bad = whole;
    Quotients<STREAMED> quotients(out, numel, divisor);
    alignas(32) float totals[SUM_BLOCK];
    for (size_t i = 0; i < numel; i += SUM_BLOCK) {
        const size_t elements = numel - i < SUM_BLOCK ? numel - i : SUM_BLOCK;
        std::memset(totals, 0, sizeof totals);
        for (int r = 0; r < whole; r++) {
            if (!add_pruned(&readers[r], readers[r + 1 < whole ? r + 1 : 0], elements, totals)) {
                bad = r < bad ? r : bad;
            }
        }
        for (size_t j = 0; j < elements; j += LANES) {
            quotients.put(i + j, fload(totals + j));
        }
    }
    *largest = quotients.end();
    for (int r = 0; r < bad; r++) {
        if (readers[r].values != readers[r].end) {
            bad = r;
        }
    }
    return bad < ranks ? -(bad + 1) : 0;
}

inline int prune_sum(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    int32_t* largest, void* scratch) {
    const auto sum = can_stream(out, numel) ? prune_sum_as<true> : prune_sum_as<false>;
    return sum(payloads, lengths, ranks, numel, divisor, out, largest, static_cast<PrunedReader*>(scratch));
}

}  // namespace HC_LEVEL
