// Sparse payloads: what reaches a threshold, and the sum of what several ranks sent. Layout: kernels/sparse.py.
#pragma once

#include "compact.hpp"
#include "feedback.hpp"
#include "quotient.hpp"

namespace HC_LEVEL {

constexpr size_t SPARSE_CHUNK = 65536;

inline size_t sparse_chunks(size_t numel) { return (numel + SPARSE_CHUNK - 1) / SPARSE_CHUNK; }
inline size_t sparse_bytes(size_t numel, size_t entries) { return 4 * sparse_chunks(numel) + 6 * entries; }
inline size_t chunk_end(size_t begin, size_t numel) {
    return numel - begin < SPARSE_CHUNK ? numel : begin + SPARSE_CHUNK;
}

inline size_t threshold_scratch_bytes(size_t capacity) { return 2 * (capacity + LANES); }

// Writes all that has accumulated to `kept`; returns the largest magnitude as bits.
template <class T> int32_t accumulate(const T* gradient, const float* residual, float* kept, size_t numel) {
    const Accumulated<T> x = {gradient, residual};
    I8 largest = iset(0);
    write_rows(kept, 0, numel, passes_caches(numel), [&](size_t i, size_t present) HC_INLINE {
        const F8 v = x(i, present);
        largest = imax(largest, magnitude_bits(v));
        return v;
    });
    fence();
    return top(largest);
}

// Packs all |accumulated| >= threshold > 0, which become 0 in `kept`. `payload` has room for sparse_bytes(numel,
// capacity), `scratch` for threshold_scratch_bytes. Returns how many entries there are; -1 where a value is not finite;
// -2 for more than `capacity`, with all that has accumulated in `kept`.
template <class T>
int64_t threshold_encode(
    const T* gradient, const float* residual, float* kept, size_t numel, float threshold, uint8_t* payload,
    size_t capacity, void* scratch) {
    const Accumulated<T> x = {gradient, residual};
    const bool streamed = passes_caches(numel);
    const int32_t floor = as_int(threshold) - 1;
    uint8_t *values = payload + 4 * sparse_chunks(numel), *counts = payload;
    uint16_t* places = static_cast<uint16_t*>(scratch);
    I8 largest = iset(0);
    size_t count = 0;
    bool full = false;
    for (size_t begin = 0; begin < numel && !full; begin += SPARSE_CHUNK, counts += 4) {
        const size_t first = count;
        const auto send = [&](size_t i, int mask, F8 v) HC_INLINE {
            if (capacity - count < LANES && capacity - count < static_cast<size_t>(__builtin_popcount(mask))) {
                full = true;
                return;
            }
            compact_places(places + count, i - begin, mask);
            if (capacity - count < LANES) {
                float eight[LANES];
                const size_t sent = compact(eight, v, mask);
                std::memcpy(values + 4 * count, eight, 4 * sent);
                count += sent;
            } else {
                count += compact_bytes(values + 4 * count, v, mask);
            }
        };
        choose_rows<true>(x, kept, begin, chunk_end(begin, numel), streamed, floor, &largest, send);
        const uint32_t entries = static_cast<uint32_t>(count - first);
        std::memcpy(counts, &entries, 4);
    }
    fence();
    if (full) {
        return accumulate(gradient, residual, kept, numel) >= INFINITY_BITS ? -1 : -2;
    }
    std::memcpy(values + 4 * count, places, 2 * count);
    return top(largest) >= INFINITY_BITS ? -1 : static_cast<int64_t>(count);
}

// What is wrong with a payload.
constexpr int SPARSE_TOO_SHORT = 1;   // for the counts of all chunks
constexpr int SPARSE_MISCOUNTED = 2;  // the counts are too large, or their entries are of another length
constexpr int SPARSE_UNORDERED = 3;   // positions do not ascend, or are past the end
constexpr int ERROR_CODES = 16;

inline int check_counts(const uint8_t* payload, size_t length, size_t numel, uint64_t* entries) {
    const size_t chunks = sparse_chunks(numel);
    if (length / 4 < chunks) {
        return SPARSE_TOO_SHORT;
    }
    uint64_t total = 0;
    uint32_t most = 0;
    for (size_t c = 0; c < chunks; c++) {
        uint32_t count;
        std::memcpy(&count, payload + 4 * c, 4);
        total += count;
        most = count > most ? count : most;
    }
    *entries = total;
    return most > SPARSE_CHUNK || length != sparse_bytes(numel, total) ? SPARSE_MISCOUNTED : 0;
}

// Where reading has come to in the payload of one rank.
struct SparseReader {
    const uint8_t *counts, *values, *places;

    // Adds the entries of the next chunk, of `numel` elements, to `out`, and takes their largest |bits|. Returns whether
    // their places are as they should.
    bool add_chunk(float* out, size_t numel, int32_t* largest) {
        uint32_t count;
        std::memcpy(&count, counts, 4);
        counts += 4;
        int32_t most = *largest, previous = -1;
        for (uint32_t j = 0; j < count; j++, values += 4, places += 2) {
            uint16_t place;
            float value;
            std::memcpy(&place, places, 2);
            std::memcpy(&value, values, 4);
            if (place <= previous || place >= numel) {
                return false;
            }
            previous = place;
            const int32_t magnitude = as_int(value) & INT32_MAX;
            most = magnitude > most ? magnitude : most;
            out[place] += value;
        }
        *largest = most;
        return true;
    }
};

// Returns what is wrong, or 0; calls each(position) for those up to there.
template <class F> int check_sparse(const uint8_t* payload, size_t length, size_t numel, F each) {
    uint64_t entries;
    const int code = check_counts(payload, length, numel, &entries);
    if (code) {
        return code;
    }
    const uint8_t* places = payload + 4 * (sparse_chunks(numel) + entries);
    for (size_t begin = 0; begin < numel; begin += SPARSE_CHUNK, payload += 4) {
        const size_t size = chunk_end(begin, numel) - begin;
        uint32_t count;
        std::memcpy(&count, payload, 4);
        for (int32_t previous = -1; count; count--, places += 2) {
            uint16_t place;
            std::memcpy(&place, places, 2);
            if (place <= previous || place >= size) {
                return SPARSE_UNORDERED;
            }
            previous = place;
            each(begin + place);
        }
    }
    return 0;
}

// The positions in a payload as int64, of which there are as many as it has entries; or -1 for one that makes no sense.
inline int64_t sparse_positions(const uint8_t* payload, size_t length, size_t numel, int64_t* positions) {
    int64_t* next = positions;
    const int code = check_sparse(
        payload, length, numel, [&](size_t position) { *next++ = static_cast<int64_t>(position); });
    return code ? -1 : next - positions;
}

// out = sum / divisor, and zeros again in `sum`.
inline void settle(float* sum, size_t numel, float divisor, float* out, bool streamed) {
    const Divisor divide(divisor);
    const F8 zero = fset(0);
    const Accumulated<float> x = {sum, nullptr};
    write_rows(out, 0, numel, streamed, [&](size_t i, size_t present) HC_INLINE {
        const F8 v = x(i, present);
        fstore(sum + i, zero, present);
        return divide(v);
    });
}

inline size_t sparse_sum_scratch_bytes(int ranks) {
    return SPARSE_CHUNK * sizeof(float) + static_cast<size_t>(ranks) * (sizeof(SparseReader) + sizeof(int32_t));
}

// out = (0 + payload of rank 0 + ...) / divisor, and a `bound` of all |out|, infinite where a value is not finite.
// Returns 0, or -(ERROR_CODES * rank + code) for the first rank with a payload that makes no sense.
inline int sparse_sum(
    const uint8_t* const* payloads, const size_t* lengths, int ranks, size_t numel, float divisor, float* out,
    float* bound, void* scratch) {
    float* sum = static_cast<float*>(scratch);
    SparseReader* readers = reinterpret_cast<SparseReader*>(sum + SPARSE_CHUNK);
    int32_t* largest = reinterpret_cast<int32_t*>(readers + ranks);
    bool sound = true;
    for (int r = 0; r < ranks; r++) {
        uint64_t entries;
        sound = sound && check_counts(payloads[r], lengths[r], numel, &entries) == 0;
        const uint8_t* values = payloads[r] + 4 * sparse_chunks(numel);
        readers[r] = {payloads[r], values, sound ? values + 4 * entries : values};
        largest[r] = 0;
    }
    const bool streamed = passes_caches(numel);
    std::memset(sum, 0, SPARSE_CHUNK * sizeof(float));
    for (size_t begin = 0; sound && begin < numel; begin += SPARSE_CHUNK) {
        const size_t size = chunk_end(begin, numel) - begin;
        for (int r = 0; sound && r < ranks; r++) {
            sound = readers[r].add_chunk(sum, size, &largest[r]);
        }
        settle(sum, size, divisor, out + begin, streamed);
    }
    fence();
    float total = 0;  // rounded as the sum is, hence never less
    for (int r = 0; r < ranks; r++) {
        if (!sound) {
            const int code = check_sparse(payloads[r], lengths[r], numel, [](size_t) {});
            if (code) {
                return -(ERROR_CODES * r + code);
            }
        }
        total += as_float(largest[r] < INFINITY_BITS ? largest[r] : INFINITY_BITS);
    }
    *bound = divisor == 1 ? total : total / divisor;
    return 0;
}

}  // namespace HC_LEVEL
