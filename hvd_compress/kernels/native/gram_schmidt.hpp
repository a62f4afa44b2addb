// Gram-Schmidt in float64, in the order of kernels/lowrank.py: running sums, one by one, so that all ranks agree.
#pragma once

#include <cmath>
#include <cstddef>

namespace HC_LEVEL {

constexpr double DEPENDENT = 1e-6;  // of a column's norm, left when those before are taken out: float32 noise

inline size_t orthonormalise_scratch_bytes(size_t rows, size_t rank) {
    return sizeof(double) * ((rank + 1) * rows + rank);
}

inline double square_sum(const double* x, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

// sums[b] = the sum of basis[b][i] * x[i], for N rows of `count`. A sum waits for its own last term alone: several side
// by side take no longer than one.
template <int N> void dots(const double* basis, const double* x, size_t count, double* sums) {
    double totals[N] = {};
    for (size_t i = 0; i < count; i++) {
        for (int b = 0; b < N; b++) {
            totals[b] += basis[b * count + i] * x[i];
        }
    }
    for (int b = 0; b < N; b++) {
        sums[b] = totals[b];
    }
}

// Takes the part out of `x` that the `size` rows of `basis` span.
inline void take_out(const double* basis, size_t size, size_t count, double* sums, double* part, double* x) {
    size_t b = 0;
    for (; b + 4 <= size; b += 4) {
        dots<4>(basis + b * count, x, count, sums + b);
    }
    switch (size - b) {
        case 3: dots<3>(basis + b * count, x, count, sums + b); break;
        case 2: dots<2>(basis + b * count, x, count, sums + b); break;
        case 1: dots<1>(basis + b * count, x, count, sums + b); break;
        default: break;
    }
    for (b = 0; b < size; b++) {
        const double* const row = basis + b * count;
        for (size_t i = 0; i < count; i++) {
            part[i] = (b ? part[i] : 0) + row[i] * sums[b];
        }
    }
    for (size_t i = 0; i < count; i++) {
        x[i] -= part[i];
    }
}

// The columns of `matrix`, [rows, rank], finite, made orthonormal; one that depends on those before it becomes zero.
inline void orthonormalise(const float* matrix, size_t rows, size_t rank, float* out, void* scratch) {
    double* const basis = static_cast<double*>(scratch);  // its rows, one after the other
    double* const part = basis + rank * rows;
    double* const sums = part + rows;
    for (size_t k = 0; k < rank; k++) {
        double* const column = basis + k * rows;
        double largest = 0;
        for (size_t i = 0; i < rows; i++) {
            column[i] = static_cast<double>(matrix[i * rank + k]);
            const double magnitude = std::fabs(column[i]);
            largest = magnitude > largest ? magnitude : largest;
        }
        double norm = 0;
        if (largest > 0) {
            for (size_t i = 0; i < rows; i++) {
                column[i] /= largest;  // its square must not underflow
            }
            const double before = square_sum(column, rows);
            for (int twice = 0; twice < (k ? 2 : 0); twice++) {  // once leaves rounding errors as large as the part
                take_out(basis, k, rows, sums, part, column);
            }
            const double after = square_sum(column, rows);
            norm = after > before * (DEPENDENT * DEPENDENT) ? std::sqrt(after) : 0;
        }
        for (size_t i = 0; i < rows; i++) {
            column[i] = norm > 0 ? column[i] / norm : 0;
            out[i * rank + k] = static_cast<float>(column[i]);
        }
    }
}

}  // namespace HC_LEVEL
