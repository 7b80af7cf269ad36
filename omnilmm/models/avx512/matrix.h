// Products x W^T of bfloat16 rows with a weight of bfloat16 or 8-bit integers, by AVX512-BF16's dot products.
//
// A weight W (out, in) lies in panels of 32 outputs: [out / 32][in / 2][32][2]. A panel is one stream in memory, and two
// of its vectors meet a pair of an input's numbers. Panels are shared among threads; within one, rows of x are taken in
// tiles whose sums stay in registers. Every output is summed in the same order whatever else is in the product, so a
// row's numbers do not depend on the rows beside it, nor on the number of threads.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;

constexpr int PANEL = 32;     // outputs
constexpr int TILE = 12;      // rows whose sums are kept in registers: 24 of them, beside two for the weight
constexpr int AHEAD = 16384;  // bytes of a panel by which reading from memory runs ahead, into the second cache
constexpr int ROWS_EACH = 48; // rows of a task, where there are too few panels for the threads

inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
inline __m512 rounded(__m512 x) { return widen((__m256i)_mm512_cvtneps_pbh(x)); }

inline __m512bh both(const bf16* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

struct HalfPanel {
    const bf16* at;
    static constexpr int STRIDE = 2 * PANEL * sizeof(bf16);  // bytes of a pair of inputs

    void read(int k, __m512bh& left, __m512bh& right) const {
        left = (__m512bh)_mm512_loadu_si512(at + (size_t)k * 2 * PANEL);
        right = (__m512bh)_mm512_loadu_si512(at + (size_t)k * 2 * PANEL + PANEL);
    }
    void fetch(int k) const {  // may point behind the weight: a prefetch faults nowhere
        _mm_prefetch((const char*)(at + (size_t)k * 2 * PANEL), _MM_HINT_T1);
        _mm_prefetch((const char*)(at + (size_t)k * 2 * PANEL + PANEL), _MM_HINT_T1);
    }
};

// Sign and magnitude, in such an order that bytes spread out to words within their quarters of a vector: at 16 j + 8 h + i
// lies word 8 j + i of the left vector (h = 0) or the right one (h = 1).
struct Int8Panel {
    const int8_t* at;
    static constexpr int STRIDE = 2 * PANEL;

    struct Table {  // both bytes of the bfloat16 of 0 to 127
        alignas(64) uint8_t low[128], high[128];
        Table() {
            for (int i = 0; i < 128; i++) {
                float number = (float)i;
                uint32_t bits;
                std::memcpy(&bits, &number, sizeof bits);
                low[i] = (uint8_t)(bits >> 16), high[i] = (uint8_t)(bits >> 24);
            }
        }
    };
    static inline const Table table;

    void read(int k, __m512bh& left, __m512bh& right) const {  // exact: 8 bits fit into bfloat16's
        __m512i x = _mm512_loadu_si512(at + (size_t)k * 2 * PANEL);  // a permutation looks at its lower 7 bits
        __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), x, _mm512_load_si512(table.low + 64));
        __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table.high), x, _mm512_load_si512(table.high + 64));
        high = _mm512_ternarylogic_epi32(high, x, _mm512_set1_epi8((char)0x80), 0xF8);  // high | x & sign
        left = (__m512bh)_mm512_unpacklo_epi8(low, high);
        right = (__m512bh)_mm512_unpackhi_epi8(low, high);
    }
    void fetch(int k) const { _mm_prefetch((const char*)(at + (size_t)k * 2 * PANEL), _MM_HINT_T1); }
};

// A weight: its panels, and for 8-bit integers what each output is multiplied by.
struct Weight {
    const void* panels;
    const float* scale;  // (outputs rounded up to panels); null: the panels are bfloat16
    int64_t outputs;
    int64_t inputs;

    int num_panels() const { return (int)((outputs + PANEL - 1) / PANEL); }
};

// Sums of ROWS rows of x with one panel, (ROWS, PANEL). Every loop over rows is unrolled, or the sums would live in memory.
// Reading runs `ahead` pairs of inputs ahead, at the end of the panel into `next`.
template <int ROWS, class Panel>
inline void tile(const bf16* x, int64_t inputs, Panel panel, Panel next, int ahead, float* sums) {
    __m512 left[ROWS], right[ROWS];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) left[m] = right[m] = _mm512_setzero_ps();
    int pairs = (int)(inputs / 2);
    for (int k = 0; k < pairs; k++) {
        __m512bh a, b;
        panel.read(k, a, b);
        int later = k + ahead;
        if (later < pairs)
            panel.fetch(later);
        else
            next.fetch(later - pairs);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; m++) {
            __m512bh pair = both(x + m * inputs + 2 * k);
            left[m] = _mm512_dpbf16_ps(left[m], pair, a);
            right[m] = _mm512_dpbf16_ps(right[m], pair, b);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
        _mm512_storeu_ps(sums + m * PANEL, left[m]);
        _mm512_storeu_ps(sums + m * PANEL + 16, right[m]);
    }
}

// The same for any number of rows: out(row, left, right) gets them. What is read ahead: this panel while it comes from
// memory, and with the last rows `next`, the one that comes after it.
template <class Panel, class Out>
void rows_with_panel(const bf16* x, int rows, int64_t inputs, Panel panel, Panel next, Out&& out) {
    float sums[TILE * PANEL];
    for (int first = 0; first < rows;) {
        int left = rows - first;
        int size = left >= 2 * TILE ? TILE : left > TILE ? (left + 1) / 2 : left;
        bool is_first = first == 0, is_last = size == left;
        int ahead = is_first ? std::min(AHEAD / Panel::STRIDE, (int)(inputs / 2)) : is_last ? (int)(inputs / 2) : 0;
        const bf16* at = x + first * inputs;
        switch (size) {
            case 1: tile<1>(at, inputs, panel, next, ahead, sums); break;
            case 2: tile<2>(at, inputs, panel, next, ahead, sums); break;
            case 3: tile<3>(at, inputs, panel, next, ahead, sums); break;
            case 4: tile<4>(at, inputs, panel, next, ahead, sums); break;
            case 5: tile<5>(at, inputs, panel, next, ahead, sums); break;
            case 6: tile<6>(at, inputs, panel, next, ahead, sums); break;
            case 7: tile<7>(at, inputs, panel, next, ahead, sums); break;
            case 8: tile<8>(at, inputs, panel, next, ahead, sums); break;
            case 9: tile<9>(at, inputs, panel, next, ahead, sums); break;
            case 10: tile<10>(at, inputs, panel, next, ahead, sums); break;
            case 11: tile<11>(at, inputs, panel, next, ahead, sums); break;
            default: tile<12>(at, inputs, panel, next, ahead, sums); break;
        }
        for (int m = 0; m < size; m++)
            out(first + m, _mm512_loadu_ps(sums + m * PANEL), _mm512_loadu_ps(sums + m * PANEL + 16));
        first += size;
    }
}

// A panel of 8-bit integers as bfloat16: for rows of more than two tiles. Good until the next one of this thread.
inline const bf16* widened(const int8_t* panel, const int8_t* next, int64_t inputs) {
    static thread_local std::vector<bf16> room;
    room.resize(inputs * PANEL);
    bf16* to = room.data();
    Int8Panel from{panel}, after{next};
    for (int k = 0; k < inputs / 2; k++) {
        __m512bh left, right;
        from.read(k, left, right);
        after.fetch(k);
        _mm512_storeu_si512(to + (size_t)k * 2 * PANEL, (__m512i)left);
        _mm512_storeu_si512(to + (size_t)k * 2 * PANEL + PANEL, (__m512i)right);
    }
    return to;
}

// Sums of rows of x (rows, inputs) with a panel of a weight, scaled: out(row, left, right). The panel `next` comes after it.
template <class Out>
inline void multiply(const bf16* x, int rows, const Weight& w, int panel, int next, Out&& out) {
    size_t at = (size_t)panel * PANEL * w.inputs, then = (size_t)next * PANEL * w.inputs;
    if (w.scale == nullptr) {
        auto half = (const bf16*)w.panels;
        rows_with_panel(x, rows, w.inputs, HalfPanel{half + at}, HalfPanel{half + then}, out);
        return;
    }
    auto levels = (const int8_t*)w.panels;
    __m512 a = _mm512_loadu_ps(w.scale + panel * PANEL), b = _mm512_loadu_ps(w.scale + panel * PANEL + 16);
    auto scaled = [&](int m, __m512 left, __m512 right) { out(m, _mm512_mul_ps(left, a), _mm512_mul_ps(right, b)); };
    if (rows > 2 * TILE) {
        const bf16* wide = widened(levels + at, levels + then, w.inputs);
        rows_with_panel(x, rows, w.inputs, HalfPanel{wide}, HalfPanel{wide}, scaled);
        return;
    }
    rows_with_panel(x, rows, w.inputs, Int8Panel{levels + at}, Int8Panel{levels + then}, scaled);
}

// What a thread of `threads` has to do of `count` tasks: [begin, end).
struct Share {
    int begin, end;
    Share(int count, int thread, int threads)
        : begin((int)((int64_t)count * thread / threads)), end((int)((int64_t)count * (thread + 1) / threads)) {}
};

// 16 outputs of a row, of which `count` exist: out = residual + alpha * sums, rounded once.
inline void finish(bf16* out, const bf16* residual, float alpha, __m512 sums, int64_t count) {
    if (count <= 0) return;
    __mmask16 exist = count >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << count) - 1);
    if (residual != nullptr) {
        __m512 before = widen(_mm256_maskz_loadu_epi16(exist, residual));
        sums = _mm512_fmadd_ps(_mm512_set1_ps(alpha), sums, before);
    }
    _mm256_mask_storeu_epi16(out, exist, (__m256i)_mm512_cvtneps_pbh(sums));
}

// This thread's part of out (rows, outputs) = residual + alpha * x W^T; residual may be null, or out itself.
inline void product(const bf16* x, int rows, const Weight& w, const bf16* residual, float alpha, bf16* out, int thread,
                    int threads) {
    int blocks = w.num_panels() >= 8 * threads ? 1 : std::max(1, rows / ROWS_EACH);
    Share own(w.num_panels() * blocks, thread, threads);
    for (int task = own.begin; task < own.end; task++) {
        Share some(rows, task % blocks, blocks);
        int64_t first = (int64_t)(task / blocks) * PANEL;
        const bf16* from = x + some.begin * w.inputs;
        int panel = task / blocks, next = (task + 1) / blocks;
        multiply(from, some.end - some.begin, w, panel, next, [&](int m, __m512 a, __m512 b) {
            int64_t at = (some.begin + m) * w.outputs + first;
            const bf16* before = residual == nullptr ? nullptr : residual + at;
            finish(out + at, before, alpha, a, w.outputs - first);
            finish(out + at + 16, before == nullptr ? nullptr : before + 16, alpha, b, w.outputs - first - 16);
        });
    }
}
