// The products of a Llama-type decoder, and a whole layer of it for rows of one token each, with threads that meet a few
// times a layer. Plain C at its edge; memory is the caller's. `omnilmm/models/native.py` is the other side.
#include <omp.h>

#include <cmath>

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
};

struct Step {
    int64_t rows;
    bf16* x;  // (rows, hidden): in, and out
    const bf16 *cos, *sin;  // (rows, head_dim), the first half of sin negative already
    const int32_t *blocks, *ends;  // (rows, max_blocks), and how many positions there are, this one included
    int64_t max_blocks;
    bf16 *normed, *qkv, *seen, *inner;  // room: (rows, hidden), (rows, all heads), (rows, query heads), (rows, mlp_width)
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

// Heads that share a key head, of one row: turn them, write key and value to the pool, read.
static void attend_heads(const Shape& shape, const Layer& layer, const Step& step, int64_t row, int64_t head) {
    int64_t width = shape.head_dim, groups = shape.heads / shape.kv_heads;
    const bf16 *cos = step.cos + row * width, *sin = step.sin + row * width;
    bf16* heads = step.qkv + row * (shape.heads + 2 * shape.kv_heads) * width;
    bf16 *q = heads + head * groups * width, *k = heads + (shape.heads + head) * width, *v = k + shape.kv_heads * width;
    for (int64_t g = 0; g < groups; g++) rotate(q + g * width, cos, sin, width, q + g * width);
    Pages pages{layer.pool, step.blocks + row * step.max_blocks, shape.kv_heads, shape.block_size, width};
    int64_t end = step.ends[row];
    rotate(k, cos, sin, width, const_cast<bf16*>(pages.at(end - 1, false, head)));
    std::memcpy(const_cast<bf16*>(pages.at(end - 1, true, head)), v, width * sizeof(bf16));
    bf16* seen = step.seen + (row * shape.heads + head * groups) * width;
    attend(pages, head, q, (int)groups, end, 1.0f / std::sqrt((float)width), seen);
}

// inner = silu(gate) * up, rounded where torch rounds. A thread has both panels of its outputs.
static void gated(const Shape& shape, const Layer& layer, const Step& step, int thread, int threads) {
    static thread_local std::vector<float> gates;  // (rows, PANEL)
    gates.resize(step.rows * PANEL);
    int panels = (int)(shape.mlp_width / PANEL);
    Share own(panels, thread, threads);
    const __m512 one = _mm512_set1_ps(1.0f);
    auto silu = [&](__m512 x) {
        __m512 size = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));  // e^-|x|
        __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
        __m512 top = _mm512_mask_mov_ps(one, below, size);
        return rounded(_mm512_mul_ps(x, _mm512_div_ps(top, _mm512_add_ps(one, size))));
    };
    for (int panel = own.begin; panel < own.end; panel++) {
        multiply(step.normed, (int)step.rows, layer.gate_up, panel, [&](int m, __m512 a, __m512 b) {
            _mm512_storeu_ps(&gates[m * PANEL], silu(rounded(a)));
            _mm512_storeu_ps(&gates[m * PANEL + 16], silu(rounded(b)));
        });
        multiply(step.normed, (int)step.rows, layer.gate_up, panels + panel, [&](int m, __m512 a, __m512 b) {
            bf16* out = step.inner + m * shape.mlp_width + panel * PANEL;
            store(out, _mm512_mul_ps(_mm512_loadu_ps(&gates[m * PANEL]), rounded(a)));
            store(out + 16, _mm512_mul_ps(_mm512_loadu_ps(&gates[m * PANEL + 16]), rounded(b)));
        });
    }
}

// out (rows, outputs) = residual + x W^T; residual may be null.
extern "C" void omnilmm_linear(const Weight* weight, const bf16* x, int64_t rows, const bf16* residual, bf16* out,
                               int num_threads) {
#pragma omp parallel num_threads(num_threads)
    product(x, (int)rows, *weight, residual, 1.0f, out, omp_get_thread_num(), omp_get_num_threads());
}

// One layer over step.x, in place; the newest keys and values go to the pool.
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
        Share own((int)(rows * shape.kv_heads), thread, threads);
        for (int task = own.begin; task < own.end; task++)
            attend_heads(shape, layer, step, task / shape.kv_heads, task % shape.kv_heads);
#pragma omp barrier
        product(step.seen, rows, layer.out, step.x, alpha, step.x, thread, threads);
#pragma omp barrier
        norms(shape, step, layer.mlp_norm, thread, threads);
#pragma omp barrier
        gated(shape, layer, step, thread, threads);
#pragma omp barrier
        product(step.inner, rows, layer.down, step.x, alpha, step.x, thread, threads);
    }
}
