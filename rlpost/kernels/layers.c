/* What stands between the matrix products of a transformer layer, each in one pass over its tokens. */

#include "common.h"

/* inverse[t] = 1/RMS of x + added; middle = x + added, where there is one; normed = that * inverse * weight. */
INLINE void norm_rows(const float *x, const void *added, const float *weight, float eps, float *middle, void *normed,
                      float *inverse, int64_t tokens, int64_t width, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = x + t * width;
        vec squares = all(0);
        for (int64_t i = 0; i < width; i += LANES) {
            vec v = load(row + i);
            if (added) {
                v += get(added, t * width + i, half);
                store(middle + t * width + i, v);
            }
            squares += v * v;
        }
        float scale = 1.0f / sqrtf(sum(squares) / (float)width + eps);
        inverse[t] = scale;
        const float *from = added ? middle + t * width : row;
        for (int64_t i = 0; i < width; i += LANES) {
            vec v = load(from + i) * scale;
            put(normed, t * width + i, weight ? v * load(weight + i) : v, half);
        }
    }
}

EXPORT void norm(const float *x, const void *added, const float *weight, float eps, float *middle, void *normed,
                 float *inverse, int64_t tokens, int64_t width, int half, int threads) {
    BY_PRECISION(norm_rows, x, added, weight, eps, middle, normed, inverse, tokens, width, threads);
}

/* of_x = passing + the gradient through the norm; of_weight [parts, width] sums over each part of the tokens. */
INLINE void norm_backward_rows(const void *grad, const float *x, const float *inverse, const float *weight,
                               const float *passing, float *of_x, float *of_weight, int64_t parts, int64_t tokens,
                               int64_t width, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        float *total = of_weight + part * width;
        memset(total, 0, width * sizeof *total);
        for (int64_t t = tokens * part / parts; t < tokens * (part + 1) / parts; t++) {
            const float *row = x + t * width;
            float scale = inverse[t];
            vec sums = all(0);
            for (int64_t i = 0; i < width; i += LANES) {
                vec of = get(grad, t * width + i, half) * (load(row + i) * scale);
                store(total + i, load(total + i) + of);
                sums += of * load(weight + i);
            }
            float mean = sum(sums) / (float)width;
            for (int64_t i = 0; i < width; i += LANES) {
                vec through = get(grad, t * width + i, half) * load(weight + i) - load(row + i) * (scale * mean);
                vec found = through * scale;
                store(of_x + t * width + i, passing ? found + load(passing + t * width + i) : found);
            }
        }
    }
}

EXPORT void norm_backward(const void *grad, const float *x, const float *inverse, const float *weight,
                          const float *passing, float *of_x, float *of_weight, int64_t parts, int64_t tokens,
                          int64_t width, int half, int threads) {
    BY_PRECISION(norm_backward_rows, grad, x, inverse, weight, passing, of_x, of_weight, parts, tokens, width, threads);
}

/* inner = silu(gate) * up, of gate and up side by side. */
INLINE void swiglu_rows(const void *gate_up, void *inner, int64_t tokens, int64_t width, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec gate = get(gate_up, 2 * t * width + i, half);
            vec up = get(gate_up, (2 * t + 1) * width + i, half);
            put(inner, t * width + i, gate * sigmoid(gate) * up, half);
        }
}

EXPORT void swiglu(const void *gate_up, void *inner, int64_t tokens, int64_t width, int half, int threads) {
    BY_PRECISION(swiglu_rows, gate_up, inner, tokens, width, threads);
}

/* Gradients of gate and up, and inner once more. */
INLINE void swiglu_backward_rows(const void *gate_up, const void *of_inner, void *of_gate_up, void *inner,
                                 int64_t tokens, int64_t width, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t at_gate = 2 * t * width + i, at_up = at_gate + width;
            vec gate = get(gate_up, at_gate, half), up = get(gate_up, at_up, half);
            vec grad = get(of_inner, t * width + i, half);
            vec share = sigmoid(gate), shaped = gate * share;
            put(inner, t * width + i, shaped * up, half);
            put(of_gate_up, at_gate, grad * up * (share + shaped * (1 - share)), half);
            put(of_gate_up, at_up, grad * shaped, half);
        }
}

EXPORT void swiglu_backward(const void *gate_up, const void *of_inner, void *of_gate_up, void *inner, int64_t tokens,
                            int64_t width, int half, int threads) {
    BY_PRECISION(swiglu_backward_rows, gate_up, of_inner, of_gate_up, inner, tokens, width, threads);
}

INLINE void add_rows(const float *x, const void *added, float *found, int64_t size, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < size / LANES; i++)
        store(found + i * LANES, load(x + i * LANES) + get(added, i * LANES, half));
}

EXPORT void add(const float *x, const void *added, float *found, int64_t size, int half, int threads) {
    BY_PRECISION(add_rows, x, added, found, size, threads);
}

/* logp[n] of each target and the logarithm of the sum of all; the vocabulary need not be a multiple of 16. */
INLINE void cross_entropy_rows(const void *logits, int64_t stride, const int64_t *target, float scale, float *logp,
                               float *total, int64_t rows, int64_t vocabulary, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < rows; n++) {
        int64_t first = n * stride, whole = vocabulary / LANES * LANES;
        vec most = all(-INFINITY), sums = all(0);
        for (int64_t i = 0; i < whole; i += LANES)
            most = larger(get(logits, first + i, half), most);
        float top = largest(most), rest = 0;
        for (int64_t i = whole; i < vocabulary; i++) {
            float x = get_one(logits, first + i, half);
            top = x > top || x != x ? x : top;
        }
        for (int64_t i = 0; i < whole; i += LANES)
            sums += exp_of((get(logits, first + i, half) - top) * scale);
        for (int64_t i = whole; i < vocabulary; i++)
            rest += expf((get_one(logits, first + i, half) - top) * scale);
        total[n] = top * scale + logf(sum(sums) + rest);
        logp[n] = get_one(logits, first + target[n], half) * scale - total[n];
    }
}

EXPORT void cross_entropy(const void *logits, int64_t stride, const int64_t *target, float scale, float *logp,
                          float *total, int64_t rows, int64_t vocabulary, int half, int threads) {
    BY_PRECISION(cross_entropy_rows, logits, stride, target, scale, logp, total, rows, vocabulary, threads);
}

/* Gradients of logits: grad[n] * scale * (one at the target - softmax); they may take the place of the logits. */
INLINE void cross_entropy_backward_rows(const void *logits, int64_t stride, const int64_t *target, float scale,
                                        const float *total, const float *grad, void *of_logits, int64_t rows,
                                        int64_t vocabulary, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < rows; n++) {
        int64_t first = n * stride, into = n * vocabulary, whole = vocabulary / LANES * LANES;
        float factor = grad[n] * scale, at = expf(get_one(logits, first + target[n], half) * scale - total[n]);
        for (int64_t i = 0; i < whole; i += LANES)
            put(of_logits, into + i, exp_of(get(logits, first + i, half) * scale - total[n]) * -factor, half);
        for (int64_t i = whole; i < vocabulary; i++)
            put_one(of_logits, into + i, expf(get_one(logits, first + i, half) * scale - total[n]) * -factor, half);
        put_one(of_logits, into + target[n], factor * (1 - at), half);
    }
}

EXPORT void cross_entropy_backward(const void *logits, int64_t stride, const int64_t *target, float scale,
                                   const float *total, const float *grad, void *of_logits, int64_t rows,
                                   int64_t vocabulary, int half, int threads) {
    BY_PRECISION(cross_entropy_backward_rows, logits, stride, target, scale, total, grad, of_logits, rows, vocabulary,
                 threads);
}
