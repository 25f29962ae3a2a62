/* One new token a row: its attention to the cache, and the choice of the next. */

#include "pieces.h"

#define CHUNK 8
/* Rows of one prompt that are done together: its keys are read once for them. */
#define QUERIES (64 * CHUNK)
/* At most, of a chunk and key head. */
#define COLUMNS 64
/* Tokens of the vocabulary whose mass is summed before it is searched. */

typedef struct {
    int32_t prompt, first, end;
    /* and some of its rows, at most CHUNK */
} Chunk;

typedef struct {
    const void *query, *key, *value;
    int64_t stride;
    /* of these three */
    const float *cos, *sin;
    /* [rows, width] */
    const float *prompt_key, *prompt_value;
    /* [prompts, key_heads, width, columns], [prompts, key_heads, columns, width] */
    const Chunk *chunks;
    int64_t count;
    /* of chunks */
    const int32_t *begin;
    /* the first column of each prompt */
    float *own_key, *own_value;
    /* [rows, key_heads, width, room], [rows, key_heads, room, width] */
    int64_t columns, room, length;
    /* length: tokens of each row, this one included */
    int64_t first;
    /* column, of prompt and own tokens, from which on a query sees them */
    int64_t heads, key_heads, width;
    float scale;
    void *result;
    /* [rows, heads * width] */
} Decoding;

INLINE void keep_key(const Decoding *a, int64_t row, int64_t head, float *turned_key, const int half) {
    int64_t own = row * a->key_heads + head, at = row * a->stride + head * a->width;
    turned(a->key, at, a->cos + row * a->width, a->sin + row * a->width, 1, a->width, a->width, turned_key, half);
    for (int64_t i = 0; i < a->width; i++)
        a->own_key[(own * a->width + i) * a->room + a->length - 1] = turned_key[i];
    row_of(a->value, at, a->width, a->width, a->own_value + (own * a->room + a->length - 1) * a->width, half);
}

/* The cache of a row that is read next. */
INLINE void prefetch(const Decoding *a, int64_t row, int64_t head, int64_t begin) {
    int64_t own = row * a->key_heads + head;
    for (int64_t i = 0; i < a->width; i++)
        for (int64_t t = begin; t < a->length; t += LANES)
            __builtin_prefetch(a->own_key + (own * a->width + i) * a->room + t);
    const float *values = a->own_value + (own * a->room + begin) * a->width;
    for (int64_t i = 0; i < (a->length - begin) * a->width; i += LANES)
        __builtin_prefetch(values + i);
}

/* What one thread works in: queries, results, and scores of a chunk. */
typedef struct {
    float *query, *out, *scores;
    int64_t middle, stride;
    /* columns of scores before those of own tokens; all */
} Desk;

INLINE void decode_chunk(const Decoding *a, const Chunk *c, int64_t head, Desk *d, const int half) {
    int64_t repeats = a->heads / a->key_heads, width = a->width, rows = c->end - c->first, queries = rows * repeats;
    int64_t begin = a->begin[c->prompt] > a->first ? a->begin[c->prompt] : a->first;
    int64_t of_prompt = begin < a->columns ? a->columns - begin : 0, at_prompt = c->prompt * a->key_heads + head;
    int64_t own_begin = a->first > a->columns ? a->first - a->columns : 0, of_own = a->length - own_begin;
    for (int64_t row = c->first; row < c->end; row++)
        for (int64_t i = 0; i < repeats; i++)
            turned(a->query, row * a->stride + (head * repeats + i) * width, a->cos + row * width, a->sin + row * width,
                   a->scale, width, width, d->query + ((row - c->first) * repeats + i) * width, half);
    if (of_prompt)
        product(queries, of_prompt, width, d->query, width, 1,
                a->prompt_key + at_prompt * width * a->columns + begin, a->columns, d->scores, d->stride, 0);
    float scale[QUERIES], new_key[width];
    for (int64_t row = c->first; row < c->end; row++) {
        int64_t own = row * a->key_heads + head, at = (row - c->first) * repeats;
        keep_key(a, row, head, new_key, half);
        product(repeats, of_own, width, d->query + at * width, width, 1,
                a->own_key + own * width * a->room + own_begin, a->room, d->scores + at * d->stride + d->middle,
                d->stride, 0);
        for (int64_t i = at; i < at + repeats; i++) {
            float *line = d->scores + i * d->stride, *of_own_line = line + d->middle;
            float most = largest_of(of_own_line, of_own, largest_of(line, of_prompt, -INFINITY));
            scale[i] = 1 / (exp_row(line, of_prompt, up(of_prompt), most) +
                            exp_row(of_own_line, of_own, up(of_own), most));
        }
        product(repeats, width, of_own, d->scores + at * d->stride + d->middle, d->stride, 1,
                a->own_value + (own * a->room + own_begin) * width, width, d->out + at * width, width, 0);
    }
    if (of_prompt)
        product(queries, width, of_prompt, d->scores, d->stride, 1,
                a->prompt_value + (at_prompt * a->columns + begin) * width, width, d->out, width, 1);
    for (int64_t i = 0; i < queries; i++) {
        int64_t row = c->first + i / repeats, to = (row * a->heads + head * repeats + i % repeats) * width;
        for (int64_t j = 0; j < width; j += LANES)
            put(a->result, to + j, load(d->out + i * width + j) * scale[i], half);
    }
}

INLINE int decode_rows(const Decoding *a, int threads, const int half) {
    int failed = 0;
    int64_t queries = CHUNK * (a->heads / a->key_heads);
    Desk all_threads = {.middle = up(a->columns), .stride = up(a->columns) + up(a->length) + 2 * LANES};
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Desk desk = all_threads;
        desk.query = malloc(queries * (2 * a->width + desk.stride) * sizeof(float));
        desk.out = desk.query + queries * a->width;
        desk.scores = desk.out + queries * a->width;
        failed |= desk.query == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a->count * a->key_heads; task++)
            if (desk.query)
                decode_chunk(a, a->chunks + task / a->key_heads, task % a->key_heads, &desk, half);
        free(desk.query);
    }
    return failed;
}

/* Returns whether memory ran out. Up to 15 numbers are read behind the rows of keys: the buffers have room for it. */
EXPORT int decode(const Decoding *a, int half, int threads) {
    return half ? decode_rows(a, threads, 1) : decode_rows(a, threads, 0);
}

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
