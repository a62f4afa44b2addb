// The kernels for one instruction set: compiled once with AVX2 (HC_LEVEL=avx2), once without (HC_LEVEL=plain).
#include "level.hpp"

#include "adacomp.hpp"
#include "affine.hpp"
#include "cast.hpp"
#include "chunks.hpp"
#include "counts.hpp"
#include "gram_schmidt.hpp"
#include "lowrank.hpp"
#include "momentum.hpp"
#include "narrow.hpp"
#include "positions.hpp"
#include "prune.hpp"
#include "prune_sum.hpp"
#include "quantise_sum.hpp"
#include "signs.hpp"
#include "solver.hpp"
#include "ternary.hpp"
#include "topk.hpp"

#include <type_traits>

namespace HC_LEVEL {
namespace {

// Calls `f` with the gradient's pointer in its own type.
template <class F> auto with_type(const void* x, int type, F f) {
    switch (type) {
        case 1: return f(static_cast<const Half*>(x));
        case 2: return f(static_cast<const BFloat*>(x));
        default: return f(static_cast<const float*>(x));
    }
}

// Calls `f` with `bits` as a constant.
template <class F> auto with_bits(int bits, F f) {
    switch (bits) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        case 5: return f(std::integral_constant<int, 5>());
        case 6: return f(std::integral_constant<int, 6>());
        case 7: return f(std::integral_constant<int, 7>());
        default: return f(std::integral_constant<int, 8>());
    }
}

// The same with up to 16 bits.
template <class F> auto with_count_bits(int bits, F f) {
    switch (bits) {
        case 9: return f(std::integral_constant<int, 9>());
        case 10: return f(std::integral_constant<int, 10>());
        case 11: return f(std::integral_constant<int, 11>());
        case 12: return f(std::integral_constant<int, 12>());
        case 13: return f(std::integral_constant<int, 13>());
        case 14: return f(std::integral_constant<int, 14>());
        case 15: return f(std::integral_constant<int, 15>());
        case 16: return f(std::integral_constant<int, 16>());
        default: return with_bits(bits, f);
    }
}

int32_t moments_(const void* x, int type, size_t numel, double* sums) {
    return with_type(x, type, [&](auto* p) {
        float first[LANES] = {};
        if (numel) {
            fstore(first, load(p, 1));
        }
        const Moments m = moments<false>(p, numel, first[0]);
        sums[0] = m.sum;
        sums[1] = m.squares;
        return m.largest_bits;
    });
}

int32_t magnitudes_(const void* x, int type, size_t numel, double* sum) {
    return with_type(x, type, [&](auto* p) {
        const Moments m = moments<true>(p, numel, 0);
        *sum = m.sum;
        return m.largest_bits;
    });
}

int32_t largest_(const void* x, int type, size_t numel) {
    return with_type(x, type, [&](auto* p) { return largest_bits(p, numel); });
}

void ternary_encode_(
    const void* x, int type, size_t numel, float bound, float scaler, uint64_t key, int opposite, uint8_t* codes) {
    with_type(x, type, [&](auto* p) { ternary_encode(p, numel, bound, scaler, key, opposite != 0, codes); });
}

int32_t ternary_sum_(const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out) {
    void* const room = scratch(ternary_sum_scratch_bytes(ranks));
    return room ? ternary_sum(payloads, ranks, numel, divisor, out, room) : NO_MEMORY;
}

int quantise_encode_(
    const void* x, int type, size_t numel, int bits, size_t bucket, int l2, uint64_t key, int opposite,
    uint8_t* payload) {
    uint8_t* codes = payload + 4 * ((numel + bucket - 1) / bucket);
    return with_type(x, type, [&](auto* p) {
        return with_bits(bits, [&](auto b) {
            return quantise_encode_as<b.value>(p, numel, bucket, l2 != 0, key, opposite != 0, payload, codes);
        });
    });
}

int32_t quantise_sum_(
    const uint8_t* const* payloads, int ranks, size_t numel, int bits, size_t bucket, float divisor, float* out) {
    return with_bits(bits, [&](auto b) {
        return quantise_sum_as<b.value>(payloads, ranks, numel, bucket, divisor, out);
    });
}

int32_t accumulate_(const void* x, int type, const float* residual, float* kept, size_t numel) {
    return with_type(x, type, [&](auto* p) { return accumulate(p, residual, kept, numel); });
}

int64_t topk_encode_(
    const void* x, int type, const float* residual, float* kept, size_t numel, size_t k, uint8_t* payload) {
    void* const room = scratch(topk_scratch_bytes(numel, k));
    return room ? with_type(x, type, [&](auto* p) { return topk_encode(p, residual, kept, numel, k, payload, room); })
                : NO_MEMORY;
}

int64_t threshold_encode_(
    const void* x, int type, const float* residual, float* kept, size_t numel, float threshold, uint8_t* payload,
    size_t capacity) {
    void* const room = scratch(threshold_scratch_bytes(capacity));
    return room ? with_type(x, type, [&](auto* p) {
        return threshold_encode(p, residual, kept, numel, threshold, payload, capacity, room);
    }) : NO_MEMORY;
}

int sparse_sum_(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    float* bound) {
    void* const room = scratch(sparse_sum_scratch_bytes(ranks));
    return room ? sparse_sum(payloads, lengths, ranks, numel, divisor, out, bound, room) : NO_MEMORY;
}

int64_t narrow_decode_(
    const uint8_t* payload, size_t length, size_t numel, int bits, float* values, int64_t* positions, size_t capacity) {
    return (bits == 8 ? narrow_decode_as<8> : narrow_decode_as<4>)(
        payload, length, numel, values, positions, capacity);
}

int narrow_sum_(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, int bits, float divisor, float* out,
    float* bound) {
    void* const room = scratch(narrow_sum_scratch_bytes(ranks));
    return !room ? NO_MEMORY : (bits == 8 ? narrow_sum_as<8> : narrow_sum_as<4>)(
        payloads, lengths, ranks, numel, divisor, out, bound, room);
}

int64_t adacomp_encode_(
    const void* x, int type, const float* residual, float* kept, size_t numel, size_t bin_size, int width,
    uint8_t* payload, size_t capacity) {
    void* const room = scratch(adacomp_scratch_bytes(bin_size));
    return !room ? NO_MEMORY : with_type(x, type, [&](auto* p) {
        using T = std::remove_reference_t<decltype(*p)>;
        const auto encode = width == 8 ? adacomp_encode<std::remove_const_t<T>, uint8_t>
                                       : adacomp_encode<std::remove_const_t<T>, uint16_t>;
        return encode(p, residual, kept, numel, bin_size, payload, capacity, room);
    });
}

int gaps_sum_(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, int width, float divisor,
    float* out, float* bound) {
    void* const room = scratch(gaps_sum_scratch_bytes(ranks));
    return !room ? NO_MEMORY : (width == 8 ? gaps_sum<uint8_t> : gaps_sum<uint16_t>)(
        payloads, lengths, ranks, numel, divisor, out, bound, room);
}

int64_t prune_encode_(
    const void* x, int type, size_t numel, float threshold, uint64_t key, uint8_t* codes, size_t capacity) {
    return with_type(x, type, [&](auto* p) { return prune_encode(p, numel, threshold, key, codes, capacity); });
}

int prune_sum_(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    int32_t* largest) {
    void* const room = scratch(prune_sum_scratch_bytes(ranks));
    return room ? prune_sum(payloads, lengths, ranks, numel, divisor, out, largest, room) : NO_MEMORY;
}

uint64_t prune_dense_(const float* x, size_t numel, float threshold, uint64_t key, float* out, double* sum) {
    const Pruned pruned = (is_normal(threshold) ? prune_dense_as<true> : prune_dense_as<false>)(
        x, numel, threshold, key, out);
    *sum = pruned.sum;
    return pruned.below;
}

int bfloat_encode_(const void* x, int type, size_t numel, uint8_t* out) {
    return with_type(x, type, [&](auto* p) { return bfloat_encode(p, numel, out); });
}

void counts_encode_(const float* x, size_t numel, int bits, int most, uint8_t* codes) {
    with_count_bits(bits, [&](auto b) { counts_encode_as<b.value>(x, numel, most, codes); });
}

int32_t counts_decode_(
    const uint8_t* codes, size_t numel, int bits, int most, float scaler, float divisor, float* out) {
    return with_count_bits(bits, [&](auto b) {
        return counts_decode_as<b.value>(codes, numel, most, scaler, divisor, out);
    });
}

int32_t project_(
    const void* x, int type, const float* residual, float* kept, size_t rows, size_t columns, const float* lines,
    size_t rank, float* left) {
    void* const room = scratch(project_scratch_bytes(columns, rank));
    return !room ? NO_MEMORY : with_type(x, type, [&](auto* p) {
        return project(p, residual, kept, rows, columns, lines, rank, left, room);
    });
}

int affine_encode_(const void* x, int type, size_t numel, int bits, uint64_t key, uint8_t* payload) {
    const AffineBlock block = with_bits(bits, [](auto b) -> AffineBlock { return affine_block<b.value>; });
    return with_type(x, type, [&](auto* p) { return affine_encode(p, numel, bits, block, key, payload); });
}

void affine_decode_(const uint8_t* payload, size_t numel, int bits, float* out) {
    with_bits(bits, [&](auto b) { affine_decode_as<b.value>(payload, numel, out); });
}

int orthonormalise_(const float* matrix, size_t rows, size_t rank, float* out) {
    void* const room = scratch(orthonormalise_scratch_bytes(rows, rank));
    if (room) {
        orthonormalise(matrix, rows, rank, out, room);
    }
    return room ? 0 : NO_MEMORY;
}

int sign_encode_(
    const void* x, int type, const float* residual, float* kept, size_t numel, size_t bucket, uint8_t* payload) {
    uint8_t* codes = payload + 4 * ((numel + bucket - 1) / bucket);
    return with_type(x, type, [&](auto* p) {
        const Accumulated<std::remove_const_t<std::remove_pointer_t<decltype(p)>>> sum = {p, residual};
        return sign_encode_as(sum, kept, numel, bucket, payload, codes);
    });
}

void momentum_(const void* x, int type, const float* velocity, size_t numel, float factor, int nesterov, float* next) {
    with_type(x, type, [&](auto* p) {
        nesterov ? momentum_as<true>(p, velocity, numel, factor, next)
                 : momentum_as<false>(p, velocity, numel, factor, next);
    });
}

}  // namespace

extern const Level LEVEL;
const Level LEVEL = {
    moments_,     magnitudes_,      largest_,    ternary_encode_, ternary_sum_, quantise_encode_, quantise_sum_,
    accumulate_,  topk_encode_,     threshold_encode_, sparse_sum_, sparse_positions,
    positions_encode, positions_decode, narrow_encode, narrow_decode_,  narrow_sum_, adacomp_encode_,  gaps_sum_,
    prune_encode_, prune_sum_,      prune_dense_, sign_encode_,    bfloat_encode_,  bfloat_sum,  counts_encode_, counts_decode_,
    project_,     backproject,      rebuild,      affine_encode_,  affine_decode_, orthonormalise_, momentum_,   chunk_largest,  solve,
};

}  // namespace HC_LEVEL
