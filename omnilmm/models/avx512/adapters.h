// What low-rank adapters add to a product (Hu et al., 2021, arXiv:2106.09685), for rows that each have their own.
//
// The pairs of all loaded adapters are rank rows of two matrices a projection; a row of x goes through its own and sees
// no other. Numbers are rounded where torch rounds them: what comes down, and what goes up again.
#pragma once

#include <vector>

#include "matrix.h"

constexpr int MOST_FUSED = 3;  // projections of a fused layer: query, key, value

struct Pair {
    const bf16* up;  // (ranks, outputs)
    int64_t first, outputs;  // its columns of the fused layer
};

// All pairs of a fused layer.
struct Pairs {
    const bf16* down;  // (ranks, projections, inputs)
    int64_t projections, inputs;
    Pair pairs[MOST_FUSED];
};

// The rank rows of a row of x.
struct Ranks {
    int32_t first, count;
};

inline float dot(const bf16* a, const bf16* b, int64_t count) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    auto next = [&](__m512 sums, int64_t i) {
        __mmask32 exist = count - i >= 32 ? 0xFFFFFFFFu : (1u << (count - i)) - 1;
        __m512bh x = (__m512bh)_mm512_maskz_loadu_epi16(exist, a + i), y = (__m512bh)_mm512_maskz_loadu_epi16(exist, b + i);
        return _mm512_dpbf16_ps(sums, x, y);
    };
    for (int64_t i = 0; i < count; i += 64) {
        even = next(even, i);
        if (i + 32 < count) odd = next(odd, i + 32);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// out (columns of the fused layer) += alpha * what the rank rows make of x (inputs).
inline void add_adapter(const Pairs& layer, Ranks ranks, const bf16* x, float alpha, bf16* out) {
    static thread_local std::vector<float> low;
    low.resize((ranks.count + 15) / 16 * 16);
    for (int64_t p = 0; p < layer.projections; p++) {
        const Pair& pair = layer.pairs[p];
        for (int r = 0; r < ranks.count; r++)
            low[r] = dot(x, layer.down + ((ranks.first + r) * layer.projections + p) * layer.inputs, layer.inputs);
        for (int r = 0; r < ranks.count; r += 16) _mm512_storeu_ps(&low[r], rounded(_mm512_loadu_ps(&low[r])));
        const bf16* up = pair.up + ranks.first * pair.outputs;
        for (int64_t i = 0; i < pair.outputs; i += 32) {
            int64_t left = pair.outputs - i;
            __mmask32 exist = left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1;
            __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
            for (int r = 0; r < ranks.count; r++) {
                __m512i both_halves = _mm512_maskz_loadu_epi16(exist, up + r * pair.outputs + i);
                __m512 factor = _mm512_set1_ps(low[r]);
                a = _mm512_fmadd_ps(factor, widen(_mm512_castsi512_si256(both_halves)), a);
                b = _mm512_fmadd_ps(factor, widen(_mm512_extracti64x4_epi64(both_halves, 1)), b);
            }
            bf16* at = out + pair.first + i;
            __m512 scale = _mm512_set1_ps(alpha);
            __m512i before = _mm512_maskz_loadu_epi16(exist, at);
            a = _mm512_add_ps(widen(_mm512_castsi512_si256(before)), rounded(_mm512_mul_ps(scale, a)));
            b = _mm512_add_ps(widen(_mm512_extracti64x4_epi64(before, 1)), rounded(_mm512_mul_ps(scale, b)));
            _mm512_mask_storeu_epi16(at, exist, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
    }
}
