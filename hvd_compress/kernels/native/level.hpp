// What one compilation of the kernels offers. Gradients come as a pointer and a type: 0 float32, 1 float16, 2 bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>

struct Level {
    int32_t (*moments)(const void* x, int type, size_t numel, double* sums);
    int32_t (*largest)(const void* x, int type, size_t numel);
    void (*ternary_encode)(
        const void* x, int type, size_t numel, float bound, float scaler, uint64_t key, uint8_t* codes);
    void (*ternary_sum)(
        const uint8_t* const* codes, const float* scalers, int ranks, size_t numel, float divisor, float* out);
    int (*quantise_encode)(
        const void* x, int type, size_t numel, int bits, size_t bucket, int l2, uint64_t key, uint8_t* payload);
    void (*quantise_sum)(
        const uint8_t* const* payloads, int ranks, size_t numel, int bits, size_t bucket, float divisor, float* out);
    uint64_t (*prune_dense)(const float* x, size_t numel, float threshold, uint64_t key, float* out, double* sum);
    int (*bfloat_encode)(const void* x, int type, size_t numel, uint8_t* out);
    void (*bfloat_sum)(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out);
};
