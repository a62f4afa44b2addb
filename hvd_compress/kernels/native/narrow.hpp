// Sparse payloads with values of 8 or 4 bits: how the entries of an exact one become narrow, and the sum of what several
// ranks sent. Layout: kernels/narrow.py.
#pragma once

#include "sparse.hpp"

namespace HC_LEVEL {

constexpr size_t ENTRIES_A_STEP = 64;
constexpr size_t NARROW_HEAD = 4;

constexpr int narrow_levels(int bits) { return (1 << (bits - 1)) - 1; }

// Where the parts of a payload lie, and how long it is.
struct NarrowLayout {
    int low = 0;  // bits of a position that are stored as they are
    size_t upper = NARROW_HEAD, lower = NARROW_HEAD, codes = NARROW_HEAD, length = NARROW_HEAD;

    NarrowLayout(size_t numel, size_t entries, int bits) {
        if (!entries) {
            return;
        }
        while (entries << (low + 1) <= numel) {
            low++;
        }
        upper += 4 * ((entries + ENTRIES_A_STEP - 1) / ENTRIES_A_STEP);
        lower = upper + (entries + ((numel - 1) >> low) + 7) / 8;
        codes = lower + (entries * static_cast<size_t>(low) + 7) / 8;
        length = codes + (entries * static_cast<size_t>(bits) + 7) / 8;
    }
};

// One step for a block of values: the largest becomes `levels`. 0 where that is too small for a normal number.
inline float narrow_step(const float* block, int levels) {
    I8 magnitudes = iset(0);
    for (size_t j = 0; j < ENTRIES_A_STEP; j += LANES) {
        magnitudes = imax(magnitudes, magnitude_bits(fload(block + j)));
    }
    const float step = as_float(top(magnitudes)) / static_cast<float>(levels);
    const float most = as_float(as_int(__FLT_MAX__ / static_cast<float>(levels)) - 1);  // whose multiples are finite
    return step < __FLT_MIN__ ? 0 : step > most ? most : step;
}

// The nearest number of steps to each value of a block, of equally near the even one, and what that leaves of it.
inline void narrow_round(const float* block, float step, int levels, int32_t* numbers, float* lost) {
    const F8 most = fset(static_cast<float>(levels)), divisor = fset(step > 0 ? step : 1), times = fset(step);
    const F8 round = fset(0x1.8p23f);  // adding it leaves no bits for a fraction
    for (size_t j = 0; j < ENTRIES_A_STEP; j += LANES) {
        const F8 v = fload(block + j);
        const I8 near = truncate(fmin(fabs8(v) / divisor, most) + round - round);
        const I8 number = times_sign(near, as_int(v)) & iset(step > 0 ? -1 : 0);
        istore(numbers + j, number);
        fstore(lost + j, v - to_float(number) * times);
    }
}

// Packs the entries of an exact payload that is sound, all finite; to `kept`, where they were taken from, goes what
// rounding leaves of each.
inline void narrow_encode(const uint8_t* exact, size_t length, size_t numel, int bits, float* kept, uint8_t* payload) {
    const size_t chunks = sparse_chunks(numel), entries = (length - 4 * chunks) / 6;
    const NarrowLayout at(numel, entries, bits);
    const int levels = narrow_levels(bits);
    const uint32_t head = static_cast<uint32_t>(entries);
    std::memcpy(payload, &head, NARROW_HEAD);
    std::memset(payload + at.upper, 0, at.lower - at.upper);
    const uint8_t *values = exact + 4 * chunks, *places = values + 4 * entries;
    uint8_t *lower = payload + at.lower, *codes = payload + at.codes;
    uint64_t held = 0;  // low bits that are not written yet
    int count = 0;
    uint32_t left = 0;  // entries of this chunk
    size_t chunk = 0;
    for (size_t first = 0; first < entries; first += ENTRIES_A_STEP) {
        const size_t size = entries - first < ENTRIES_A_STEP ? entries - first : ENTRIES_A_STEP;
        float block[ENTRIES_A_STEP] = {}, lost[ENTRIES_A_STEP];
        int32_t numbers[ENTRIES_A_STEP];
        std::memcpy(block, values + 4 * first, 4 * size);
        const float step = narrow_step(block, levels);
        std::memcpy(payload + NARROW_HEAD + 4 * (first / ENTRIES_A_STEP), &step, 4);
        narrow_round(block, step, levels, numbers, lost);
        for (size_t j = 0; j < size; j++) {
            while (left == 0) {
                std::memcpy(&left, exact + 4 * chunk++, 4);
            }
            left--;
            uint16_t place;
            std::memcpy(&place, places + 2 * (first + j), 2);
            const size_t position = (chunk - 1) * SPARSE_CHUNK + place, bit = (position >> at.low) + first + j;
            payload[at.upper + bit / 8] |= static_cast<uint8_t>(1 << bit % 8);
            held |= (static_cast<uint64_t>(position) & ((uint64_t{1} << at.low) - 1)) << count;
            count += at.low;
            if (count >= 32) {
                const uint32_t word = static_cast<uint32_t>(held);
                std::memcpy(lower, &word, 4);
                lower += 4;
                held >>= 32;
                count -= 32;
            }
            kept[position] += lost[j];
        }
        for (size_t j = 0; bits == 8 && j < size; j++) {
            *codes++ = static_cast<uint8_t>(numbers[j]);
        }
        for (size_t j = 0; bits == 4 && j < size; j += 2) {  // past the end numbers are 0
            *codes++ = static_cast<uint8_t>((numbers[j] & 15) | (numbers[j + 1] & 15) << 4);
        }
    }
    for (; count > 0; count -= 8, held >>= 8) {
        *lower++ = static_cast<uint8_t>(held);
    }
}

// What is wrong with a payload.
constexpr int NARROW_MISCOUNTED = 1;  // another length, or another number of positions, than of its entries
constexpr int NARROW_UNORDERED = 2;   // positions do not ascend, or are past the end
constexpr int NARROW_NUMBERS = 3;     // steps that are not finite or below 0, or numbers of steps that are none

// Eight bytes, of which those from `end` on are 0.
inline uint64_t load_word(const uint8_t* p, const uint8_t* end) {
    uint64_t word = 0;
    const size_t left = p < end ? static_cast<size_t>(end - p) : 0;
    std::memcpy(&word, p, left < sizeof word ? left : sizeof word);
    return word;
}

// Where reading has come to in the payload of one rank.
struct NarrowReader {
    const uint8_t *steps, *upper, *lower, *codes, *end;
    size_t entries, next, words;  // of all entries, of those that were read, of the words of upper bits
    uint64_t word;                // upper bits that are left of the last of these words
    int low;
    int32_t previous, largest;  // the position before, in its chunk; of all values, as bits
    float step;

    // Returns what is wrong, or 0.
    int open(const uint8_t* payload, size_t length, size_t numel, int bits) {
        uint32_t count;
        if (length < NARROW_HEAD || (std::memcpy(&count, payload, 4), count > numel)) {
            return NARROW_MISCOUNTED;
        }
        const NarrowLayout at(numel, count, bits);
        if (length != at.length) {
            return NARROW_MISCOUNTED;
        }
        *this = {payload + NARROW_HEAD, payload + at.upper, payload + at.lower, payload + at.codes, payload + length,
                 count, 0, 0, 0, at.low, -1, 0, 0};
        size_t ones = 0;
        for (const uint8_t* p = upper; p < lower; p += 8) {
            ones += static_cast<size_t>(__builtin_popcountll(load_word(p, lower)));
        }
        return ones == count ? 0 : NARROW_MISCOUNTED;
    }

    // Calls each(position, value) for the entries of a chunk from `begin` to before `stop`. Returns what is wrong, or 0.
    template <int BITS, class F> HC_INLINE int read_chunk(size_t begin, size_t stop, F each) {
        const uint64_t mask = (uint64_t{1} << low) - 1;
        NarrowReader at = *this;  // in registers
        at.previous = -1;
        int code = 0;
        while (at.next < at.entries) {
            while (at.word == 0) {
                at.word = load_word(at.upper + 8 * at.words++, at.lower);
            }
            const size_t bit = 64 * (at.words - 1) + static_cast<size_t>(__builtin_ctzll(at.word));
            const size_t low_bit = at.next * static_cast<size_t>(at.low);
            const uint64_t lows = load_word(at.lower + low_bit / 8, at.end) >> low_bit % 8 & mask;
            const size_t position = (bit - at.next) << at.low | lows;
            if (position >= stop) {
                break;
            }
            // In the chunk before what is no larger than the last of it was not read; its places start anew here.
            if (position < begin || static_cast<int32_t>(position - begin) <= at.previous) {
                code = NARROW_UNORDERED;
                break;
            }
            at.previous = static_cast<int32_t>(position - begin);
            at.word &= at.word - 1;
            if (at.next % ENTRIES_A_STEP == 0) {
                std::memcpy(&at.step, at.steps + at.next / ENTRIES_A_STEP * 4, 4);
            }
            const int number = BITS == 8 ? static_cast<int8_t>(at.codes[at.next])
                                         : static_cast<int8_t>(at.codes[at.next / 2] << (at.next % 2 ? 0 : 4)) >> 4;
            if (number < -narrow_levels(BITS) || !(at.step >= 0) || as_int(at.step) >= INFINITY_BITS) {
                code = NARROW_NUMBERS;
                break;
            }
            const float value = static_cast<float>(number) * at.step;
            const int32_t magnitude = as_int(value) & INT32_MAX;
            at.largest = magnitude > at.largest ? magnitude : at.largest;
            at.next++;
            each(position, value);
        }
        *this = at;
        return code;
    }
};

// Values and positions of a payload, of which there is room for `capacity`; returns how many, or -code.
template <int BITS>
int64_t narrow_decode_as(
    const uint8_t* payload, size_t length, size_t numel, float* values, int64_t* positions, size_t capacity) {
    NarrowReader reader;
    int code = reader.open(payload, length, numel, BITS);
    if (code || reader.entries > capacity) {
        return -(code ? code : NARROW_MISCOUNTED);
    }
    for (size_t begin = 0; !code && begin < numel; begin += SPARSE_CHUNK) {
        code = reader.read_chunk<BITS>(begin, chunk_end(begin, numel), [&](size_t position, float value) HC_INLINE {
            *positions++ = static_cast<int64_t>(position);
            *values++ = value;
        });
    }
    return code ? -code : reader.next < reader.entries ? -NARROW_UNORDERED : static_cast<int64_t>(reader.entries);
}

inline size_t narrow_sum_scratch_bytes(int ranks) {
    return SPARSE_CHUNK * sizeof(float) + static_cast<size_t>(ranks) * sizeof(NarrowReader);
}

// As sparse_sum.
template <int BITS>
int narrow_sum_as(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    float* bound, void* scratch) {
    float* const sum = static_cast<float*>(scratch);
    NarrowReader* const readers = reinterpret_cast<NarrowReader*>(sum + SPARSE_CHUNK);
    int bad = ranks, what = 0;  // the first rank with a payload that makes no sense, and why
    for (int r = 0; r < ranks && bad == ranks; r++) {
        what = readers[r].open(payloads[r], lengths[r], numel, BITS);
        bad = what ? r : ranks;
    }
    const bool streamed = passes_caches(numel);
    std::memset(sum, 0, SPARSE_CHUNK * sizeof(float));
    for (size_t begin = 0; begin < numel; begin += SPARSE_CHUNK) {
        const size_t end = chunk_end(begin, numel);
        for (int r = 0; r < bad; r++) {  // of a rank after a bad one nothing is said
            const int code = readers[r].read_chunk<BITS>(
                begin, end, [&](size_t position, float value) HC_INLINE { sum[position - begin] += value; });
            if (code) {
                bad = r;
                what = code;
            }
        }
        settle(sum, end - begin, divisor, out + begin, streamed);
    }
    fence();
    float total = 0;  // rounded as the sum is, hence never less
    for (int r = 0; r < bad; r++) {
        if (readers[r].next < readers[r].entries) {
            return -(ERROR_CODES * r + NARROW_UNORDERED);
        }
        total += as_float(readers[r].largest);
    }
    *bound = divisor == 1 ? total : total / divisor;
    return bad < ranks ? -(ERROR_CODES * bad + what) : 0;
}

}  // namespace HC_LEVEL
