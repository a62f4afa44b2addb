// What one compilation of the kernels offers. Gradients come as a pointer and a type: 0 float32, 1 float16, 2 bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>

// Room for a kernel to work in, of this thread; what is in it does not outlive the call. Null if there is no memory.
void* scratch(size_t bytes);

constexpr int NO_MEMORY = -(1 << 30);  // an error of no rank, see ERROR_CODES

struct Level {
    int32_t (*moments)(const void* x, int type, size_t numel, double* sums);
    int32_t (*magnitudes)(const void* x, int type, size_t numel, double* sum);
    int32_t (*largest)(const void* x, int type, size_t numel);
    void (*ternary_encode)(
        const void* x, int type, size_t numel, float bound, float scaler, uint64_t key, int opposite, uint8_t* codes);
    int32_t (*ternary_sum)(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out);
    int (*quantise_encode)(
        const void* x, int type, size_t numel, int bits, size_t bucket, int l2, uint64_t key, int opposite,
        uint8_t* payload);
    int32_t (*quantise_sum)(
        const uint8_t* const* payloads, int ranks, size_t numel, int bits, size_t bucket, float divisor, float* out);
    int32_t (*accumulate)(const void* x, int type, const float* residual, float* kept, size_t numel);
    int64_t (*topk_encode)(
        const void* x, int type, const float* residual, float* kept, size_t numel, size_t k, uint8_t* payload);
    int64_t (*threshold_encode)(
        const void* x, int type, const float* residual, float* kept, size_t numel, float threshold, uint8_t* payload,
        size_t capacity);
    int (*sparse_sum)(
        const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
        float* bound);
    int64_t (*sparse_positions)(const uint8_t* payload, size_t length, size_t numel, int64_t* positions);
    void (*positions_encode)(const int64_t* positions, size_t entries, size_t numel, uint8_t* payload);
    int (*positions_decode)(
        const uint8_t* payload, size_t length, size_t entries, size_t numel, int64_t* positions);
    void (*narrow_encode)(
        const uint8_t* exact, size_t length, size_t numel, int bits, float* kept, uint8_t* payload);
    int64_t (*narrow_decode)(
        const uint8_t* payload, size_t length, size_t numel, int bits, float* values, int64_t* positions,
        size_t capacity);
    int (*narrow_sum)(
        const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, int bits, float divisor,
        float* out, float* bound);
    int64_t (*adacomp_encode)(
        const void* x, int type, const float* residual, float* kept, size_t numel, size_t bin_size, int width,
        uint8_t* payload, size_t capacity);
    int (*gaps_sum)(
        const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, int width, float divisor,
        float* out, float* bound);
    int64_t (*prune_encode)(
        const void* x, int type, size_t numel, float threshold, uint64_t key, uint8_t* codes, size_t capacity);
    int (*prune_sum)(
        const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
        int32_t* largest);
    uint64_t (*prune_dense)(const float* x, size_t numel, float threshold, uint64_t key, float* out, double* sum);
    int (*sign_encode)(
        const void* x, int type, const float* residual, float* kept, size_t numel, size_t bucket, uint8_t* payload);
    int (*bfloat_encode)(const void* x, int type, size_t numel, uint8_t* out);
    int32_t (*bfloat_sum)(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out);
    void (*counts_encode)(const float* x, size_t numel, int bits, int most, uint8_t* codes);
    int32_t (*counts_decode)(
        const uint8_t* codes, size_t numel, int bits, int most, float scaler, float divisor, float* out);
    int32_t (*project)(
        const void* x, int type, const float* residual, float* kept, size_t rows, size_t columns, const float* lines,
        size_t rank, float* left);
    void (*backproject)(
        const float* matrix, size_t rows, size_t columns, const float* left, size_t rank, float* lines);
    int32_t (*rebuild)(
        float* matrix, size_t rows, size_t columns, const float* left, const float* mine, const float* lines,
        size_t rank, float divisor, float* out);
    int (*affine_encode)(const void* x, int type, size_t numel, int bits, uint64_t key, uint8_t* payload);
    void (*affine_decode)(const uint8_t* payload, size_t numel, int bits, float* out);
    int (*orthonormalise)(const float* matrix, size_t rows, size_t rank, float* out);
    void (*momentum)(
        const void* x, int type, const float* velocity, size_t numel, float factor, int nesterov, float* next);
    void (*chunk_largest)(const float* x, size_t numel, size_t chunk, int64_t* positions);
    int (*solve)(
        const int32_t* units, const double* costs, int32_t layers, int32_t candidates, int32_t levels, double* table,
        int32_t* choice);
};
