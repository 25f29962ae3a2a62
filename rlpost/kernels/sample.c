/* The choice of tokens. */

#include "common.h"

#define COLUMNS 64
/* Tokens of the vocabulary whose mass is summed before it is searched. */

/* e^((x - top) * scale) of a block of the vocabulary, 0 behind its end; returns the sum. */
INLINE float block_mass(const void *logits, int64_t at, int64_t size, float top, float scale, float *mass,
                        const int half) {
    vec sums = all(0);
    for (int64_t i = size; i < COLUMNS; i++)
        mass[i] = -INFINITY;
    for (int64_t i = 0; i < COLUMNS; i += LANES) {
        if (i + LANES <= size)
            store(mass + i, get(logits, at + i, half));
        else
            for (int64_t j = i; j < size && j < i + LANES; j++)
                mass[j] = get_one(logits, at + j, half);
        vec v = exp_of((load(mass + i) - top) * scale);
        store(mass + i, v);
        sums += v;
    }
    return sum(sums);
}

INLINE float top_of(const void *logits, int64_t first, int64_t vocabulary, const int half) {
    int64_t whole = vocabulary / LANES * LANES;
    vec most = all(-INFINITY);
    for (int64_t i = 0; i < whole; i += LANES)
        most = larger(get(logits, first + i, half), most);
    float top = largest(most);
    for (int64_t i = whole; i < vocabulary; i++) {
        float x = get_one(logits, first + i, half);
        top = x > top || x != x ? x : top;
    }
    return top;
}

INLINE int64_t size_of(int64_t block, int64_t vocabulary) {
    return vocabulary - block * COLUMNS < COLUMNS ? vocabulary - block * COLUMNS : COLUMNS;
}

/* The token where the cumulative mass passes uniform * total, and the logarithm of its share. */
INLINE void sample_rows(const void *logits, int64_t stride, const double *uniform, float scale, int64_t *token,
                        float *logp, int64_t rows, int64_t vocabulary, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < rows; n++) {
        int64_t first = n * stride, blocks = (vocabulary + COLUMNS - 1) / COLUMNS, block = 0;
        float top = top_of(logits, first, vocabulary, half), mass[COLUMNS];
        double up_to[blocks], total = 0;
        for (int64_t b = 0; b < blocks; b++) {
            total += block_mass(logits, first + b * COLUMNS, size_of(b, vocabulary), top, scale, mass, half);
            up_to[b] = total;
        }
        /* Below the end even by rounding, so that the block has mass. */
        double at = uniform[n] * total < total ? uniform[n] * total : nextafter(total, 0);
        while (block + 1 < blocks && up_to[block] <= at)
            block++;
        double before = block ? up_to[block - 1] : 0;
        int64_t size = size_of(block, vocabulary), chosen = 0;
        block_mass(logits, first + block * COLUMNS, size, top, scale, mass, half);
        for (int64_t i = 0; i < size; i++) {
            /* The last one with mass, should rounding leave the sum below. */
            chosen = mass[i] > 0 ? i : chosen;
            before += mass[i];
            if (before > at)
                break;
        }
        chosen += block * COLUMNS;
        token[n] = chosen;
        logp[n] = (get_one(logits, first + chosen, half) - top) * scale - (float)log(total);
    }
}

EXPORT void sample(const void *logits, int64_t stride, const double *uniform, float scale, int64_t *token, float *logp,
                   int64_t rows, int64_t vocabulary, int half, int threads) {
    BY_PRECISION(sample_rows, logits, stride, uniform, scale, token, logp, rows, vocabulary, threads);
}
