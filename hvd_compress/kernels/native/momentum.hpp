// Momentum, written once to where the new one goes.
#pragma once

#include "feedback.hpp"

namespace HC_LEVEL {

// next = factor * velocity + gradient; as NESTEROV, next = factor * (velocity + gradient). A velocity of null is zeros.
template <bool NESTEROV, class T>
void momentum_as(const T* gradient, const float* velocity, size_t numel, float factor, float* next) {
    const Accumulated<T> x = {gradient, nullptr};
    const F8 factors = fset(factor);
    write_rows(next, 0, numel, passes_caches(numel), [&](size_t i, size_t count) HC_INLINE {
        const F8 g = x(i, count);
        const F8 u = !velocity ? fset(0) : count == LANES ? fload(velocity + i) : load(velocity + i, count);
        return NESTEROV ? (u + g) * factors : u * factors + g;
    });
    fence();
}

}  // namespace HC_LEVEL
