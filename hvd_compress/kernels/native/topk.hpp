// The k largest of what has accumulated, of equals the first. Layout of the payload: kernels/sparse.py.
#pragma once

#include "sparse.hpp"

#include <algorithm>

namespace HC_LEVEL {

// The k-th largest of `count` >= k >= 1 numbers >= 0, which it reorders: only those of like size are sorted out.
inline int32_t kth_largest(int32_t* numbers, size_t count, size_t k) {
    constexpr int BINS = 2048;
    int32_t least = numbers[0], most = numbers[0];
    for (size_t j = 1; j < count; j++) {
        least = numbers[j] < least ? numbers[j] : least;
        most = numbers[j] > most ? numbers[j] : most;
    }
    int shift = 0;
    while ((most - least) >> shift >= BINS) {
        shift++;
    }
    size_t bins[BINS] = {};
    for (size_t j = 0; j < count; j++) {
        bins[(numbers[j] - least) >> shift]++;
    }
    int bin = BINS - 1;
    for (; bins[bin] < k; bin--) {
        k -= bins[bin];
    }
    if (shift == 0) {
        return least + bin;
    }
    size_t found = 0;
    for (size_t j = 0; j < count; j++) {
        const int32_t number = numbers[j];
        numbers[found] = number;
        found += (number - least) >> shift == bin;
    }
    std::nth_element(numbers, numbers + (found - k), numbers + found);
    return numbers[found - k];
}

// What may be among the k largest, in order: values, places in their chunks, and how many there are of each chunk.
// There is room for `capacity` > k and eight more; all but the k largest go when it is used up.
struct Candidates {
    size_t k, capacity;
    float* values;
    uint16_t* places;
    int32_t* work;
    uint32_t* counts;
    int32_t floor;  // of magnitudes as bits: only what is larger is taken
    size_t count, chunk, first;

    void start(int32_t from) {
        floor = from;
        count = chunk = first = 0;
    }

    HC_INLINE void add(F8 v, size_t low, size_t present) {
        take(v, low, bits(igreater(magnitude_bits(v), iset(floor))) & ((1 << present) - 1));
    }
    // Those that the mask names; some may be no larger than a floor that has risen meanwhile.
    HC_INLINE void take(F8 v, size_t low, int mask) {
        compact_places(places + count, low, mask);  // no branch on the mask: a wrong guess would wait for the memory
        count += compact(values + count, v, mask);
        if (count >= capacity) {
            end_chunk();
            prune();
            chunk--;
            first = count - counts[chunk];
        }
    }

    void end_chunk() {
        counts[chunk++] = static_cast<uint32_t>(count - first);
        first = count;
    }

    bool finite() const {
        int32_t largest = 0;
        for (size_t j = 0; j < count; j++) {
            const int32_t magnitude = as_int(values[j]) & INT32_MAX;
            largest = magnitude > largest ? magnitude : largest;
        }
        return largest < INFINITY_BITS;
    }

    // Keeps the k largest of at least k; whatever comes later must be larger than all that went.
    __attribute__((noinline)) void prune() {
        size_t larger = 0;
        for (size_t j = 0; j < count; j++) {
            work[j] = as_int(values[j]) & INT32_MAX;
        }
        const int32_t threshold = kth_largest(work, count, k);
        for (size_t j = 0; j < count; j++) {
            larger += (as_int(values[j]) & INT32_MAX) > threshold;
        }
        size_t equals = k - larger, next = 0, kept = 0;
        for (size_t c = 0; c < chunk; c++) {
            const size_t start = kept;
            for (const size_t last = next + counts[c]; next < last; next++) {
                const int32_t magnitude = as_int(values[next]) & INT32_MAX;
                const bool equal = (magnitude == threshold) & (equals > 0);
                values[kept] = values[next];
                places[kept] = places[next];
                kept += (magnitude > threshold) | equal;
                equals -= equal;
            }
            counts[c] = static_cast<uint32_t>(kept - start);
        }
        count = first = kept;
        floor = threshold;
    }
};

constexpr size_t SAMPLE = 32768;  // elements, in groups of eight

inline size_t sampled_groups(size_t numel) {
    const size_t groups = numel / (16 * LANES);  // one element in 16 of a small tensor
    return groups * LANES < SAMPLE ? groups : SAMPLE / LANES;
}
inline size_t topk_capacity(size_t numel, size_t k) {
    return numel < 2 * k + SPARSE_CHUNK ? numel : 2 * k + SPARSE_CHUNK;
}
inline size_t topk_scratch_bytes(size_t numel, size_t k) {
    const size_t room = topk_capacity(numel, k) + LANES;
    return (room + SAMPLE + sparse_chunks(numel)) * 4 + room * 6;
}

// Up to one entry in so many it is faster to look for the rows of eight that have any.
constexpr size_t FEW = 32;

// A magnitude, as bits, that the k-th largest of all is likely to reach, judged by groups at even distances; or 0.
template <class T> int32_t likely_below(const Accumulated<T>& x, size_t numel, size_t k, int32_t* work) {
    const size_t groups = sampled_groups(numel), count = groups * LANES;
    const size_t expected = static_cast<size_t>(static_cast<double>(k) / static_cast<double>(numel) * static_cast<double>(count));
    const size_t nth = expected + expected / 8 + 64;  // four standard deviations where elements are independent
    if (nth >= count) {
        return 0;
    }
    const size_t distance = numel / groups;
    for (size_t g = 0; g < groups; g++) {
        istore(work + g * LANES, magnitude_bits(x(g * distance, LANES)));
    }
    return kth_largest(work, count, nth);
}

// Packs the k >= 1 largest |accumulated|, which become 0 in `kept`. `payload` has room for sparse_bytes(numel, min(k,
// numel)), `scratch` for topk_scratch_bytes. Returns 0, or -1 where a value is not finite.
template <class T>
int topk_encode(
    const T* gradient, const float* residual, float* kept, size_t numel, size_t k, uint8_t* payload, void* scratch) {
    const Accumulated<T> x = {gradient, residual};
    const bool streamed = passes_caches(numel);
    k = k < numel ? k : numel;
    const size_t capacity = topk_capacity(numel, k), room = capacity + LANES;
    int32_t* work = static_cast<int32_t*>(scratch);
    float* values = reinterpret_cast<float*>(work + room + SAMPLE);
    uint32_t* counts = reinterpret_cast<uint32_t*>(values + room);
    uint16_t* places = reinterpret_cast<uint16_t*>(counts + sparse_chunks(numel));
    Candidates found = {k, capacity, values, places, work, counts, 0, 0, 0, 0};
    found.start(likely_below(x, numel, k, work) - 1);
    const bool few = found.floor >= 0 && k <= numel / FEW;
    I8 largest = iset(0);
    for (size_t begin = 0; begin < numel; begin += SPARSE_CHUNK) {
        const size_t end = chunk_end(begin, numel);
        if (few) {
            choose_rows<false>(x, kept, begin, end, streamed, found.floor, &largest, [&](size_t i, int mask, F8 v)
                HC_INLINE { found.take(v, i - begin, mask); });
        } else {
            write_rows(kept, begin, end, streamed, [&](size_t i, size_t present) HC_INLINE {
                const F8 v = x(i, present);
                found.add(v, i - begin, present);
                return v;
            });
        }
        found.end_chunk();
    }
    fence();
    if (found.finite() && found.count < k) {  // not so likely
        found.start(-1);
        const Accumulated<float> again = {kept, nullptr};
        for (size_t begin = 0; begin < numel; begin += SPARSE_CHUNK) {
            const size_t end = chunk_end(begin, numel);
            for (size_t i = begin; i < end; i += LANES) {
                const size_t present = end - i < LANES ? end - i : LANES;
                found.add(again(i, present), i - begin, present);
            }
            found.end_chunk();
        }
    }
    if (!found.finite()) {
        return -1;
    }
    if (k) {
        found.prune();
    }
    std::memcpy(payload, counts, 4 * found.chunk);
    std::memcpy(payload + 4 * found.chunk, values, 4 * k);
    std::memcpy(payload + 4 * found.chunk + 4 * k, places, 2 * k);
    for (size_t c = 0, next = 0; c < found.chunk; c++) {
        for (const size_t last = next + counts[c]; next < last; next++) {
            kept[c * SPARSE_CHUNK + places[next]] = 0;
        }
    }
    return 0;
}

}  // namespace HC_LEVEL
