// TernGrad: a gradient's moments, its stochastic ternary codes, and the sum of what several ranks sent.
// Layout of the codes: kernels/ternary.py.
#pragma once

#include "load.hpp"
#include "quotient.hpp"
#include "random.hpp"

namespace HC_LEVEL {

constexpr size_t TERNARY_BLOCK = 128;  // elements in eight words

// Largest |x| as bits, and the sums of x - shift and (x - shift)^2 in float64.
struct Moments {
    int32_t largest_bits;
    double sum, squares;
};

constexpr int MOMENT_LANES = STREAMS * LANES;

// Halves are added to halves, so that the order, hence every bit, is the same everywhere.
inline double fold(double* lanes) {
    for (int half = MOMENT_LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

// Four quarters of as many full rows of eight, each summed in eight lanes, row after row; what remains comes last.
// With MAGNITUDES, of |x| in place of x; then `shift` is 0.
template <bool MAGNITUDES, class T> Moments moments(const T* x, size_t numel, float shift) {
    const D8 origin = dset(static_cast<double>(shift));
    I8 largest[STREAMS];
    D8 sum[STREAMS], squares[STREAMS];
    for (int s = 0; s < STREAMS; s++) {
        largest[s] = iset(0);
        sum[s] = squares[s] = dset(0);
    }
    const auto take = [&](int s, F8 v) {
        largest[s] = imax(largest[s], magnitude_bits(v));
        const D8 d = widen(MAGNITUDES ? fabs8(v) : v) - origin;
        sum[s] = sum[s] + d;
        if (!MAGNITUDES) {  // nobody asks for their squares
            squares[s] = squares[s] + d * d;
        }
    };
    const size_t quarter = numel / MOMENT_LANES * LANES;
    for (size_t i = 0; i < quarter; i += LANES) {
        for (int s = 0; s < STREAMS; s++) {
            take(s, load(x + s * quarter + i));
        }
    }
    const size_t done = STREAMS * quarter;
    if (done < numel) {
        float rest[MOMENT_LANES];
        for (int i = 0; i < MOMENT_LANES; i++) {
            float one[LANES];
            fstore(one, done + i < numel ? load(x + done + i, 1) : fset(shift));
            rest[i] = one[0];
        }
        for (int s = 0; s < STREAMS; s++) {
            take(s, fload(rest + s * LANES));
        }
    }
    double lanes[MOMENT_LANES];
    Moments result;
    for (int s = 0; s < STREAMS; s++) {
        dstore(lanes + s * LANES, sum[s]);
    }
    result.sum = fold(lanes);
    for (int s = 0; s < STREAMS; s++) {
        dstore(lanes + s * LANES, squares[s]);
    }
    result.squares = fold(lanes);
    result.largest_bits = top(imax(imax(largest[0], largest[1]), imax(largest[2], largest[3])));
    return result;
}

template <class T> int32_t largest_bits(const T* x, size_t numel) {
    I8 largest[STREAMS] = {iset(0), iset(0), iset(0), iset(0)};
    const size_t quarter = numel / MOMENT_LANES * LANES;
    for (size_t i = 0; i < quarter; i += LANES) {
        for (int s = 0; s < STREAMS; s++) {
            largest[s] = imax(largest[s], magnitude_bits(load(x + s * quarter + i)));
        }
    }
    for (size_t i = STREAMS * quarter; i < numel; i += LANES) {
        const F8 v = numel - i >= LANES ? load(x + i) : load(x + i, numel - i);
        largest[0] = imax(largest[0], magnitude_bits(v));
    }
    return top(imax(imax(largest[0], largest[1]), imax(largest[2], largest[3])));
}

// A code, 1 or 2 (negative), shifted to its place, for the elements of eight that are chosen: those with a probability
// of min(|x|, bound) / scaler; 0 for the others.
template <class U> I8 ternarize(F8 x, F8 bound, const U& uniform, I8 bits, int row) {
    const Mask chosen = fless(uniform(bits), fmin(fabs8(x), bound));
    return chosen & by_sign(x, iset(1 << (2 * row)), iset(static_cast<int32_t>(2u << (2 * row))));
}

template <bool NORMAL, class T>
void ternary_encode_as(const T* x, size_t numel, float bound, float scaler, uint64_t key, uint8_t* codes) {
    const Stream stream(key);
    const Uniform<NORMAL> uniform(scaler);
    const F8 bounds = fset(bound);
    const auto block = [&](size_t i) {
        I8 words = iset(0);
        const I8 counters = stream.counters(i);
        HC_UNROLL(16)
        for (int row = 0; row < 16; row++) {
            const I8 bits = stream.bits(counters + iset(row * LANES));
            words = words | ternarize(load(x + i + row * LANES), bounds, uniform, bits, row);
        }
        istore(codes + i / 4, words);
    };
    const size_t full = numel / TERNARY_BLOCK * TERNARY_BLOCK;
    const size_t quarter = numel / (STREAMS * TERNARY_BLOCK) * TERNARY_BLOCK;
    // Backwards: the ends of the quarters, which the moments were taken of just before, may still be in the caches.
    constexpr size_t CHUNK = 64 * TERNARY_BLOCK;
    for (size_t end = quarter; end > 0;) {
        const size_t start = (end - 1) / CHUNK * CHUNK;
        for (size_t i = start; i < end; i += TERNARY_BLOCK) {
            for (int s = 0; s < STREAMS; s++) {
                prefetch_ahead(x + s * quarter + i, TERNARY_BLOCK);
                block(s * quarter + i);
            }
        }
        end = start;
    }
    for (size_t i = STREAMS * quarter; i < full; i += TERNARY_BLOCK) {
        block(i);
    }
    if (full < numel) {
        I8 words = iset(0);
        for (size_t first = full, row = 0; first < numel; first += LANES, row++) {
            const F8 v = numel - first >= LANES ? load(x + first) : load(x + first, numel - first);
            words = words | ternarize(v, bounds, uniform, stream.bits(stream.counters(first)), static_cast<int>(row));
        }
        istore(codes + full / 4, words);
    }
}

template <class T>
void ternary_encode(const T* x, size_t numel, float bound, float scaler, uint64_t key, uint8_t* codes) {
    (is_normal(scaler) ? ternary_encode_as<true, T> : ternary_encode_as<false, T>)(x, numel, bound, scaler, key, codes);
}

constexpr int FEW_RANKS = 4;

// Sum over `ranks` of scaler * code, in rank order, divided by `divisor`. RANKS is `ranks` where that is known, or 0.
template <int RANKS, bool STREAMED>
int32_t ternary_sum(
    const uint8_t* const* codes, const float* scalers, int ranks, size_t numel, float divisor, float* out) {
    const int count = RANKS ? RANKS : ranks;
    Quotients<STREAMED> quotients(out, numel, divisor);
    F8 few[FEW_RANKS];
    for (int r = 0; r < (RANKS ? RANKS : 0); r++) {
        const float s = scalers[r], entries[LANES] = {0, s, -s, __builtin_nanf(""), 0, s, -s, __builtin_nanf("")};
        few[r] = fload(entries);
    }
    for (size_t i = 0; i < numel; i += TERNARY_BLOCK) {
        I8 words[FEW_RANKS];
        for (int r = 0; r < (RANKS ? RANKS : 0); r++) {
            words[r] = iload(codes[r] + i / 4);
        }
        const size_t rows = numel - i >= TERNARY_BLOCK ? 16 : (numel - i + LANES - 1) / LANES;
        for (size_t row = 0; row < rows; row++) {
            F8 total = fset(0);
            for (int r = 0; r < count; r++) {
                if (RANKS) {  // the table repeats itself: the bit above a code does not matter
                    total = total + lookup(few[r], words[r]);
                    words[r] = shr<2>(words[r]);
                } else {
                    const float s = scalers[r];
                    const float entries[LANES] = {0, s, -s, __builtin_nanf(""), 0, s, -s, __builtin_nanf("")};
                    const I8 word = shr(iload(codes[r] + i / 4), static_cast<int>(2 * row));
                    total = total + lookup(fload(entries), word);
                }
            }
            quotients.put(i + row * LANES, total);
        }
    }
    return quotients.end();
}

template <int RANKS>
int32_t ternary_sum(
    const uint8_t* const* codes, const float* scalers, int ranks, size_t numel, float divisor, float* out) {
    const auto sum = can_stream(out, numel) ? ternary_sum<RANKS, true> : ternary_sum<RANKS, false>;
    return sum(codes, scalers, ranks, numel, divisor, out);
}

inline int32_t ternary_sum(
    const uint8_t* const* codes, const float* scalers, int ranks, size_t numel, float divisor, float* out) {
    switch (ranks) {
        case 1: return ternary_sum<1>(codes, scalers, ranks, numel, divisor, out);
        case 2: return ternary_sum<2>(codes, scalers, ranks, numel, divisor, out);
        case 3: return ternary_sum<3>(codes, scalers, ranks, numel, divisor, out);
        case 4: return ternary_sum<4>(codes, scalers, ranks, numel, divisor, out);
        default: return ternary_sum<0>(codes, scalers, ranks, numel, divisor, out);
    }
}

}  // namespace HC_LEVEL
