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

// sums (outputs) += what RANKS rank rows make of their numbers, read as so many streams side by side.
template <int RANKS>
inline void raise(const bf16* up, const float* low, int64_t outputs, float* sums) {
    for (int64_t i = 0; i < outputs; i += 32) {
        __mmask32 exist = outputs - i >= 32 ? 0xFFFFFFFFu : (1u << (outputs - i)) - 1;
        __m512 a = _mm512_loadu_ps(sums + i), b = _mm512_loadu_ps(sums + i + 16);
#pragma GCC unroll 4
        for (int r = 0; r < RANKS; r++) {
            __m512i numbers = _mm512_maskz_loadu_epi16(exist, up + r * outputs + i);
            __m512 factor = _mm512_set1_ps(low[r]);
            a = _mm512_fmadd_ps(factor, widen(_mm512_castsi512_si256(numbers)), a);
            b = _mm512_fmadd_ps(factor, widen(_mm512_extracti64x4_epi64(numbers, 1)), b);
        }
        _mm512_storeu_ps(sums + i, a);
        _mm512_storeu_ps(sums + i + 16, b);
    }
}

// out (columns of the fused layer) += alpha * what the rank rows make of x (inputs).
inline void add_adapter(const Pairs& layer, Ranks ranks, const bf16* x, float alpha, bf16* out) {
    static thread_local std::vector<float> room;
    int64_t width = (ranks.count + 15) / 16 * 16;
    room.assign(layer.projections * width, 0.0f);
    const bf16* down = layer.down + ranks.first * layer.projections * layer.inputs;
    for (int r = 0; r < ranks.count; r++)  // as they lie in memory
        for (int64_t p = 0; p < layer.projections; p++, down += layer.inputs) room[p * width + r] = dot(x, down, layer.inputs);
    for (int64_t i = 0; i < layer.projections * width; i += 16) _mm512_storeu_ps(&room[i], rounded(_mm512_loadu_ps(&room[i])));
    static thread_local std::vector<float> sums;
    for (int64_t p = 0; p < layer.projections; p++) {
        const Pair& pair = layer.pairs[p];
        const bf16* up = pair.up + ranks.first * pair.outputs;
        const float* low = &room[p * width];
        sums.assign((pair.outputs + 31) / 32 * 32, 0.0f);
        int r = 0;
        for (; r + 4 <= ranks.count; r += 4) raise<4>(up + r * pair.outputs, low + r, pair.outputs, sums.data());
        for (; r < ranks.count; r++) raise<1>(up + r * pair.outputs, low + r, pair.outputs, sums.data());
        for (int64_t i = 0; i < pair.outputs; i += 16) {
            int64_t left = pair.outputs - i;
            __mmask16 exist = left >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << left) - 1);
            bf16* at = out + pair.first + i;
            __m512 added = rounded(_mm512_mul_ps(_mm512_set1_ps(alpha), _mm512_loadu_ps(&sums[i])));
            __m512 total = _mm512_add_ps(widen(_mm256_maskz_loadu_epi16(exist, at)), added);
            _mm256_mask_storeu_epi16(at, exist, (__m256i)_mm512_cvtneps_pbh(total));
        }
    }
}
