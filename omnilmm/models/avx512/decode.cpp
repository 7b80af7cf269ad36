// The products of a Llama-type decoder, and a whole layer of it for the tokens of a step, with threads that meet a few
// times a layer. Plain C at its edge; memory is the caller's. `omnilmm/models/native.py` is the other side.
//
// A row is a token. Those of a sequence stand side by side, in order; a row reads its sequence up to itself, by the same
// sums whether it came with others or alone.
#include <omp.h>

#include <cmath>

#include "adapters.h"
#include "attention.h"
#include "matrix.h"

struct Shape {
    int64_t hidden, heads, kv_heads, head_dim, mlp_width, block_size;
    float eps, residual_scale;
};

struct Layer {
    Weight qkv, out, gate_up, down;  // rows of qkv: query, key, value heads; of gate_up: gate, up
    const bf16 *attention_norm, *mlp_norm;
    bf16* pool;  // (blocks, 2, kv_heads, block_size, head_dim)
    Pairs adapters[4];  // of qkv, out, gate_up, down
};

struct Step {
    int64_t rows;
    bf16* x;  // (rows, hidden): in, and out
    const bf16 *cos, *sin;  // (rows, head_dim), the first half of sin negative already
    const int32_t* blocks;  // (sequences, max_blocks)
    int64_t max_blocks;
    const int32_t *sequences, *ends;  // (rows,): a row's sequence, and how many positions it reads, its own included
    bf16 *normed, *qkv, *seen, *inner;  // room: (rows, hidden), (rows, all heads), (rows, query heads), (rows, mlp_width)
    const Ranks* ranks;  // (rows,), of their adapters; null where no row has one
    const int32_t* adapted;  // (num_adapted,): which rows have an adapter, those with the same one side by side
    int64_t num_adapted;
    bf16* raised;  // room where there are ranks, (rows, 2 mlp_width): what adapters add to gate and up
};

static void norm(const Shape& shape, const bf16* x, const bf16* weight, bf16* out) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < shape.hidden; i += 16) {
        __m512 v = load(x + i);
        total = _mm512_fmadd_ps(v, v, total);
    }
    __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(total) / shape.hidden + shape.eps));
    for (int64_t i = 0; i < shape.hidden; i += 16)  // rounded before the weight, as Llama does
        store(out + i, _mm512_mul_ps(rounded(_mm512_mul_ps(load(x + i), factor)), load(weight + i)));
}

static void norms(const Shape& shape, const Step& step, const bf16* weight, int thread, int threads) {
    Share own((int)step.rows, thread, threads);
    for (int m = own.begin; m < own.end; m++) norm(shape, step.x + m * shape.hidden, weight, step.normed + m * shape.hidden);
}

// What adapters add to a product: out (rows, columns) += alpha * theirs of x (rows, inputs). A thread takes neighbours in
// `adapted`: a pair that was read for one row is near for the next. `is_new`: out is nothing yet.
static void adapt(const Pairs& pairs, const Step& step, const bf16* x, float alpha, bf16* out, int64_t columns, bool is_new,
                  int thread, int threads) {
    Share own((int)step.num_adapted, thread, threads);
    for (int i = own.begin; i < own.end; i++) {
        int64_t m = step.adapted[i];
        if (is_new) std::memset(out + m * columns, 0, columns * sizeof(bf16));
        add_adapter(pairs, step.ranks[m], x + m * pairs.inputs, alpha, out + m * columns);
    }
}

// Rotary: x cos + (x with its halves exchanged) sin, each rounded, as torch has it.
static void rotate(const bf16* x, const bf16* cos, const bf16* sin, int64_t width, bf16* out) {
    for (int64_t i = 0; i < width / 2; i += 16) {
        int64_t j = i + width / 2;
        __m512 a = load(x + i), b = load(x + j);
        __m512 low = _mm512_add_ps(rounded(_mm512_mul_ps(a, load(cos + i))), rounded(_mm512_mul_ps(b, load(sin + i))));
        __m512 high = _mm512_add_ps(rounded(_mm512_mul_ps(b, load(cos + j))), rounded(_mm512_mul_ps(a, load(sin + j))));
        store(out + i, low);
        store(out + j, high);
    }
}

// What a row has to do with a key head: the query heads that share it, its own key and value, and its sequence's pages.
struct RowHead {
    bf16 *q, *k, *v;  // in step.qkv
    Pages pages;
    int64_t row, head, groups, end;

    RowHead(const Shape& shape, const Layer& layer, const Step& step, int64_t row, int64_t head)
        : pages{layer.pool, step.blocks + step.sequences[row] * step.max_blocks, shape.kv_heads, shape.block_size,
                shape.head_dim},
          row(row), head(head), groups(shape.heads / shape.kv_heads), end(step.ends[row]) {
        bf16* heads = step.qkv + row * (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        q = heads + head * groups * shape.head_dim;
        k = heads + (shape.heads + head) * shape.head_dim;
        v = k + shape.kv_heads * shape.head_dim;
    }
};

// Turn queries and key, and write key and value to the pool.
static void place(const Shape& shape, const Step& step, const RowHead& own) {
    int64_t width = shape.head_dim;
    const bf16 *cos = step.cos + own.row * width, *sin = step.sin + own.row * width;
    for (int64_t g = 0; g < own.groups; g++) rotate(own.q + g * width, cos, sin, width, own.q + g * width);
    rotate(own.k, cos, sin, width, const_cast<bf16*>(own.pages.at(own.end - 1, false, own.head)));
    std::memcpy(const_cast<bf16*>(own.pages.at(own.end - 1, true, own.head)), own.v, width * sizeof(bf16));
}

// Attention of this thread's share of rows, and of heads where rows are few. All is written before anything is read. A
// later row of a prompt reads more, so every thread gets some of each.
static void attend_all(const Shape& shape, const Layer& layer, const Step& step, int thread, int threads) {
    int64_t count = step.rows * shape.kv_heads;
    for (int64_t task = thread; task < count; task += threads)
        place(shape, step, RowHead(shape, layer, step, task / shape.kv_heads, task % shape.kv_heads));
#pragma omp barrier
    int64_t parts = step.rows >= 2 * threads ? 1 : shape.kv_heads, heads = shape.kv_heads / parts;
    float scale = 1.0f / std::sqrt((float)shape.head_dim);
    auto at = [&](int64_t task) { return RowHead(shape, layer, step, task / parts, task % parts * heads); };
    auto reading = [&](const RowHead& own) { return Reading{own.pages, own.head, heads, own.end}; };
    for (int64_t task = thread; task < step.rows * parts; task += threads) {
        bool is_last = task + threads >= step.rows * parts;
        RowHead own = at(task), after = at(is_last ? task : task + threads);
        Reading now = reading(own), next = reading(after);
        bf16* seen = step.seen + (own.row * shape.heads + own.head * own.groups) * shape.head_dim;
        attend(now, is_last ? nullptr : &next, own.q, own.groups, scale, seen);
    }
}

// inner = silu(gate) * up, rounded where torch rounds. A thread has both panels of its outputs.
static void gated(const Shape& shape, const Layer& layer, const Step& step, int thread, int threads) {
    static thread_local std::vector<float> room;
    room.resize(step.rows * PANEL);
    float* gates = room.data();  // (rows, PANEL)
    int panels = (int)(shape.mlp_width / PANEL);
    Share own(panels, thread, threads);
    const __m512 one = _mm512_set1_ps(1.0f);
    auto silu = [&](__m512 x) {
        __m512 size = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));  // e^-|x|
        __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
        __m512 top = _mm512_mask_mov_ps(one, below, size);
        return rounded(_mm512_mul_ps(x, _mm512_div_ps(top, _mm512_add_ps(one, size))));
    };
    auto with_raised = [&](int m, int64_t column, __m512 x) {
        if (step.ranks == nullptr || !step.ranks[m].count) return x;
        return rounded(_mm512_add_ps(x, load(step.raised + m * 2 * shape.mlp_width + column)));
    };
    for (int panel = own.begin; panel < own.end; panel++) {
        multiply(step.normed, (int)step.rows, layer.gate_up, panel, panels + panel, [&](int m, __m512 a, __m512 b) {
            int64_t column = panel * PANEL;
            _mm512_storeu_ps(gates + m * PANEL, silu(with_raised(m, column, rounded(a))));
            _mm512_storeu_ps(gates + m * PANEL + 16, silu(with_raised(m, column + 16, rounded(b))));
        });
        multiply(step.normed, (int)step.rows, layer.gate_up, panels + panel, panel + 1, [&](int m, __m512 a, __m512 b) {
            bf16* out = step.inner + m * shape.mlp_width + panel * PANEL;
            int64_t column = shape.mlp_width + panel * PANEL;
            __m512 left = with_raised(m, column, rounded(a)), right = with_raised(m, column + 16, rounded(b));
            store(out, _mm512_mul_ps(_mm512_loadu_ps(gates + m * PANEL), left));
            store(out + 16, _mm512_mul_ps(_mm512_loadu_ps(gates + m * PANEL + 16), right));
        });
    }
}

// out (rows, outputs) = residual + x W^T; residual may be null.
extern "C" void omnilmm_linear(const Weight* weight, const bf16* x, int64_t rows, const bf16* residual, bf16* out,
                               int num_threads) {
#pragma omp parallel num_threads(num_threads)
    product(x, (int)rows, *weight, residual, 1.0f, out, omp_get_thread_num(), omp_get_num_threads());
}

// One layer over step.x, in place; the keys and values of all rows go to the pool.
extern "C" void omnilmm_layer(const Shape* shape_at, const Layer* layer_at, const Step* step_at, int num_threads) {
    const Shape& shape = *shape_at;
    const Layer& layer = *layer_at;
    const Step& step = *step_at;
    int rows = (int)step.rows;
    float alpha = shape.residual_scale;
#pragma omp parallel num_threads(num_threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        norms(shape, step, layer.attention_norm, thread, threads);
#pragma omp barrier
        product(step.normed, rows, layer.qkv, nullptr, 1.0f, step.qkv, thread, threads);
#pragma omp barrier
        if (step.ranks != nullptr) {
            adapt(layer.adapters[0], step, step.normed, 1.0f, step.qkv, layer.qkv.outputs, false, thread, threads);
#pragma omp barrier
        }
        attend_all(shape, layer, step, thread, threads);
#pragma omp barrier
        product(step.seen, rows, layer.out, step.x, alpha, step.x, thread, threads);
#pragma omp barrier
        if (step.ranks != nullptr) {
            adapt(layer.adapters[1], step, step.seen, alpha, step.x, shape.hidden, false, thread, threads);
#pragma omp barrier
        }
        norms(shape, step, layer.mlp_norm, thread, threads);
        if (step.ranks != nullptr) {
#pragma omp barrier
            adapt(layer.adapters[2], step, step.normed, 1.0f, step.raised, 2 * shape.mlp_width, true, thread, threads);
        }
#pragma omp barrier
        gated(shape, layer, step, thread, threads);
#pragma omp barrier
        product(step.inner, rows, layer.down, step.x, alpha, step.x, thread, threads);
        if (step.ranks != nullptr) {
#pragma omp barrier
            adapt(layer.adapters[3], step, step.inner, alpha, step.x, shape.hidden, false, thread, threads);
        }
    }
}
