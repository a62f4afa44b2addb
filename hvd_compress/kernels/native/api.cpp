// The functions that Python calls, by pointers alone; they pick the level that this processor can run.
#include "crc32.hpp"
#include "level.hpp"

#define HC_API extern "C" __attribute__((visibility("default")))

namespace plain {
extern const Level LEVEL;
}
#ifdef HC_AVX2
namespace avx2 {
extern const Level LEVEL;
}
#endif

namespace {

bool has_avx2() {
#ifdef HC_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
}

const Level* best() {
#ifdef HC_AVX2
    if (has_avx2()) {
        return &avx2::LEVEL;
    }
#endif
    return &plain::LEVEL;
}

const Level* level = &plain::LEVEL;

}  // namespace

// Levels: 0 plain, 1 AVX2. Returns the one that is in use from now on: the one asked for, or less.
HC_API int hc_select(int most) {
    level = most > 0 ? best() : &plain::LEVEL;
    return level != &plain::LEVEL;
}

HC_API uint32_t hc_crc32(uint32_t crc, const uint8_t* data, size_t length) {
    crc = ~crc;
#if defined(__x86_64__)
    if (length >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        const size_t folded = length & ~size_t{15};
        crc = hc::crc32_folded(crc, data, folded);
        data += folded;
        length -= folded;
    }
#endif
    return ~hc::crc32_bytes(crc, data, length);
}

HC_API int32_t hc_moments(const void* x, int type, size_t numel, double* sums) {
    return level->moments(x, type, numel, sums);
}

HC_API int32_t hc_largest(const void* x, int type, size_t numel) { return level->largest(x, type, numel); }

HC_API void hc_ternary_encode(
    const void* x, int type, size_t numel, float bound, float scaler, uint64_t key, uint8_t* codes) {
    level->ternary_encode(x, type, numel, bound, scaler, key, codes);
}

HC_API void hc_ternary_sum(
    const uint8_t* const* codes, const float* scalers, int ranks, size_t numel, float divisor, float* out) {
    level->ternary_sum(codes, scalers, ranks, numel, divisor, out);
}

HC_API int hc_quantise_encode(
    const void* x, int type, size_t numel, int bits, size_t bucket, int l2, uint64_t key, uint8_t* payload) {
    return level->quantise_encode(x, type, numel, bits, bucket, l2, key, payload);
}

HC_API void hc_quantise_sum(
    const uint8_t* const* payloads, int ranks, size_t numel, int bits, size_t bucket, float divisor, float* out) {
    level->quantise_sum(payloads, ranks, numel, bits, bucket, divisor, out);
}

HC_API uint64_t hc_prune_dense(
    const float* x, size_t numel, float threshold, uint64_t key, float* out, double* sum) {
    return level->prune_dense(x, numel, threshold, key, out, sum);
}

HC_API int hc_bfloat_encode(const void* x, int type, size_t numel, uint8_t* out) {
    return level->bfloat_encode(x, type, numel, out);
}

HC_API void hc_bfloat_sum(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    level->bfloat_sum(payloads, ranks, numel, divisor, out);
}
