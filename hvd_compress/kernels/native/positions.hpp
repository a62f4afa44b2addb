// Ascending positions in the code of Elias and Fano: how they are written, and read again in order. Layout:
// kernels/positions.py.
#pragma once

#include "vec.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace HC_LEVEL {

// Of so many positions below `numel`: the bits of each that are stored as they are, and the bytes of both parts.
struct PositionLayout {
    int low = 0;
    size_t upper = 0, lower = 0;

    PositionLayout(size_t numel, size_t entries) {
        if (!entries) {
            return;
        }
        while (entries << (low + 1) <= numel) {
            low++;
        }
        upper = (entries + ((numel - 1) >> low) + 7) / 8;
        lower = (entries * static_cast<size_t>(low) + 7) / 8;
    }

    size_t bytes() const { return upper + lower; }
};

// Writes positions one after the other, in as many bytes as the layout says.
struct PositionWriter {
    uint8_t *upper, *lower;
    int low;
    size_t entries = 0;  // that are written
    uint64_t held = 0;   // low bits that are not written yet, and how many
    int count = 0;

    PositionWriter(const PositionLayout& layout, uint8_t* payload)
        : upper(payload), lower(payload + layout.upper), low(layout.low) {
        std::memset(upper, 0, layout.upper);
    }

    HC_INLINE void put(size_t position) {
        const size_t bit = (position >> low) + entries++;
        upper[bit / 8] |= static_cast<uint8_t>(1 << bit % 8);
        held |= (static_cast<uint64_t>(position) & ((uint64_t{1} << low) - 1)) << count;
        count += low;
        if (count >= 32) {
            const uint32_t word = static_cast<uint32_t>(held);
            std::memcpy(lower, &word, 4);
            lower += 4;
            held >>= 32;
            count -= 32;
        }
    }

    void finish() {
        for (; count > 0; count -= 8, held >>= 8) {
            *lower++ = static_cast<uint8_t>(held);
        }
    }
};

// Eight bytes, of which those from `end` on are 0.
inline uint64_t load_word(const uint8_t* p, const uint8_t* end) {
    uint64_t word = 0;
    const size_t left = p < end ? static_cast<size_t>(end - p) : 0;
    std::memcpy(&word, p, left < sizeof word ? left : sizeof word);
    return word;
}

// What is wrong with positions.
constexpr int POSITIONS_MISCOUNTED = 1;  // other bytes, or another number of them, than their entries take
constexpr int POSITIONS_UNORDERED = 2;   // they do not ascend, or are past the end

// Where reading has come to in the positions of one rank.
struct PositionReader {
    const uint8_t *upper, *lower, *end;  // `end`: up to which bytes may be read
    size_t entries, next, words;         // of all entries, of those that were read, of the words of upper bits
    uint64_t word;                       // upper bits that are left of the last of these words
    int low;

    // Returns what is wrong, or 0.
    int open(const PositionLayout& layout, size_t count, const uint8_t* payload, const uint8_t* stop) {
        *this = {payload, payload + layout.upper, stop, count, 0, 0, 0, layout.low};
        size_t ones = 0;
        for (const uint8_t* p = upper; p < lower; p += 8) {
            ones += static_cast<size_t>(__builtin_popcountll(load_word(p, lower)));
        }
        return ones == count ? 0 : POSITIONS_MISCOUNTED;
    }

    // Calls each(entry, position), which returns what is wrong with it, or 0, for those from `begin` to before `stop`.
    // Returns what is wrong, or 0.
    template <class F> HC_INLINE int read(size_t begin, size_t stop, F each) {
        const uint64_t mask = (uint64_t{1} << low) - 1;
        PositionReader at = *this;  // in registers
        size_t least = begin;       // what is less was not read before, or does not ascend
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
            if (position < least) {
                code = POSITIONS_UNORDERED;
                break;
            }
            least = position + 1;
            at.word &= at.word - 1;
            code = each(at.next, position);
            if (code) {
                break;
            }
            at.next++;
        }
        *this = at;
        return code;
    }
};

inline void positions_encode(const int64_t* positions, size_t entries, size_t numel, uint8_t* payload) {
    PositionWriter writer(PositionLayout(numel, entries), payload);
    for (size_t i = 0; i < entries; i++) {
        writer.put(static_cast<size_t>(positions[i]));
    }
    writer.finish();
}

// Returns what is wrong, or 0.
inline int positions_decode(
    const uint8_t* payload, size_t length, size_t entries, size_t numel, int64_t* positions) {
    const PositionLayout layout(numel, entries);
    PositionReader reader;
    if (length != layout.bytes() || reader.open(layout, entries, payload, payload + length)) {
        return POSITIONS_MISCOUNTED;
    }
    const int code = reader.read(0, numel, [&](size_t, size_t position) HC_INLINE {
        *positions++ = static_cast<int64_t>(position);
        return 0;
    });
    return code ? code : reader.next < entries ? POSITIONS_UNORDERED : 0;
}

}  // namespace HC_LEVEL
