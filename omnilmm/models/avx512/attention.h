// Attention of one query position over keys and values in the pages of a pool, each read once for all heads that share
// it. A page holds a block's keys or values of one head: (block_size, head_dim) bfloat16, block_size a multiple of 16,
// head_dim of 32. Scores, softmax and sums are float32.
#pragma once

#include <limits>
#include <vector>

#include "matrix.h"

// Horizontal sums of 16 vectors, in their order.
inline __m512 sums_of(const __m512* x) {
    __m512 quads[4];
    for (int i = 0; i < 4; i++) {
        const __m512* y = x + 4 * i;
        __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(y[0], y[1]), _mm512_unpackhi_ps(y[0], y[1]));
        __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(y[2], y[3]), _mm512_unpackhi_ps(y[2], y[3]));
        __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    }
    auto fold = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    };
    __m512 u = fold(quads[0], quads[1]), v = fold(quads[2], quads[3]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(u, v, 0x88), _mm512_shuffle_f32x4(u, v, 0xDD));
}

// e^x for x <= 0, to about 1e-7 of it.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

struct Pages {
    const bf16* pool;  // of a layer: (blocks, 2, kv_heads, block_size, head_dim)
    const int32_t* blocks;  // of the sequence
    int64_t kv_heads, block_size, head_dim;

    const bf16* at(int64_t position, bool is_value, int64_t head) const {
        int64_t page = (blocks[position / block_size] * 2 + is_value) * kv_heads + head;
        return pool + (page * block_size + position % block_size) * head_dim;
    }
};

// Softmax in place of scores (padded), times 1 / their sum; what lies behind `length` becomes 0.
inline void softmax(float* scores, int64_t length, int64_t padded) {
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), most = lowest;
    for (int64_t t = 0; t < padded; t += 16) {
        __mmask16 exist = _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32((int)std::min<int64_t>(16, length - t)));
        __m512 x = _mm512_mask_loadu_ps(lowest, exist, scores + t);
        _mm512_storeu_ps(scores + t, x);
        most = _mm512_max_ps(most, x);
    }
    __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most)), total = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += 16) {
        __m512 x = _mm512_loadu_ps(scores + t);
        __mmask16 exist = _mm512_cmp_ps_mask(x, lowest, _CMP_NEQ_UQ);  // NaN stays NaN
        x = _mm512_maskz_mov_ps(exist, exponential(_mm512_sub_ps(x, highest)));
        __mmask16 lost = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + t), highest, _CMP_UNORD_Q);
        x = _mm512_mask_mov_ps(x, lost, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
        _mm512_storeu_ps(scores + t, x);
        total = _mm512_add_ps(total, x);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t t = 0; t < padded; t += 16) _mm512_storeu_ps(scores + t, _mm512_mul_ps(_mm512_loadu_ps(scores + t), share));
}

// Where reading goes on: the same rows in the next block, or nowhere.
inline const bf16* next_of(const Pages& pages, int64_t position, int64_t length, bool is_value, int64_t head) {
    int64_t next = position + pages.block_size;
    return next < length ? pages.at(next, is_value, head) : nullptr;
}
inline void fetch_row(const bf16* row, int64_t width) {
    for (int64_t d = 0; d < width; d += 32) _mm_prefetch((const char*)(row + d), _MM_HINT_T0);
}

// Scores of QUERIES heads (QUERIES, head_dim) with the keys of the first `length` positions: (QUERIES, padded).
template <int QUERIES>
void score(const Pages& pages, int64_t head, const bf16* q, int64_t length, int64_t padded, float scale, float* scores) {
    int64_t width = pages.head_dim;
    for (int64_t t = 0; t < padded; t += 16) {
        const bf16 *keys = pages.at(t, false, head), *next = next_of(pages, t, length, false, head);
        const bf16* values = pages.at(t, true, head);
        __m512 dots[QUERIES][16];
        for (int i = 0; i < 16; i++, keys += width) {
            if (next != nullptr) fetch_row(next + i * width, width);
            if (t < pages.block_size) fetch_row(values + i * width, width);  // the first ones that will be weighed
            __m512 sums[QUERIES];
#pragma GCC unroll 8
            for (int g = 0; g < QUERIES; g++) sums[g] = _mm512_setzero_ps();
            for (int64_t d = 0; d < width; d += 32) {
                __m512bh key = (__m512bh)_mm512_loadu_si512(keys + d);
#pragma GCC unroll 8
                for (int g = 0; g < QUERIES; g++)
                    sums[g] = _mm512_dpbf16_ps(sums[g], key, (__m512bh)_mm512_loadu_si512(q + g * width + d));
            }
#pragma GCC unroll 8
            for (int g = 0; g < QUERIES; g++) dots[g][i] = sums[g];
        }
        for (int g = 0; g < QUERIES; g++)
            _mm512_storeu_ps(scores + g * padded + t, _mm512_mul_ps(sums_of(dots[g]), _mm512_set1_ps(scale)));
    }
}

// Values weighted with `shares` (QUERIES, padded) and summed: out (QUERIES, head_dim).
template <int QUERIES>
void weigh(const Pages& pages, int64_t head, const float* shares, int64_t length, int64_t padded, bf16* out) {
    int64_t width = pages.head_dim;
    for (int64_t d = 0; d < width; d += 32) {
        __m512 left[QUERIES], right[QUERIES];
#pragma GCC unroll 8
        for (int g = 0; g < QUERIES; g++) left[g] = right[g] = _mm512_setzero_ps();
        for (int64_t begin = 0; begin < length; begin += pages.block_size) {
            const bf16 *values = pages.at(begin, true, head) + d, *next = next_of(pages, begin, length, true, head);
            int64_t count = std::min(pages.block_size, length - begin);
            for (int64_t t = 0; t < count; t++, values += width) {
                if (d == 0 && next != nullptr) fetch_row(next + t * width, width);
                __m512 a = load(values), b = load(values + 16);
#pragma GCC unroll 8
                for (int g = 0; g < QUERIES; g++) {
                    __m512 share = _mm512_set1_ps(shares[g * padded + begin + t]);
                    left[g] = _mm512_fmadd_ps(share, a, left[g]);
                    right[g] = _mm512_fmadd_ps(share, b, right[g]);
                }
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < QUERIES; g++) {
            store(out + g * width + d, left[g]);
            store(out + g * width + d + 16, right[g]);
        }
    }
}

template <int QUERIES>
void attend_as(const Pages& pages, int64_t head, const bf16* q, int64_t length, float scale, bf16* out) {
    static thread_local std::vector<float> scores;
    int64_t padded = (length + 15) / 16 * 16;
    scores.resize(QUERIES * padded);
    score<QUERIES>(pages, head, q, length, padded, scale, scores.data());
    for (int g = 0; g < QUERIES; g++) softmax(&scores[g * padded], length, padded);
    weigh<QUERIES>(pages, head, scores.data(), length, padded, out);
}

// What `queries` heads (queries, head_dim), which share a key head, read in the first `length` positions.
inline void attend(const Pages& pages, int64_t head, const bf16* q, int queries, int64_t length, float scale, bf16* out) {
    for (int g = 0; g < queries;) {
        const bf16* some = q + g * pages.head_dim;
        bf16* to = out + g * pages.head_dim;
        int left = queries - g, size = left >= 8 ? 8 : left >= 4 ? 4 : left;
        switch (size) {
            case 8: attend_as<8>(pages, head, some, length, scale, to); break;
            case 4: attend_as<4>(pages, head, some, length, scale, to); break;
            case 3: attend_as<3>(pages, head, some, length, scale, to); break;
            case 2: attend_as<2>(pages, head, some, length, scale, to); break;
            default: attend_as<1>(pages, head, some, length, scale, to); break;
        }
        g += size;
    }
}
