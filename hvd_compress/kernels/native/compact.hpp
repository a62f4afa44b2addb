// Moves the lanes that a mask names together, and back.
#pragma once

#include "vec.hpp"

namespace HC_LEVEL {

#ifdef __AVX2__

// Of each 8-bit mask the set lanes in order, three bits each; and the place of each lane among the set ones.
struct Permutations {
    uint32_t compacting[256], expanding[256];

    constexpr Permutations() : compacting(), expanding() {
        for (uint32_t mask = 0; mask < 256; mask++) {
            uint32_t count = 0;
            for (uint32_t lane = 0; lane < 8; lane++) {
                if (mask >> lane & 1) {
                    compacting[mask] |= lane << (4 * count);
                    expanding[mask] |= count++ << (4 * lane);
                }
            }
        }
    }
};
inline constexpr Permutations PERMUTATIONS;

inline I8 nibbles(uint32_t packed) {
    return {_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(packed)),
                              _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28))};
}

// Of each 8-bit mask the set lanes, in order.
struct Places {
    uint16_t lanes[256][LANES];

    constexpr Places() : lanes() {
        for (int mask = 0; mask < 256; mask++) {
            for (int lane = 0, count = 0; lane < LANES; lane++) {
                if (mask >> lane & 1) {
                    lanes[mask][count++] = static_cast<uint16_t>(lane);
                }
            }
        }
    }
};
inline constexpr Places PLACES;

// Writes low + the number of each lane that the mask names, and up to eight numbers in all.
inline void compact_places(uint16_t* out, size_t low, int mask) {
    const __m128i lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(PLACES.lanes[mask]));
    const __m128i places = _mm_add_epi16(lanes, _mm_set1_epi16(static_cast<int16_t>(low)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), places);
}
// Writes the named lanes to `out`, and up to eight in all: their number is returned.
inline size_t compact(float* out, F8 a, int mask) {
    fstore(out, lookup(a, nibbles(PERMUTATIONS.compacting[mask])));
    return static_cast<size_t>(__builtin_popcount(static_cast<unsigned>(mask)));
}
inline size_t compact(int32_t* out, I8 a, int mask) {
    istore(out, as_int(lookup(as_float(a), nibbles(PERMUTATIONS.compacting[mask]))));
    return static_cast<size_t>(__builtin_popcount(static_cast<unsigned>(mask)));
}

// The same to an address of any alignment.
inline size_t compact_bytes(uint8_t* out, F8 a, int mask) { return compact(reinterpret_cast<float*>(out), a, mask); }

// The values at `packed`, of any alignment, each in the next lane that the mask names; any in the others. Eight are
// read.
inline F8 expand(const uint8_t* packed, int mask) {
    return lookup(fload(reinterpret_cast<const float*>(packed)), nibbles(PERMUTATIONS.expanding[mask]));
}

#else

inline void compact_places(uint16_t* out, size_t low, int mask) {
    for (; mask; mask &= mask - 1) {
        *out++ = static_cast<uint16_t>(low + static_cast<size_t>(__builtin_ctz(static_cast<unsigned>(mask))));
    }
}

inline size_t compact(float* out, F8 a, int mask) {
    size_t count = 0;
    for (int lane = 0; lane < LANES; lane++) {
        if (mask >> lane & 1) {
            out[count++] = a.v[lane];
        }
    }
    return count;
}
inline size_t compact(int32_t* out, I8 a, int mask) {
    size_t count = 0;
    for (int lane = 0; lane < LANES; lane++) {
        if (mask >> lane & 1) {
            out[count++] = a.v[lane];
        }
    }
    return count;
}
inline size_t compact_bytes(uint8_t* out, F8 a, int mask) {
    float eight[LANES];
    const size_t count = compact(eight, a, mask);
    std::memcpy(out, eight, count * sizeof(float));
    return count;
}
inline F8 expand(const uint8_t* packed, int mask) {
    F8 r;
    for (int lane = 0; lane < LANES; lane++) {
        std::memcpy(&r.v[lane], packed, 4);
        packed += 4 * (mask >> lane & 1);
    }
    return r;
}

#endif

}  // namespace HC_LEVEL
