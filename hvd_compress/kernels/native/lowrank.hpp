// PowerSGD's passes over a matrix M, [rows, columns]: P = M Q, Q = M^T P, M - P Q^T. Each reads the memory once.
#pragma once

#include "feedback.hpp"
#include "quotient.hpp"

#include <type_traits>

namespace HC_LEVEL {

constexpr size_t PROJECTED_ROWS = 2;     // whose sums stay in registers, with four columns of Q
constexpr size_t PROJECTED_TILE = 2048;  // columns of them that stay in the first cache, with those of Q
constexpr size_t BLOCK_ROW = PROJECTED_TILE + LANES;

inline size_t whole_lanes(size_t count) { return (count + LANES - 1) / LANES * LANES; }

inline size_t project_scratch_bytes(size_t columns, size_t rank) {
    return sizeof(float) * (rank * whole_lanes(columns) + PROJECTED_ROWS * (BLOCK_ROW + rank * LANES));
}

// Adds up the lanes by halves.
inline float folded(const float* lanes) {
    float half[4];
    for (int i = 0; i < 4; i++) {
        half[i] = lanes[i] + lanes[i + 4];
    }
    return (half[0] + half[2]) + (half[1] + half[3]);
}

// Adds block[r] * line[k], lane by lane, to sums[r][k], for `K` lines of `width` elements.
template <int K>
HC_INLINE inline void add_dots(
    const float* block, const float* lines, size_t width, size_t length, float* sums, size_t rank) {
    F8 total[PROJECTED_ROWS][K];
    for (size_t r = 0; r < PROJECTED_ROWS; r++) {
        for (int k = 0; k < K; k++) {
            total[r][k] = fload(sums + (r * rank + k) * LANES);
        }
    }
    for (size_t j = 0; j < length; j += LANES) {
        F8 row[PROJECTED_ROWS];
        for (size_t r = 0; r < PROJECTED_ROWS; r++) {
            row[r] = fload(block + r * BLOCK_ROW + j);
        }
        HC_UNROLL(4)
        for (int k = 0; k < K; k++) {
            const F8 line = fload(lines + k * width + j);
            for (size_t r = 0; r < PROJECTED_ROWS; r++) {
                total[r][k] = total[r][k] + row[r] * line;
            }
        }
    }
    for (size_t r = 0; r < PROJECTED_ROWS; r++) {
        for (int k = 0; k < K; k++) {
            fstore(sums + (r * rank + k) * LANES, total[r][k]);
        }
    }
}

// Calls `f` with 1 to 4 as a constant: as many as there are, 4 where there are more.
template <class F> HC_INLINE inline void with_up_to_four(size_t count, F f) {
    switch (count) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        default: return f(std::integral_constant<int, 4>());
    }
}

// `kept` = M = residual + gradient; left = M Q, [rows, rank], where `lines` are the columns of Q, [rank, columns].
// Returns the largest |M| as bits.
template <class T>
int32_t project(
    const T* gradient, const float* residual, float* kept, size_t rows, size_t columns, const float* lines, size_t rank,
    float* left, void* scratch) {
    const Accumulated<T> x = {gradient, residual};
    const bool streamed = passes_caches(rows * columns);
    const size_t width = whole_lanes(columns);
    float* const padded = static_cast<float*>(scratch);
    float* const block = padded + rank * width;
    float* const sums = block + PROJECTED_ROWS * BLOCK_ROW;
    for (size_t k = 0; k < rank; k++) {
        std::memcpy(padded + k * width, lines + k * columns, columns * sizeof(float));
        std::memset(padded + k * width + columns, 0, (width - columns) * sizeof(float));
    }
    std::memset(block, 0, PROJECTED_ROWS * BLOCK_ROW * sizeof(float));  // the second row may stay unused
    I8 largest = iset(0);
    for (size_t first = 0; first < rows; first += PROJECTED_ROWS) {
        const size_t present = rows - first < PROJECTED_ROWS ? rows - first : PROJECTED_ROWS;
        std::memset(sums, 0, PROJECTED_ROWS * rank * LANES * sizeof(float));
        for (size_t begin = 0; begin < columns; begin += PROJECTED_TILE) {
            const size_t length = columns - begin < PROJECTED_TILE ? columns - begin : PROJECTED_TILE;
            for (size_t r = 0; r < present; r++) {
                const size_t start = (first + r) * columns + begin;
                float* const copy = block + r * BLOCK_ROW;
                write_rows(kept, start, start + length, streamed, [&](size_t i, size_t count) HC_INLINE {
                    const F8 v = x(i, count);
                    largest = imax(largest, magnitude_bits(v));
                    fstore(copy + (i - start), v);
                    return v;
                });
                fstore(copy + length, fset(0));
            }
            for (size_t k = 0; k < rank; k += 4) {
                with_up_to_four(rank - k, [&](auto some) HC_INLINE {
                    add_dots<some.value>(
                        block, padded + k * width + begin, width, length, sums + k * LANES, rank);
                });
            }
        }
        for (size_t r = 0; r < present; r++) {
            for (size_t k = 0; k < rank; k++) {
                left[(first + r) * rank + k] = folded(sums + (r * rank + k) * LANES);
            }
        }
    }
    fence();
    return top(largest);
}

// Adds the sums over `rows` rows of left[row][k] * matrix[row] to lines[k], for `K` lines and `V` vectors from each.
template <int K, int V>
HC_INLINE inline void add_weighted(
    const float* matrix, size_t columns, size_t rows, const float* left, size_t rank, float* lines) {
    F8 total[K][V];
    for (int k = 0; k < K; k++) {
        for (int v = 0; v < V; v++) {
            total[k][v] = fset(0);
        }
    }
    for (size_t r = 0; r < rows; r++) {
        for (int k = 0; k < K; k++) {
            const F8 factor = fset(left[r * rank + k]);
            for (int v = 0; v < V; v++) {
                total[k][v] = total[k][v] + factor * fload(matrix + r * columns + v * LANES);
            }
        }
    }
    for (int k = 0; k < K; k++) {
        for (int v = 0; v < V; v++) {
            float* const line = lines + k * columns + v * LANES;
            fstore(line, fload(line) + total[k][v]);
        }
    }
}

// lines = (M^T left)^T, [rank, columns], where `left` is [rows, rank].
inline void backproject(
    const float* matrix, size_t rows, size_t columns, const float* left, size_t rank, float* lines) {
    constexpr size_t DEPTH = 8;  // rows that are added up in registers
    constexpr int WIDE = 4;
    std::memset(lines, 0, rank * columns * sizeof(float));
    for (size_t first = 0; first < rows; first += DEPTH) {
        const size_t present = rows - first < DEPTH ? rows - first : DEPTH;
        const float *const block = matrix + first * columns, *const factors = left + first * rank;
        size_t j = 0;
        for (; j + WIDE * LANES <= columns; j += WIDE * LANES) {
            size_t k = 0;
            for (; k + 2 <= rank; k += 2) {
                add_weighted<2, WIDE>(block + j, columns, present, factors + k, rank, lines + k * columns + j);
            }
            if (k < rank) {
                add_weighted<1, WIDE>(block + j, columns, present, factors + k, rank, lines + k * columns + j);
            }
        }
        for (; j + LANES <= columns; j += LANES) {
            for (size_t k = 0; k < rank; k++) {
                add_weighted<1, 1>(block + j, columns, present, factors + k, rank, lines + k * columns + j);
            }
        }
        for (; j < columns; j++) {
            for (size_t k = 0; k < rank; k++) {
                float total = 0;
                for (size_t r = 0; r < present; r++) {
                    total += factors[r * rank + k] * block[r * columns + j];
                }
                lines[k * columns + j] += total;
            }
        }
    }
}

// As `rebuild`, of the rank K, or any for K = 0.
template <int K>
int32_t rebuild_as(
    float* matrix, size_t rows, size_t columns, const float* left, const float* mine, const float* lines, size_t some,
    float divisor, float* out) {
    const size_t rank = K ? K : some;
    const bool streamed = passes_caches(rows * columns);
    const Divisor divide(divisor);
    I8 largest = iset(0);
    for (size_t r = 0; r < rows; r++) {
        const float* const factors = left + r * rank;
        float* const rest = matrix + r * columns;
        write_rows(out + r * columns, 0, columns, streamed, [&](size_t j, size_t count) HC_INLINE {
            const bool whole = count == LANES;
            const auto read = [&](const float* p) HC_INLINE { return whole ? fload(p) : load(p, count); };
            F8 left_over = read(rest + j), total = fset(0);
            HC_UNROLL(4)
            for (size_t k = 0; k < rank; k++) {
                const F8 factor = fset(factors[k]);
                const F8 term = factor * read(lines + k * columns + j);
                total = k ? total + term : term;
                left_over = left_over - factor * read(mine + k * columns + j);
            }
            whole ? fstore(rest + j, left_over) : fstore(rest + j, left_over, count);
            const F8 quotient = divide(total);
            largest = imax(largest, magnitude_bits(quotient));
            return quotient;
        });
    }
    fence();
    return top(largest);
}

// out = left lines / divisor, and matrix -= left mine; `left` is [rows, rank], `lines` and `mine` are [rank, columns].
// Returns the largest |out| as bits.
inline int32_t rebuild(
    float* matrix, size_t rows, size_t columns, const float* left, const float* mine, const float* lines, size_t rank,
    float divisor, float* out) {
    const auto as = rank == 1   ? rebuild_as<1>
                    : rank == 2 ? rebuild_as<2>
                    : rank == 4 ? rebuild_as<4>
                                : rebuild_as<0>;
    return as(matrix, rows, columns, left, mine, lines, rank, divisor, out);
}

}  // namespace HC_LEVEL
