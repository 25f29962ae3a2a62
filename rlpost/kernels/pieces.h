/* What attention is made of, in training and in decoding: small products, rotary positions, and softmax of a row. */

#pragma once
#include "common.h"

INLINE int64_t up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Where column j (a multiple of LANES) of a matrix lies behind its first, if lines of LINE columns are `line` apart. */
INLINE int64_t place(int64_t j, int64_t line) { return j / LINE * line + j % LINE; }

/* c[m, n vectors] (+)= a[m, k] b[k, n vectors]. */
INLINE void tile(const float *a, int64_t down, int64_t along, const void *b, int64_t from, int64_t b_stride,
                 int64_t line, float *c, int64_t c_stride, int64_t k, const int m, const int n, const int adds,
                 const int half) {
    vec s[TALL][4];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            s[i][j] = adds ? load(c + i * c_stride + j * LANES) : all(0);
    for (int64_t p = 0; p < k; p++) {
        vec right[4];
        for (int j = 0; j < n; j++)
            right[j] = get(b, from + p * b_stride + place(j * LANES, line), half);
        for (int i = 0; i < m; i++) {
            vec left = all(a[i * down + p * along]);
            for (int j = 0; j < n; j++)
                s[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            store(c + i * c_stride + j * LANES, s[i][j]);
}

INLINE void column(int64_t m, int64_t k, const float *a, int64_t down, int64_t along, const void *b, int64_t from,
                   int64_t b_stride, int64_t line, float *c, int64_t c_stride, const int n, const int adds,
                   const int half) {
    int64_t i = 0;
    for (; i + TALL <= m; i += TALL)
        tile(a + i * down, down, along, b, from, b_stride, line, c + i * c_stride, c_stride, k, TALL, n, adds, half);
    for (; i + 4 <= m; i += 4)
        tile(a + i * down, down, along, b, from, b_stride, line, c + i * c_stride, c_stride, k, 4, n, adds, half);
    for (; i + 2 <= m; i += 2)
        tile(a + i * down, down, along, b, from, b_stride, line, c + i * c_stride, c_stride, k, 2, n, adds, half);
    if (i < m)
        tile(a + i * down, down, along, b, from, b_stride, line, c + i * c_stride, c_stride, k, 1, n, adds, half);
}

/* One or two rows, by four vectors: a vector's sums must wait for each other. */
INLINE void wide_column(int64_t m, int64_t k, const float *a, int64_t down, int64_t along, const void *b, int64_t from,
                        int64_t b_stride, int64_t line, float *c, int64_t c_stride, const int adds, const int half) {
    if (m == 2)
        tile(a, down, along, b, from, b_stride, line, c, c_stride, k, 2, 4, adds, half);
    else
        tile(a, down, along, b, from, b_stride, line, c, c_stride, k, 1, 4, adds, half);
}

/* c (+)= a b; n is rounded up to lanes, and so much is written. a's rows are `down` apart, its columns `along`; b begins
at index `from`, has lines of columns that are `line` apart, and is float32 or bfloat16. */
INLINE void product_of(int64_t m, int64_t n, int64_t k, const float *a, int64_t down, int64_t along, const void *b,
                       int64_t from, int64_t b_stride, int64_t line, float *c, int64_t c_stride, const int adds,
                       const int half) {
    int64_t j = 0;
    for (; m <= 2 && j + 3 * LANES < n; j += 4 * LANES)
        wide_column(m, k, a, down, along, b, from + place(j, line), b_stride, line, c + j, c_stride, adds, half);
    for (; j + LANES < n; j += 2 * LANES)
        column(m, k, a, down, along, b, from + place(j, line), b_stride, line, c + j, c_stride, 2, adds, half);
    if (j < n)
        column(m, k, a, down, along, b, from + place(j, line), b_stride, line, c + j, c_stride, 1, adds, half);
}

/* With b in float32. */
INLINE void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t down, int64_t along, const float *b,
                    int64_t b_stride, float *c, int64_t c_stride, const int adds) {
    product_of(m, n, k, a, down, along, b, 0, b_stride, LINE, c, c_stride, adds, 0);
}

/* One row of a head, padded with zeros. */
INLINE void row_of(const void *from, int64_t at, int64_t width, int64_t padded, float *to, const int half) {
    for (int64_t i = 0; i < width; i++)
        to[i] = get_one(from, at + i, half);
    for (int64_t i = width; i < padded; i++)
        to[i] = 0;
}

/* x turned to its position, times a factor. */
INLINE void turned(const void *from, int64_t at, const float *cos, const float *sin, float factor, int64_t width,
                   int64_t padded, float *to, const int half) {
    int64_t middle = width / 2;
    for (int64_t i = 0; i < middle; i++) {
        float a = get_one(from, at + i, half) * factor, b = get_one(from, at + middle + i, half) * factor;
        to[i] = a * cos[i] - b * sin[i];
        to[middle + i] = b * cos[middle + i] + a * sin[middle + i];
    }
    for (int64_t i = width; i < padded; i++)
        to[i] = 0;
}

/* e^(x - less) of the first `seen`, 0 after them up to `end`; returns the sum. */
INLINE float exp_row(float *x, int64_t seen, int64_t end, float less) {
    vec sums = all(0);
    int64_t whole = seen / LANES * LANES, i = 0;
    for (; i < whole; i += LANES) {
        vec v = exp_of(load(x + i) - less);
        store(x + i, v);
        sums += v;
    }
    float total = sum(sums);
    if (whole < seen) {
        vec v = exp_of(load(x + whole) - less);
        for (int64_t j = 0; j < LANES; j++) {
            v[j] = whole + j < seen ? v[j] : 0;
            total += v[j];
        }
        store(x + whole, v);
        i += LANES;
    }
    for (; i < end; i += LANES)
        store(x + i, all(0));
    return total;
}

INLINE float largest_of(const float *x, int64_t seen, float most) {
    int64_t whole = seen / LANES * LANES;
    vec found = all(most);
    for (int64_t i = 0; i < whole; i += LANES)
        found = larger(load(x + i), found);
    most = largest(found);
    for (int64_t i = whole; i < seen; i++)
        most = x[i] > most || x[i] != x[i] ? x[i] : most;
    return most;
}

