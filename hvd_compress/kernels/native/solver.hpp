// The exact knapsack under the choice of rates: one candidate a layer, least cost within a number of units.
// Contract and order of equals: kernels/solver.py; both add the same float64 in the same order.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace HC_LEVEL {

// Costs of consecutive numbers of units. From `a < b ? a : b` GCC makes no minimum unless it may ignore NaN.
#if defined(__AVX2__)
constexpr int COSTS = 4;
struct Costs {
    __m256d v;
};
inline Costs cset(double x) { return {_mm256_set1_pd(x)}; }
inline Costs cload(const double* p) { return {_mm256_loadu_pd(p)}; }
inline void cstore(double* p, Costs a) { _mm256_storeu_pd(p, a.v); }
inline Costs operator+(Costs a, Costs b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Costs cmin(Costs a, Costs b) { return {_mm256_min_pd(a.v, b.v)}; }
#elif defined(__SSE2__)
constexpr int COSTS = 2;
struct Costs {
    __m128d v;
};
inline Costs cset(double x) { return {_mm_set1_pd(x)}; }
inline Costs cload(const double* p) { return {_mm_loadu_pd(p)}; }
inline void cstore(double* p, Costs a) { _mm_storeu_pd(p, a.v); }
inline Costs operator+(Costs a, Costs b) { return {_mm_add_pd(a.v, b.v)}; }
inline Costs cmin(Costs a, Costs b) { return {_mm_min_pd(a.v, b.v)}; }
#else
constexpr int COSTS = 1;
struct Costs {
    double v;
};
inline Costs cset(double x) { return {x}; }
inline Costs cload(const double* p) { return {*p}; }
inline void cstore(double* p, Costs a) { *p = a.v; }
inline Costs operator+(Costs a, Costs b) { return {a.v + b.v}; }
inline Costs cmin(Costs a, Costs b) { return {a.v < b.v ? a.v : b.v}; }
#endif

constexpr int32_t SOLVER_TILE = 16;  // numbers of units whose best costs stay in registers, over all candidates

// Doubles in a row of the table for up to `left` units: TILE infinities, which stand for less than no units, then the
// row itself, up to a whole tile.
inline size_t solver_stride(int64_t left) {
    return (static_cast<size_t>(left) / SOLVER_TILE + 2) * SOLVER_TILE;
}

// Least of the allowed candidates' units; -1 if none is allowed. `most` is the largest.
inline int32_t least_units(const int32_t* units, int32_t candidates, int32_t* most) {
    int32_t least = -1;
    *most = -1;
    for (int32_t c = 0; c < candidates; c++) {
        if (units[c] >= 0) {
            least = least < 0 || units[c] < least ? units[c] : least;
            *most = units[c] > *most ? units[c] : *most;
        }
    }
    return least;
}

// One row of the table from the one before, both behind their infinities.
inline void solve_layer(
    const int32_t* units, const double* costs, int32_t candidates, int32_t least, int64_t left, const double* before,
    double* row) {
    constexpr int PARTS = SOLVER_TILE / COSTS;
    for (int64_t at = 0; at <= left; at += SOLVER_TILE) {
        Costs best[PARTS];
#pragma GCC unroll 16
        for (int i = 0; i < PARTS; i++) {
            best[i] = cset(__builtin_inf());
        }
        for (int32_t c = 0; c < candidates; c++) {
            const int32_t more = units[c] - least;
            if (units[c] < 0 || more >= at + SOLVER_TILE) {
                continue;
            }
            const Costs cost = cset(costs[c]);
            const double* from = before + at - more;
#pragma GCC unroll 16
            for (int i = 0; i < PARTS; i++) {
                best[i] = cmin(cload(from + i * COSTS) + cost, best[i]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < PARTS; i++) {
            cstore(row + at + i * COSTS, best[i]);
        }
    }
}

// units, costs: [layers * candidates], a negative number of units where a layer cannot take a candidate; scratch:
// (layers + 1) * solver_stride(levels) doubles. Returns 1 and fills choice[layers], or returns 0 if no choice fits.
//
// The table keeps every layer's costs instead of a back-pointer for each: a minimum is one instruction, a minimum with
// its index four, and the few candidates on the way back are added up again.
inline int solve(
    const int32_t* units, const double* costs, int32_t layers, int32_t candidates, int32_t levels, double* scratch,
    int32_t* choice) {
    int64_t left = levels, spread = 0;
    for (int32_t l = 0; l < layers; l++) {
        int32_t most;
        const int32_t least = least_units(units + static_cast<size_t>(l) * candidates, candidates, &most);
        if (least < 0) {
            return 0;
        }
        left -= choice[l] = least;  // kept there until the way back
        spread += most - least;
    }
    if (left < 0) {
        return 0;
    }
    left = left < spread ? left : spread;

    const size_t stride = solver_stride(left);
    double* const table = scratch + SOLVER_TILE;
    for (size_t i = 0; i < stride; i++) {
        scratch[i] = i < SOLVER_TILE ? __builtin_inf() : 0;
    }
    for (int32_t l = 0; l < layers; l++) {
        double* const row = table + (l + 1) * stride;
        for (int i = 1; i <= SOLVER_TILE; i++) {
            row[-i] = __builtin_inf();
        }
        const size_t first = static_cast<size_t>(l) * candidates;
        solve_layer(units + first, costs + first, candidates, choice[l], left, row - stride, row);
    }

    const double* const last = table + layers * stride;
    int64_t at = left;
    while (at > 0 && last[at - 1] == last[left]) {  // rows never increase: the first of the least
        at--;
    }
    for (int32_t l = layers; l-- > 0;) {
        const int32_t* const u = units + static_cast<size_t>(l) * candidates;
        const double* const k = costs + static_cast<size_t>(l) * candidates;
        const double* const before = table + l * stride;
        const int32_t least = choice[l];
        int32_t c = 0;
        while (u[c] < 0 || u[c] - least > at || before[at - (u[c] - least)] + k[c] != before[stride + at]) {
            c++;
        }
        choice[l] = c;
        at -= u[c] - least;
    }
    return 1;
}

}  // namespace HC_LEVEL
