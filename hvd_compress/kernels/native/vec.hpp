// Eight lanes of float32 or int32: AVX2 intrinsics where the compiler may use them, loops of eight elsewhere.
// Both give the same bits: no fused multiply-add, no reordered sums, NaN only where an algorithm has excluded it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Unrolled loops turn shifts by the row into constants; without registers for eight lanes they only cost compile time.
#ifdef __AVX2__
#include <immintrin.h>
#define HC_UNROLL(rows) _Pragma(HC_TEXT(GCC unroll rows))
#define HC_TEXT(text) #text
#else
#define HC_UNROLL(rows)
#endif

// A step of a loop that is written out for eight elements, where their number is a constant, and for fewer.
#define HC_INLINE __attribute__((always_inline))

namespace HC_LEVEL {

constexpr int LANES = 8;

// Bits of float32 infinity: the bits of |x| are at least this where x is not finite.
constexpr int32_t INFINITY_BITS = 0x7f800000;

#ifdef __AVX2__

struct I8 {
    __m256i v;
};
struct F8 {
    __m256 v;
};
using Mask = I8;  // all bits of a lane, or none

inline I8 iset(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline I8 iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
inline I8 iload(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void istore(void* p, I8 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline I8 operator+(I8 a, I8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I8 operator-(I8 a, I8 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I8 operator*(I8 a, I8 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline I8 operator&(I8 a, I8 b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I8 operator|(I8 a, I8 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I8 operator^(I8 a, I8 b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int N> I8 shl(I8 a) { return {_mm256_slli_epi32(a.v, N)}; }
template <int N> I8 shr(I8 a) { return {_mm256_srli_epi32(a.v, N)}; }  // logical
inline I8 shl(I8 a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
inline I8 shr(I8 a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
inline I8 imax(I8 a, I8 b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline I8 imin(I8 a, I8 b) { return {_mm256_min_epi32(a.v, b.v)}; }
inline I8 times_sign(I8 a, I8 b) { return {_mm256_sign_epi32(a.v, b.v)}; }  // a * sign(b)
inline Mask igreater(I8 a, I8 b) { return {_mm256_cmpgt_epi32(a.v, b.v)}; }

// The low halves of all lanes, none of which is above 0xffff.
inline void store_halves(void* p, I8 a) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v, a.v), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

inline F8 fset(float x) { return {_mm256_set1_ps(x)}; }
inline F8 fload(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void fstore(float* p, F8 a) { _mm256_storeu_ps(p, a.v); }
inline void fstream(float* p, F8 a) { _mm256_stream_ps(p, a.v); }  // p is a multiple of 32
inline F8 operator+(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F8 operator-(F8 a, F8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F8 operator*(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F8 operator/(F8 a, F8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F8 fmin(F8 a, F8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F8 ffloor(F8 a) { return {_mm256_floor_ps(a.v)}; }
inline Mask fless(F8 a, F8 b) { return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
inline I8 as_int(F8 a) { return {_mm256_castps_si256(a.v)}; }
inline F8 as_float(I8 a) { return {_mm256_castsi256_ps(a.v)}; }
inline F8 to_float(I8 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I8 truncate(F8 a) { return {_mm256_cvttps_epi32(a.v)}; }
inline int bits(Mask m) { return _mm256_movemask_ps(_mm256_castsi256_ps(m.v)); }
inline I8 by_sign(F8 x, I8 positive, I8 negative) {
    return as_int(F8{_mm256_blendv_ps(as_float(positive).v, as_float(negative).v, x.v)});
}
inline I8 signs(F8 x) { return {_mm256_srai_epi32(as_int(x).v, 31)}; }  // -1 where the sign is set, else 0
constexpr bool FAST_LOOKUPS = true;
inline F8 lookup(F8 table, I8 index) { return {_mm256_permutevar8x32_ps(table.v, index.v)}; }  // by index % 8
// By index % 4, of a table of four that is there twice.
inline F8 lookup4(F8 table, I8 index) { return {_mm256_permutevar_ps(table.v, index.v)}; }

inline F8 select(Mask m, F8 yes, F8 no) { return {_mm256_blendv_ps(no.v, yes.v, as_float(m).v)}; }
inline I8 select(Mask m, I8 yes, I8 no) { return as_int(select(m, as_float(yes), as_float(no))); }

inline int32_t top(I8 a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
}

// Eight lanes of float64, in two halves.
struct D8 {
    __m256d low, high;
};
inline D8 dset(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline D8 widen(F8 a) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
}
inline D8 operator+(D8 a, D8 b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
inline D8 operator-(D8 a, D8 b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
inline D8 operator*(D8 a, D8 b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
inline void dstore(double* p, D8 a) {
    _mm256_storeu_pd(p, a.low);
    _mm256_storeu_pd(p + 4, a.high);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void fence() { _mm_sfence(); }

#else

struct I8 {
    int32_t v[8];
};
struct F8 {
    float v[8];
};
using Mask = I8;

#define HC_EACH(expression)             \
    {                                   \
        for (int i = 0; i < 8; i++) {   \
            r.v[i] = expression;        \
        }                               \
        return r;                       \
    }
#define HC_U(x) static_cast<uint32_t>(x)
#define HC_S(x) static_cast<int32_t>(x)

inline I8 iset(int32_t x) { I8 r; HC_EACH(x) }
inline I8 iota() { I8 r; HC_EACH(i) }
inline I8 iload(const void* p) {
    I8 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline void istore(void* p, I8 a) { std::memcpy(p, a.v, sizeof a.v); }
inline I8 operator+(I8 a, I8 b) { I8 r; HC_EACH(HC_S(HC_U(a.v[i]) + HC_U(b.v[i]))) }
inline I8 operator-(I8 a, I8 b) { I8 r; HC_EACH(HC_S(HC_U(a.v[i]) - HC_U(b.v[i]))) }
inline I8 operator*(I8 a, I8 b) { I8 r; HC_EACH(HC_S(HC_U(a.v[i]) * HC_U(b.v[i]))) }
inline I8 operator&(I8 a, I8 b) { I8 r; HC_EACH(a.v[i] & b.v[i]) }
inline I8 operator|(I8 a, I8 b) { I8 r; HC_EACH(a.v[i] | b.v[i]) }
inline I8 operator^(I8 a, I8 b) { I8 r; HC_EACH(a.v[i] ^ b.v[i]) }
inline I8 shl(I8 a, int n) { I8 r; HC_EACH(HC_S(HC_U(a.v[i]) << n)) }
inline I8 shr(I8 a, int n) { I8 r; HC_EACH(HC_S(HC_U(a.v[i]) >> n)) }
template <int N> I8 shl(I8 a) { return shl(a, N); }
template <int N> I8 shr(I8 a) { return shr(a, N); }
inline I8 imax(I8 a, I8 b) { I8 r; HC_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
inline I8 imin(I8 a, I8 b) { I8 r; HC_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
inline I8 times_sign(I8 a, I8 b) { I8 r; HC_EACH(b.v[i] < 0 ? -a.v[i] : b.v[i] > 0 ? a.v[i] : 0) }
inline Mask igreater(I8 a, I8 b) { I8 r; HC_EACH(-HC_S(a.v[i] > b.v[i])) }

inline void store_halves(void* p, I8 a) {
    for (int i = 0; i < 8; i++) {
        const uint16_t half = static_cast<uint16_t>(a.v[i]);
        std::memcpy(static_cast<char*>(p) + 2 * i, &half, 2);
    }
}

inline F8 fset(float x) { F8 r; HC_EACH(x) }
inline F8 fload(const float* p) {
    F8 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline void fstore(float* p, F8 a) { std::memcpy(p, a.v, sizeof a.v); }
inline void fstream(float* p, F8 a) { fstore(p, a); }
inline F8 operator+(F8 a, F8 b) { F8 r; HC_EACH(a.v[i] + b.v[i]) }
inline F8 operator-(F8 a, F8 b) { F8 r; HC_EACH(a.v[i] - b.v[i]) }
inline F8 operator*(F8 a, F8 b) { F8 r; HC_EACH(a.v[i] * b.v[i]) }
inline F8 operator/(F8 a, F8 b) { F8 r; HC_EACH(a.v[i] / b.v[i]) }
inline F8 fmin(F8 a, F8 b) { F8 r; HC_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
inline F8 ffloor(F8 a) { F8 r; HC_EACH(__builtin_floorf(a.v[i])) }
inline Mask fless(F8 a, F8 b) { I8 r; HC_EACH(-HC_S(a.v[i] < b.v[i])) }
inline I8 as_int(F8 a) {
    I8 r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline F8 as_float(I8 a) {
    F8 r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline F8 to_float(I8 a) { F8 r; HC_EACH(static_cast<float>(a.v[i])) }
inline I8 truncate(F8 a) { I8 r; HC_EACH(HC_S(a.v[i])) }
inline int bits(Mask m) {
    int r = 0;
    for (int i = 0; i < 8; i++) {
        r |= (HC_U(m.v[i]) >> 31) << i;
    }
    return r;
}
inline I8 by_sign(F8 x, I8 positive, I8 negative) {
    const I8 sign = as_int(x);
    I8 r;
    HC_EACH(sign.v[i] < 0 ? negative.v[i] : positive.v[i])
}
inline I8 signs(F8 x) {
    const I8 bits = as_int(x);
    I8 r;
    HC_EACH(bits.v[i] < 0 ? -1 : 0)
}
constexpr bool FAST_LOOKUPS = false;  // they go lane by lane
inline F8 lookup(F8 table, I8 index) { F8 r; HC_EACH(table.v[index.v[i] & 7]) }
inline F8 lookup4(F8 table, I8 index) { F8 r; HC_EACH(table.v[index.v[i] & 3]) }

inline I8 select(Mask m, I8 yes, I8 no) { return no ^ (m & (yes ^ no)); }
inline F8 select(Mask m, F8 yes, F8 no) { return as_float(select(m, as_int(yes), as_int(no))); }

inline int32_t top(I8 a) {
    int32_t r = a.v[0];
    for (int i = 1; i < 8; i++) {
        r = a.v[i] > r ? a.v[i] : r;
    }
    return r;
}

struct D8 {
    double v[8];
};
inline D8 dset(double x) { D8 r; HC_EACH(x) }
inline D8 widen(F8 a) { D8 r; HC_EACH(static_cast<double>(a.v[i])) }
inline D8 operator+(D8 a, D8 b) { D8 r; HC_EACH(a.v[i] + b.v[i]) }
inline D8 operator-(D8 a, D8 b) { D8 r; HC_EACH(a.v[i] - b.v[i]) }
inline D8 operator*(D8 a, D8 b) { D8 r; HC_EACH(a.v[i] * b.v[i]) }
inline void dstore(double* p, D8 a) { std::memcpy(p, a.v, sizeof a.v); }

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void fence() {}

#undef HC_EACH
#undef HC_U
#undef HC_S

#endif

inline F8 fabs8(F8 a) { return as_float(as_int(a) & iset(0x7fffffff)); }
inline I8 magnitude_bits(F8 a) { return as_int(a) & iset(0x7fffffff); }

inline float as_float(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline int32_t as_int(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace HC_LEVEL
