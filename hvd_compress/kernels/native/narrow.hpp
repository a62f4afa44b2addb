// Sparse payloads with values of 8 or 4 bits: how the entries of an exact one become narrow, and the sum of what several
// ranks sent. Layout: kernels/narrow.py.
#pragma once

#include "positions.hpp"
#include "sparse.hpp"

namespace HC_LEVEL {

constexpr size_t ENTRIES_A_STEP = 64;
constexpr size_t NARROW_HEAD = 4;

constexpr int narrow_levels(int bits) { return (1 << (bits - 1)) - 1; }

// Where the parts of a payload lie, and how long it is.
struct NarrowLayout {
    PositionLayout positions;
    size_t upper = NARROW_HEAD, codes = NARROW_HEAD, length = NARROW_HEAD;

    NarrowLayout(size_t numel, size_t entries, int bits) : positions(numel, entries) {
        upper += 4 * ((entries + ENTRIES_A_STEP - 1) / ENTRIES_A_STEP);
        codes = upper + positions.bytes();
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
    const uint8_t *values = exact + 4 * chunks, *places = values + 4 * entries;
    uint8_t* codes = payload + at.codes;
    PositionWriter positions(at.positions, payload + at.upper);
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
            const size_t position = (chunk - 1) * SPARSE_CHUNK + place;
            positions.put(position);
            kept[position] += lost[j];
        }
        for (size_t j = 0; bits == 8 && j < size; j++) {
            *codes++ = static_cast<uint8_t>(numbers[j]);
        }
        for (size_t j = 0; bits == 4 && j < size; j += 2) {  // past the end numbers are 0
            *codes++ = static_cast<uint8_t>((numbers[j] & 15) | (numbers[j + 1] & 15) << 4);
        }
    }
    positions.finish();
}

// What is wrong with a payload, besides its positions.
constexpr int NARROW_NUMBERS = 3;  // steps that are not finite or below 0, or numbers of steps that are none

// Where reading has come to in the payload of one rank.
struct NarrowReader {
    PositionReader positions;
    const uint8_t *steps, *codes;
    int32_t largest;  // of all values, as bits
    float step;

    // Returns what is wrong, or 0.
    int open(const uint8_t* payload, size_t length, size_t numel, int bits) {
        uint32_t count;
        if (length < NARROW_HEAD || (std::memcpy(&count, payload, 4), count > numel)) {
            return POSITIONS_MISCOUNTED;
        }
        const NarrowLayout at(numel, count, bits);
        if (length != at.length) {
            return POSITIONS_MISCOUNTED;
        }
        steps = payload + NARROW_HEAD;
        codes = payload + at.codes;
        largest = 0;
        step = 0;
        return positions.open(at.positions, count, payload + at.upper, payload + length);
    }

    // Calls each(position, value) for the entries of a chunk from `begin` to before `stop`. Returns what is wrong, or 0.
    template <int BITS, class F> HC_INLINE int read_chunk(size_t begin, size_t stop, F each) {
        const uint8_t *const of_steps = steps, *const of_codes = codes;
        float size = step;  // in registers, as the largest
        int32_t most = largest;
        const int code = positions.read(begin, stop, [&](size_t entry, size_t position) HC_INLINE {
            if (entry % ENTRIES_A_STEP == 0) {
                std::memcpy(&size, of_steps + entry / ENTRIES_A_STEP * 4, 4);
            }
            const int number = BITS == 8 ? static_cast<int8_t>(of_codes[entry])
                                         : static_cast<int8_t>(of_codes[entry / 2] << (entry % 2 ? 0 : 4)) >> 4;
            if (number < -narrow_levels(BITS) || !(size >= 0) || as_int(size) >= INFINITY_BITS) {
                return NARROW_NUMBERS;
            }
            const float value = static_cast<float>(number) * size;
            const int32_t magnitude = as_int(value) & INT32_MAX;
            most = magnitude > most ? magnitude : most;
            each(position, value);
            return 0;
        });
        step = size;
        largest = most;
        return code;
    }
};

// Values and positions of a payload, of which there is room for `capacity`; returns how many, or -code.
template <int BITS>
int64_t narrow_decode_as(
    const uint8_t* payload, size_t length, size_t numel, float* values, int64_t* positions, size_t capacity) {
    NarrowReader reader;
    int code = reader.open(payload, length, numel, BITS);
    if (code || reader.positions.entries > capacity) {
        return -(code ? code : POSITIONS_MISCOUNTED);
    }
    for (size_t begin = 0; !code && begin < numel; begin += SPARSE_CHUNK) {
        code = reader.read_chunk<BITS>(begin, chunk_end(begin, numel), [&](size_t position, float value) HC_INLINE {
            *positions++ = static_cast<int64_t>(position);
            *values++ = value;
        });
    }
    const PositionReader& read = reader.positions;
    return code ? -code : read.next < read.entries ? -POSITIONS_UNORDERED : static_cast<int64_t>(read.entries);
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
        if (readers[r].positions.next < readers[r].positions.entries) {
            return -(ERROR_CODES * r + POSITIONS_UNORDERED);
        }
        total += as_float(readers[r].largest);
    }
    *bound = divisor == 1 ? total : total / divisor;
    return bad < ranks ? -(ERROR_CODES * bad + what) : 0;
}

}  // namespace HC_LEVEL
