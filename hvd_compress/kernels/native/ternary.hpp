// TernGrad: a gradient's moments, its stochastic ternary codes, and the sum of what several ranks sent.
// Layout of the codes: kernels/ternary.py.
#pragma once

#include "blocks.hpp"
#include "load.hpp"
#include "random.hpp"

namespace HC_LEVEL {

constexpr size_t TERNARY_BLOCK = 128;  // elements in eight words

inline size_t ternary_code_bytes(size_t numel) {
    return (numel + TERNARY_BLOCK - 1) / TERNARY_BLOCK * (TERNARY_BLOCK / 4);
}

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
// of min(|x|, bound) / scaler; 0 for the others. Rounds up: a negative one goes by the opposite of `bits`.
template <class U> I8 ternarize(F8 x, F8 bound, const U& uniform, I8 bits, int row) {
    const I8 sign = signs(x);
    const Mask chosen = fless(uniform(bits ^ (sign & iset(OPPOSITE))), fmin(fabs8(x), bound));
    return chosen & shl(iset(1) - sign, 2 * row);
}

template <bool NORMAL, class T>
void ternary_encode_as(
    const T* x, size_t numel, float bound, float scaler, uint64_t key, bool opposite, uint8_t* codes) {
    const Stream stream(key, opposite);
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
            const I8 bits = stream.bits(stream.counters(first));
            words = words | ternarize(v, bounds, uniform, bits, static_cast<int>(row));
        }
        istore(codes + full / 4, words);
    }
}

template <class T>
void ternary_encode(const T* x, size_t numel, float bound, float scaler, uint64_t key, bool opposite, uint8_t* codes) {
    const auto encode = is_normal(scaler) ? ternary_encode_as<true, T> : ternary_encode_as<false, T>;
    encode(x, numel, bound, scaler, key, opposite, codes);
}

// What each code stands for, twice: the bit above a code does not matter to `lookup`.
inline F8 ternary_table(float scaler) {
    const float entries[LANES] = {0, scaler, -scaler, __builtin_nanf(""), 0, scaler, -scaler, __builtin_nanf("")};
    return fload(entries);
}

// scale * sum over `ranks` of scaler * code, in rank order, divided by `divisor`.
template <bool STREAMED>
int32_t ternary_sum_as(
    const uint8_t* const* codes, const float* scalers, float scale, int ranks, size_t numel, float divisor,
    float* out) {
    constexpr size_t ROWS = TERNARY_BLOCK / LANES;
    const auto add = [&](auto count, Place place, size_t rows, auto from, auto to) HC_INLINE {
        constexpr int COUNT = decltype(count)::value;
        const Place next = place.after(COUNT, ranks);
        F8 tables[GROUP];
        I8 words[GROUP];
        for (int r = 0; r < COUNT; r++) {
            tables[r] = ternary_table(scalers[place.rank + r]);
        }
        for (size_t block = 0; block < rows; block += ROWS) {
            for (int r = 0; r < COUNT; r++) {
                words[r] = iload(codes[place.rank + r] + (place.start + block * LANES) / 4);
                if (next.rank + r < ranks) {
                    prefetch(codes[next.rank + r] + (next.start + block * LANES) / 4);
                }
            }
            for (size_t row = block; row < rows && row < block + ROWS; row++) {
                F8 total = from(row);
                for (int r = 0; r < COUNT; r++) {
                    total = total + lookup4(tables[r], words[r]);
                    words[r] = shr<2>(words[r]);
                }
                to(row, total);
            }
        }
    };
    return sum_groups<STREAMED>(ranks, numel, divisor, out, add, fset(scale));
}

inline size_t ternary_sum_scratch_bytes(int ranks) { return ranks * (sizeof(const uint8_t*) + sizeof(float)); }

// Payloads are a scaler, then codes. Where all scalers are the same, codes are added, which is exact, and the sum scaled.
inline int32_t ternary_sum(
    const uint8_t* const* payloads, int ranks, size_t numel, float divisor, float* out, void* room) {
    const auto codes = static_cast<const uint8_t**>(room);
    float* const scalers = reinterpret_cast<float*>(codes + ranks);
    bool same = ranks > 0;
    for (int r = 0; r < ranks; r++) {
        std::memcpy(scalers + r, payloads[r], 4);
        codes[r] = payloads[r] + 4;
        same = same && std::memcmp(payloads[r], payloads[0], 4) == 0;
    }
    const float scale = same ? scalers[0] : 1;
    for (int r = 0; r < ranks && same; r++) {
        scalers[r] = 1;
    }
    const auto sum = can_stream(out, numel) ? ternary_sum_as<true> : ternary_sum_as<false>;
    return sum(codes, scalers, scale, ranks, numel, divisor, out);
}

}  // namespace HC_LEVEL
