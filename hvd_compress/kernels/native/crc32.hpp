// CRC-32 (IEEE 802.3, as zlib's), by carry-less multiplication: after Gopal et al., "Fast CRC computation for generic
// polynomials using PCLMULQDQ", Intel 2009, whose constants these are.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

namespace hc {

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i state, __m128i factors, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(state, factors, 0x00), high = _mm_clmulepi64_si128(state, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// `length` is a multiple of 16 and at least 64; `crc` is the inverted register.
__attribute__((target("pclmul,sse4.1"))) inline uint32_t crc32_folded(uint32_t crc, const uint8_t* data, size_t length) {
    const auto at = [&](size_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i)); };
    const __m128i by_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i a = _mm_xor_si128(at(0), _mm_cvtsi32_si128(static_cast<int>(crc))), b = at(16), c = at(32), d = at(48);
    size_t i = 64;
    for (; i + 64 <= length; i += 64) {
        a = fold(a, by_64, at(i));
        b = fold(b, by_64, at(i + 16));
        c = fold(c, by_64, at(i + 32));
        d = fold(d, by_64, at(i + 48));
    }
    a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
    for (; i < length; i += 16) {
        a = fold(a, by_16, at(i));
    }
    // 128 bits to 64, these to 32 (Barrett).
    const __m128i low_word = _mm_setr_epi32(-1, 0, -1, 0);
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_16, 0x10));
    a = _mm_xor_si128(_mm_srli_si128(a, 4), _mm_clmulepi64_si128(_mm_and_si128(a, low_word), _mm_cvtsi64_si128(0x163cd6124), 0x00));
    const __m128i barrett = _mm_set_epi64x(0x1f7011641, 0x1db710641);
    __m128i t = _mm_clmulepi64_si128(_mm_and_si128(a, low_word), barrett, 0x10);
    t = _mm_clmulepi64_si128(_mm_and_si128(t, low_word), barrett, 0x00);
    return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(a, t), 1));
}

}  // namespace hc
#endif

namespace hc {

inline uint32_t crc32_bytes(uint32_t crc, const uint8_t* data, size_t length) {
    for (size_t i = 0; i < length; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return crc;
}

}  // namespace hc
