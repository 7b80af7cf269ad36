// Attention of one query position over keys and values in the pages of a pool, each read once for all heads that share
// it. A page holds a block's keys or values of one head: (block_size, head_dim) bfloat16, block_size a multiple of 16,
// head_dim of 32. Pages of neighbouring heads lie side by side, and are read so. Scores, softmax and sums are float32.
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
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // the second of both where one is NaN
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

// What a thread reads together: `heads` key heads from `head` on, of a sequence's first `length` positions. First keys, then
// values, both in groups of 16 positions.
struct Reading {
    Pages pages;
    int64_t head, heads, length;

    int64_t groups() const { return (length + 15) / 16; }
    const bf16* group(int64_t index, int64_t i) const {
        bool is_value = index >= groups();
        return pages.at(16 * (is_value ? index - groups() : index), is_value, head + i);
    }
};

// A reading and the one that follows. What comes a few groups later is fetched into the second cache: only some two dozen
// lines may be on their way to the first one, too few for the time that memory takes.
struct Ahead {
    static constexpr int GROUPS = 4;
    const Reading &now, *next;  // null: nothing follows

    const bf16* after(int64_t index, int64_t i) const {
        index += GROUPS;
        int64_t later = index - 2 * now.groups();
        if (later < 0) return now.group(index, i);
        return next != nullptr && i < next->heads && later < next->groups() ? next->group(later, i) : nullptr;
    }
};
inline void fetch_row(const bf16* row, int64_t width) {
    for (int64_t d = 0; d < width; d += 32) _mm_prefetch((const char*)(row + d), _MM_HINT_T1);
}

// Scores of QUERIES heads (QUERIES, head_dim) with the keys of a group: 16 of each row of scores (QUERIES, padded).
template <int QUERIES>
inline void score(const bf16* keys, const bf16* later, const bf16* q, int64_t width, float scale, int64_t padded, float* scores) {
    __m512 dots[QUERIES][16];
    for (int i = 0; i < 16; i++, keys += width) {
        if (later != nullptr) fetch_row(later + i * width, width);
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
        _mm512_storeu_ps(scores + g * padded, _mm512_mul_ps(sums_of(dots[g]), _mm512_set1_ps(scale)));
}

// Softmax in place of scores (padded); what lies behind `length` becomes 0.
inline void softmax(float* scores, int64_t length, int64_t padded) {
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    auto exist = [&](int64_t t) { return t + 16 < padded ? (__mmask16)0xFFFF : (__mmask16)(0xFFFF >> (padded - length)); };
    __m512 most = lowest;
    for (int64_t t = 0; t < padded; t += 16) most = _mm512_max_ps(most, _mm512_mask_loadu_ps(lowest, exist(t), scores + t));
    __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most)), total = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += 16) {  // NaN stays NaN
        __m512 x = _mm512_maskz_mov_ps(exist(t), exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + t), highest)));
        _mm512_storeu_ps(scores + t, x);
        total = _mm512_add_ps(total, x);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t t = 0; t < padded; t += 16) _mm512_storeu_ps(scores + t, _mm512_mul_ps(_mm512_loadu_ps(scores + t), share));
}

// VECTORS times 32 columns of `count` values, weighted with shares (QUERIES, padded) and added to sums (QUERIES, head_dim).
// In sums the even ones of 32 columns stand before the odd ones.
template <int QUERIES, int VECTORS>
inline void weigh(const bf16* values, const bf16* later, int64_t count, int64_t width, const float* shares, int64_t padded,
                  float* sums) {
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
    __m512 even[QUERIES][VECTORS], odd[QUERIES][VECTORS];
#pragma GCC unroll 8
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            even[g][v] = _mm512_loadu_ps(sums + g * width + 32 * v);
            odd[g][v] = _mm512_loadu_ps(sums + g * width + 32 * v + 16);
        }
    for (int64_t t = 0; t < count; t++, values += width) {
        if (later != nullptr) fetch_row(later + t * width, width);
        __m512 low[VECTORS], high[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            __m512i pairs = _mm512_loadu_si512(values + 32 * v);
            low[v] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            high[v] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
        }
#pragma GCC unroll 8
        for (int g = 0; g < QUERIES; g++) {
            __m512 share = _mm512_set1_ps(shares[g * padded + t]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                even[g][v] = _mm512_fmadd_ps(share, low[v], even[g][v]);
                odd[g][v] = _mm512_fmadd_ps(share, high[v], odd[g][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            _mm512_storeu_ps(sums + g * width + 32 * v, even[g][v]);
            _mm512_storeu_ps(sums + g * width + 32 * v + 16, odd[g][v]);
        }
}

// Sums with even columns before odd ones, as bfloat16 in their order.
inline void put(const float* sums, int64_t count, bf16* out) {
    const __m512i left = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < count; i += 32) {
        __m512 even = _mm512_loadu_ps(sums + i), odd = _mm512_loadu_ps(sums + i + 16);
        store(out + i, _mm512_permutex2var_ps(even, left, odd));
        store(out + i + 16, _mm512_permutex2var_ps(even, right, odd));
    }
}

// QUERIES heads for each key head of a reading; for the next one they stand `queries` heads later in q and out.
template <int QUERIES>
void attend_as(const Ahead& ahead, const bf16* q, int64_t queries, float scale, bf16* out) {
    static thread_local std::vector<float> room;
    const Reading& now = ahead.now;
    int64_t width = now.pages.head_dim, groups = now.groups(), padded = 16 * groups;
    room.resize(now.heads * QUERIES * (padded + width));
    float *scores = room.data(), *sums = scores + now.heads * QUERIES * padded;
    for (int64_t group = 0; group < groups; group++)
        for (int64_t i = 0; i < now.heads; i++)
            score<QUERIES>(now.group(group, i), ahead.after(group, i), q + i * queries * width, width, scale, padded,
                           scores + i * QUERIES * padded + 16 * group);
    for (int64_t row = 0; row < now.heads * QUERIES; row++) softmax(scores + row * padded, now.length, padded);
    std::memset(sums, 0, now.heads * QUERIES * width * sizeof(float));
    for (int64_t group = 0; group < groups; group++)
        for (int64_t i = 0; i < now.heads; i++) {
            const bf16 *values = now.group(groups + group, i), *later = ahead.after(groups + group, i);
            const float* shares = scores + i * QUERIES * padded + 16 * group;
            float* own = sums + i * QUERIES * width;
            int64_t count = std::min<int64_t>(16, now.length - 16 * group), d = 0;
            constexpr int VECTORS = QUERIES > 4 ? 1 : 2;  // what registers can hold
            for (; d + 32 * VECTORS <= width; d += 32 * VECTORS, later = nullptr)
                weigh<QUERIES, VECTORS>(values + d, later, count, width, shares, padded, own + d);
            if (d < width) weigh<QUERIES, 1>(values + d, later, count, width, shares, padded, own + d);
        }
    for (int64_t i = 0; i < now.heads; i++) put(sums + i * QUERIES * width, QUERIES * width, out + i * queries * width);
}

// What queries (heads, queries, head_dim) read, `queries` of them with each key head; `next` is what is read after it.
inline void attend(const Reading& all, const Reading* next, const bf16* q, int64_t queries, float scale, bf16* out) {
    constexpr int64_t ROOM = 16384;  // scores that stay near: of long sequences, heads are read one after another
    int64_t width = all.pages.head_dim, some = std::max<int64_t>(1, ROOM / (queries * 16 * all.groups()));
    for (int64_t i = 0; i < all.heads; i += some) {
        Reading now{all.pages, all.head + i, std::min(some, all.heads - i), all.length};
        Reading rest{all.pages, now.head + now.heads, all.heads - i - now.heads, all.length};
        for (int64_t g = 0, size; g < queries; g += size) {
            int64_t left = queries - g;
            size = left >= 8 ? 8 : left >= 4 ? 4 : left;
            const bf16* from = q + (i * queries + g) * width;
            bf16* to = out + (i * queries + g) * width;
            Ahead ahead{now, size < left ? &now : rest.heads > 0 ? &rest : next};
            switch (size) {
                case 8: attend_as<8>(ahead, from, queries, scale, to); break;
                case 4: attend_as<4>(ahead, from, queries, scale, to); break;
                case 3: attend_as<3>(ahead, from, queries, scale, to); break;
                case 2: attend_as<2>(ahead, from, queries, scale, to); break;
                default: attend_as<1>(ahead, from, queries, scale, to); break;
            }
        }
    }
}
