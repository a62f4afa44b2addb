// Sums over the ranks, a block at a time: its totals stay in the first cache, however many ranks there are.
#pragma once

#include "quotient.hpp"

#include <type_traits>

namespace HC_LEVEL {

constexpr size_t SUM_BLOCK = 2048;  // elements, whose totals take 8 KB
constexpr size_t SUM_ROWS = SUM_BLOCK / LANES;
constexpr int GROUP = 4;  // ranks that are added at once: what decodes them stays in registers

// Where a sum goes on after it has added `count` ranks from `rank` on to the block at `start`.
struct Place {
    int rank;
    size_t start;

    Place after(int count, int ranks) const {
        return rank + count < ranks ? Place{rank + count, start} : Place{0, start + SUM_BLOCK};
    }
};

// Asks for `bytes` from `p` on. As many streams as there are ranks are too many for the processor to foresee.
inline void prefetch_bytes(const uint8_t* p, size_t bytes) {
    for (size_t offset = 0; offset < bytes; offset += CACHE_LINE) {
        prefetch(p + offset);
    }
}

// Calls `f` with `count` <= GROUP as a constant.
template <class F> HC_INLINE inline void with_count(int count, F f) {
    switch (count) {
        case 0: return f(std::integral_constant<int, 0>());
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        default: return f(std::integral_constant<int, GROUP>());
    }
}

// out = (0 + rank 0 + rank 1 + ...) * scale / divisor; returns the largest |out| as bits.
// add(count, place, rows, from, to) adds `count` ranks from place.rank on, in this order, to each of the `rows` rows of
// eight from place.start on: to(row, from(row) + ...).
template <bool STREAMED, class Add>
int32_t sum_groups(int ranks, size_t numel, float divisor, float* out, Add add, F8 scale = fset(1)) {
    Quotients<STREAMED> quotients(out, numel, divisor);
    alignas(32) float totals[SUM_BLOCK];
    const auto none = [](size_t) HC_INLINE { return fset(0); };
    const auto before = [&](size_t row) HC_INLINE { return fload(totals + row * LANES); };
    const auto keep = [&](size_t row, F8 total) HC_INLINE { fstore(totals + row * LANES, total); };
    for (size_t i = 0; i < numel; i += SUM_BLOCK) {
        const auto end = [&](size_t row, F8 total) HC_INLINE { quotients.put(i + row * LANES, total * scale); };
        const size_t rows = numel - i < SUM_BLOCK ? (numel - i + LANES - 1) / LANES : SUM_ROWS;
        if (ranks <= GROUP) {
            with_count(ranks, [&](auto count) HC_INLINE { add(count, Place{0, i}, rows, none, end); });
            continue;
        }
        const std::integral_constant<int, GROUP> group;
        add(group, Place{0, i}, rows, none, keep);
        int r = GROUP;
        for (; ranks - r > GROUP; r += GROUP) {
            add(group, Place{r, i}, rows, before, keep);
        }
        with_count(ranks - r, [&](auto count) HC_INLINE { add(count, Place{r, i}, rows, before, end); });
    }
    return quotients.end();
}

}  // namespace HC_LEVEL
