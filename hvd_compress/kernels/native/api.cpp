// The functions that Python calls, by pointers alone; they pick the level that this processor can run.
#include "crc32.hpp"
#include "frames.hpp"
#include "level.hpp"

#include <cstdlib>

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

struct Room {
    void* start = nullptr;
    size_t bytes = 0;

    ~Room() { std::free(start); }
};
thread_local Room room;

}  // namespace

void* scratch(size_t bytes) {
    if (bytes > room.bytes) {
        std::free(room.start);
        const size_t whole = (bytes + 63) / 64 * 64;
        room.start = std::aligned_alloc(64, whole);
        room.bytes = room.start ? whole : 0;
    }
    return room.start;
}

// What this library was compiled of: the digest of sources.py.
HC_API const char* hc_sources() { return HC_SOURCES; }

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

// Of every rank's buffer; returns the first rank that has a frame which is not as expected, or `ranks`.
HC_API int hc_frames(
    const uint8_t* const* buffers, const int64_t* sizes, int ranks, const uint8_t* expected, size_t count,
    int64_t* offsets, int64_t* lengths, uint8_t* flags) {
    for (int r = 0; r < ranks; r++) {
        const size_t row = r * count;
        const size_t found = hc::find_frames(
            buffers[r], sizes[r], r, expected, count, hc_crc32, offsets + row, lengths + row, flags + row);
        if (found < count || (count == 0 && sizes[r])) {
            return r;
        }
    }
    return ranks;
}

HC_API int32_t hc_moments(const void* x, int type, size_t numel, double* sums) {
    return level->moments(x, type, numel, sums);
}

HC_API int32_t hc_magnitudes(const void* x, int type, size_t numel, double* sum) {
    return level->magnitudes(x, type, numel, sum);
}

HC_API int32_t hc_largest(const void* x, int type, size_t numel) { return level->largest(x, type, numel); }

HC_API void hc_ternary_encode(
    const void* x, int type, size_t numel, float bound, float scaler, uint64_t key, int opposite, uint8_t* codes) {
    level->ternary_encode(x, type, numel, bound, scaler, key, opposite, codes);
}

HC_API int32_t hc_ternary_sum(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    return level->ternary_sum(payloads, ranks, numel, divisor, out);
}

HC_API int hc_affine_encode(const void* x, int type, size_t numel, int bits, uint64_t key, uint8_t* payload) {
    return level->affine_encode(x, type, numel, bits, key, payload);
}

HC_API void hc_affine_decode(const uint8_t* payload, size_t numel, int bits, float* out) {
    level->affine_decode(payload, numel, bits, out);
}

HC_API int hc_quantise_encode(
    const void* x, int type, size_t numel, int bits, size_t bucket, int l2, uint64_t key, int opposite,
    uint8_t* payload) {
    return level->quantise_encode(x, type, numel, bits, bucket, l2, key, opposite, payload);
}

HC_API int32_t hc_quantise_sum(
    const uint8_t* const* payloads, int ranks, size_t numel, int bits, size_t bucket, float divisor, float* out) {
    return level->quantise_sum(payloads, ranks, numel, bits, bucket, divisor, out);
}

HC_API int32_t hc_accumulate(const void* x, int type, size_t numel, const float* residual, float* kept) {
    return level->accumulate(x, type, residual, kept, numel);
}

HC_API int64_t hc_topk_encode(
    const void* x, int type, size_t numel, const float* residual, float* kept, size_t k, uint8_t* payload) {
    return level->topk_encode(x, type, residual, kept, numel, k, payload);
}

HC_API int64_t hc_threshold_encode(
    const void* x, int type, size_t numel, const float* residual, float* kept, float threshold, uint8_t* payload,
    size_t capacity) {
    return level->threshold_encode(x, type, residual, kept, numel, threshold, payload, capacity);
}

HC_API int hc_sparse_sum(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    float* bound) {
    return level->sparse_sum(payloads, lengths, ranks, numel, divisor, out, bound);
}

HC_API int64_t hc_sparse_positions(const uint8_t* payload, size_t length, size_t numel, int64_t* positions) {
    return level->sparse_positions(payload, length, numel, positions);
}

HC_API void hc_positions_encode(const int64_t* positions, size_t entries, size_t numel, uint8_t* payload) {
    level->positions_encode(positions, entries, numel, payload);
}

HC_API int hc_positions_decode(
    const uint8_t* payload, size_t length, size_t entries, size_t numel, int64_t* positions) {
    return level->positions_decode(payload, length, entries, numel, positions);
}

HC_API void hc_narrow_encode(
    const uint8_t* exact, size_t length, size_t numel, int bits, float* kept, uint8_t* payload) {
    level->narrow_encode(exact, length, numel, bits, kept, payload);
}

HC_API int64_t hc_narrow_decode(
    const uint8_t* payload, size_t length, size_t numel, int bits, float* values, int64_t* positions, size_t capacity) {
    return level->narrow_decode(payload, length, numel, bits, values, positions, capacity);
}

HC_API int hc_narrow_sum(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, int bits, float divisor, float* out,
    float* bound) {
    return level->narrow_sum(payloads, lengths, ranks, numel, bits, divisor, out, bound);
}

HC_API int64_t hc_adacomp_encode(
    const void* x, int type, size_t numel, const float* residual, float* kept, size_t bin_size, int width,
    uint8_t* payload, size_t capacity) {
    return level->adacomp_encode(x, type, residual, kept, numel, bin_size, width, payload, capacity);
}

HC_API int hc_gaps_sum(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, int width, float divisor,
    float* out, float* bound) {
    return level->gaps_sum(payloads, lengths, ranks, numel, width, divisor, out, bound);
}

HC_API int64_t hc_prune_encode(
    const void* x, int type, size_t numel, float threshold, uint64_t key, uint8_t* codes, size_t capacity) {
    return level->prune_encode(x, type, numel, threshold, key, codes, capacity);
}

HC_API int hc_prune_sum(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    int32_t* largest) {
    return level->prune_sum(payloads, lengths, ranks, numel, divisor, out, largest);
}

HC_API uint64_t hc_prune_dense(
    const float* x, size_t numel, float threshold, uint64_t key, float* out, double* sum) {
    return level->prune_dense(x, numel, threshold, key, out, sum);
}

HC_API int hc_bfloat_encode(const void* x, int type, size_t numel, uint8_t* out) {
    return level->bfloat_encode(x, type, numel, out);
}

HC_API int32_t hc_bfloat_sum(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    return level->bfloat_sum(payloads, ranks, numel, divisor, out);
}

HC_API void hc_counts_encode(const float* x, size_t numel, int bits, int most, uint8_t* codes) {
    level->counts_encode(x, numel, bits, most, codes);
}

HC_API int32_t hc_counts_decode(
    const uint8_t* codes, size_t numel, int bits, int most, float scaler, float divisor, float* out) {
    return level->counts_decode(codes, numel, bits, most, scaler, divisor, out);
}

HC_API int32_t hc_project(
    const void* x, int type, size_t rows, size_t columns, const float* residual, float* kept, const float* lines,
    size_t rank, float* left) {
    return level->project(x, type, residual, kept, rows, columns, lines, rank, left);
}

HC_API void hc_backproject(
    const float* matrix, size_t rows, size_t columns, const float* left, size_t rank, float* lines) {
    level->backproject(matrix, rows, columns, left, rank, lines);
}

HC_API int32_t hc_rebuild(
    float* matrix, size_t rows, size_t columns, const float* left, const float* mine, const float* lines, size_t rank,
    float divisor, float* out) {
    return level->rebuild(matrix, rows, columns, left, mine, lines, rank, divisor, out);
}

HC_API int hc_orthonormalise(const float* matrix, size_t rows, size_t rank, float* out) {
    return level->orthonormalise(matrix, rows, rank, out);
}

HC_API int hc_sign_encode(
    const void* x, int type, size_t numel, const float* residual, float* kept, size_t bucket, uint8_t* payload) {
    return level->sign_encode(x, type, residual, kept, numel, bucket, payload);
}

HC_API void hc_momentum(
    const void* x, int type, size_t numel, const float* velocity, float factor, int nesterov, float* next) {
    level->momentum(x, type, velocity, numel, factor, nesterov, next);
}

HC_API void hc_chunk_largest(const float* x, size_t numel, size_t chunk, int64_t* positions) {
    level->chunk_largest(x, numel, chunk, positions);
}

HC_API int hc_solve(
    const int32_t* units, const double* costs, int32_t layers, int32_t candidates, int32_t levels, double* table,
    int32_t* choice) {
    return level->solve(units, costs, layers, candidates, levels, table, choice);
}
