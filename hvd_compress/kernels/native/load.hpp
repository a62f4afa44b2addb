// Eight elements of a gradient as float32, whatever its type; fewer at the end are filled up with zeros.
#pragma once

#include "vec.hpp"

namespace HC_LEVEL {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

inline F8 load(const float* p) { return fload(p); }

#ifdef __AVX2__
inline F8 load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline F8 load(const BFloat* p) {
    return {_mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
#else
inline float widen(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    if (exponent == 31) {
        return as_float(static_cast<int32_t>(sign | 0x7f800000 | fraction << 13));
    }
    if (exponent == 0) {  // exact: a multiple of 2^-24
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    return as_float(static_cast<int32_t>(sign | (exponent + 112) << 23 | fraction << 13));
}
inline float widen(BFloat x) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16)); }
template <class T> F8 load(const T* p) {
    F8 r;
    for (int i = 0; i < 8; i++) {
        r.v[i] = widen(p[i]);
    }
    return r;
}
#endif

// The first `count` < 8 of eight.
template <class T> F8 load(const T* p, size_t count) {
    T padded[LANES] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

inline void fstore(float* p, F8 a, size_t count) {
    float eight[LANES];
    fstore(eight, a);
    std::memcpy(p, eight, count * sizeof(float));
}

// Asks for what `count` elements at `p` will be followed by some way on; addresses past the end do no harm.
constexpr size_t AHEAD_BYTES = 4096, CACHE_LINE = 64;
template <class T> void prefetch_ahead(const T* p, size_t count) {
    const char* ahead = reinterpret_cast<const char*>(p) + AHEAD_BYTES;
    for (size_t offset = 0; offset < count * sizeof(T); offset += CACHE_LINE) {
        prefetch(ahead + offset);
    }
}

// Results this large go around the caches: what a step computes before it needs them again would push them out.
inline bool passes_caches(size_t numel) { return numel * sizeof(float) >= size_t{1} << 20; }

// A long array is read in as many places at once: one stream alone leaves a part of the memory's bandwidth unused.
constexpr int STREAMS = 4;

}  // namespace HC_LEVEL
