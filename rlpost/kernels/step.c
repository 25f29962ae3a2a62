/* One decoding step: all layers, for one new token a row. */

#include "pieces.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define PANEL (2 * LINE)
/* Columns of a packed weight that lie together. */
#define ROWS 64
/* Of a product, done at once. */
#define CHUNK 8
/* Rows of one prompt that are done together: its keys are read once for them. */
#define QUERIES (64 * CHUNK)
/* At most, of a chunk and key head. */
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
    void *own_key, *own_value;
    /* [rows, key_heads, room / LINE, width, LINE] and [rows, key_heads, room, width], of the precision of products */
    int64_t columns, room, length;
    /* length: tokens of each row, this one included */
    int64_t first;
    /* column, of prompt and own tokens, from which on a query sees them */
    int64_t heads, key_heads, width;
    float scale;
    void *result;
    /* [rows, heads * width] */
} Decoding;

/* Puts the new key, turned to its position, and the new value behind the row's others. */
INLINE void keep_token(const Decoding *a, int64_t row, int64_t head, const int half) {
    int64_t from = row * a->stride + head * a->width, t = a->length - 1;
    int64_t own = (row * a->key_heads + head) * a->room * a->width;
    float key[a->width];
    turned(a->key, from, a->cos + row * a->width, a->sin + row * a->width, 1, a->width, a->width, key, half);
    for (int64_t i = 0; i < a->width; i++)
        put_one(a->own_key, own + (t / LINE * a->width + i) * LINE + t % LINE, key[i], half);
    for (int64_t i = 0; i < a->width; i += LANES)
        put(a->own_value, own + t * a->width + i, get(a->value, from + i, half), half);
}

/* scores[m, lines * LINE] of queries [m, width] with keys, from index `from` on. */
INLINE void own_scores(int64_t m, int64_t lines, int64_t width, const float *query, const void *key, int64_t from,
                       float *scores, int64_t stride, const int half) {
    product_of(m, lines * LINE, width, query, width, 1, key, from, LINE, width * LINE, scores, stride, 0, half);
}

/* Asks for the keys and values of a row before they are needed: each row's lie apart, so the processor does not foresee
them. */
INLINE void prefetch(const Decoding *a, int64_t row, int64_t head, int64_t begin, const int half) {
    int64_t size = half ? 2 : 4, from = ((row * a->key_heads + head) * a->room + begin) * a->width * size;
    for (int64_t i = 0; i < (a->length - begin) * a->width * size; i += 64) {
        __builtin_prefetch((const char *)a->own_key + from + i);
        __builtin_prefetch((const char *)a->own_value + from + i);
    }
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
    /* Keys are read in whole lines: so many columns of scores before the first that is seen. */
    int64_t skip = own_begin % LINE;
    prefetch(a, c->first, head, own_begin - skip, half);
    for (int64_t row = c->first; row < c->end; row++)
        for (int64_t i = 0; i < repeats; i++)
            turned(a->query, row * a->stride + (head * repeats + i) * width, a->cos + row * width, a->sin + row * width,
                   a->scale, width, width, d->query + ((row - c->first) * repeats + i) * width, half);
    if (of_prompt)
        product(queries, of_prompt, width, d->query, width, 1,
                a->prompt_key + at_prompt * width * a->columns + begin, a->columns, d->scores, d->stride, 0);
    float scale[QUERIES];
    for (int64_t row = c->first; row < c->end; row++) {
        int64_t own = row * a->key_heads + head, at = (row - c->first) * repeats;
        keep_token(a, row, head, half);
        if (row + 1 < c->end)
            prefetch(a, row + 1, head, own_begin - skip, half);
        own_scores(repeats, (of_own + skip + LINE - 1) / LINE, width, d->query + at * width, a->own_key,
                   (own * a->room + own_begin - skip) * width, d->scores + at * d->stride + d->middle, d->stride, half);
        for (int64_t i = at; i < at + repeats; i++) {
            float *line = d->scores + i * d->stride, *of_own_line = line + d->middle + skip;
            float most = largest_of(of_own_line, of_own, largest_of(line, of_prompt, -INFINITY));
            scale[i] = 1 / (exp_row(line, of_prompt, up(of_prompt), most) +
                            exp_row(of_own_line, of_own, up(of_own), most));
        }
        product_of(repeats, width, of_own, d->scores + at * d->stride + d->middle + skip, d->stride, 1, a->own_value,
                   (own * a->room + own_begin) * width, width, LINE, d->out + at * width, width, 0, half);
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


typedef struct {
    const void *weight;
    /* [out / PANEL, in, PANEL] in float32; in bfloat16 [out / PANEL, in / 2, PANEL, 2] */
    const float *bias;
    int64_t in, out;
} Product;

typedef struct {
    Product into, back, gate_up, down;
    const float *query_norm, *key_norm;
    /* [width] each, or nothing */
    float eps, eps_2, query_eps, key_eps, scale;
    const float *prompt_key, *prompt_value;
    void *own_key, *own_value;
    int64_t first;
    /* column, of prompt and own tokens, from which on a query sees them */
} Layer;

typedef struct {
    const Layer *layers;
    int64_t count;
    Product head;
    float eps;
    int64_t rows, hidden, inner, heads, key_heads, width;
    const Chunk *chunks;
    int64_t chunk_count;
    const int32_t *begin;
    int64_t columns, room, length;
    const float *cos, *sin;
    float *x;
    /* [rows, hidden] the residual stream: embeddings at first */
    void *normed, *qkv, *attended, *gate_up, *shaped, *logits;
} Step;

#ifdef __AVX512BF16__
/* c[m, PANEL] = a[m, k] times a packed panel, both in bfloat16, as the processor multiplies pairs of them. */
INLINE void half_tile(const uint16_t *a, int64_t stride, const uint16_t *panel, int64_t k, float *c, const int m) {
    __m512 s[TALL][2];
    for (int i = 0; i < m; i++)
        s[i][0] = s[i][1] = _mm512_setzero_ps();
    for (int64_t p = 0; p < k; p += 2) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(panel + p * PANEL);
        __m512bh second = (__m512bh)_mm512_loadu_si512(panel + p * PANEL + 2 * LANES);
        for (int i = 0; i < m; i++) {
            int32_t pair;
            memcpy(&pair, a + i * stride + p, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            s[i][0] = _mm512_dpbf16_ps(s[i][0], both, first);
            s[i][1] = _mm512_dpbf16_ps(s[i][1], both, second);
        }
    }
    for (int i = 0; i < m; i++) {
        _mm512_storeu_ps(c + i * PANEL, s[i][0]);
        _mm512_storeu_ps(c + i * PANEL + LANES, s[i][1]);
    }
}
#else
/* The same in float32. */
INLINE void half_tile(const uint16_t *a, int64_t stride, const uint16_t *panel, int64_t k, float *c, const int m) {
    for (int64_t at = 0; at < PANEL; at += 2 * LANES) {
        vec s[TALL][2];
        for (int i = 0; i < m; i++)
            s[i][0] = s[i][1] = all(0);
        for (int64_t p = 0; p < k; p += 2) {
            uvec pairs[2];
            memcpy(pairs, panel + p * PANEL + 2 * at, sizeof pairs);
            for (int i = 0; i < m; i++) {
                uint32_t pair;
                memcpy(&pair, a + i * stride + p, sizeof pair);
                uvec both = pair - (uvec){};
                for (int j = 0; j < 2; j++) {
                    s[i][j] += (vec)(both << 16) * (vec)(pairs[j] << 16);
                    s[i][j] += (vec)(both & 0xffff0000u) * (vec)(pairs[j] & 0xffff0000u);
                }
            }
        }
        for (int i = 0; i < m; i++)
            for (int j = 0; j < 2; j++)
                store(c + i * PANEL + at + j * LANES, s[i][j]);
    }
}
#endif

/* c[m, PANEL] = a[m, k] times a packed panel. */
INLINE void panel_tile(const void *a, int64_t from, int64_t stride, const void *panel, int64_t k, float *c, const int m,
                       const int half) {
    if (half) {
        half_tile((const uint16_t *)a + from, stride, panel, k, c, m);
        return;
    }
    for (int64_t at = 0; at < PANEL; at += 2 * LANES)
        tile((const float *)a + from, stride, 1, panel, at, PANEL, LINE, c + at, PANEL, k, m, 2, 0, 0);
}

/* into = x w^T + b, or residual += it. Every thread of the region takes part. */
INLINE void multiply(const Product *p, const void *x, int64_t rows, void *into, float *residual, const int half) {
    int64_t panels = (p->out + PANEL - 1) / PANEL, blocks = (rows + ROWS - 1) / ROWS;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < panels * blocks; task++) {
        int64_t column = task / blocks * PANEL, first = task % blocks * ROWS;
        int64_t count = rows - first < ROWS ? rows - first : ROWS, i = 0;
        const void *panel = (const char *)p->weight + column * p->in * (half ? 2 : 4);
        float c[ROWS * PANEL];
        for (; i + TALL <= count; i += TALL)
            panel_tile(x, (first + i) * p->in, p->in, panel, p->in, c + i * PANEL, TALL, half);
        for (; i + 4 <= count; i += 4)
            panel_tile(x, (first + i) * p->in, p->in, panel, p->in, c + i * PANEL, 4, half);
        for (; i + 2 <= count; i += 2)
            panel_tile(x, (first + i) * p->in, p->in, panel, p->in, c + i * PANEL, 2, half);
        if (i < count)
            panel_tile(x, (first + i) * p->in, p->in, panel, p->in, c + i * PANEL, 1, half);
        int64_t wide = p->out - column < PANEL ? p->out - column : PANEL, j;
        for (i = 0; i < count; i++) {
            int64_t to = (first + i) * p->out + column;
            float *line = c + i * PANEL;
            for (j = 0; p->bias && j < wide; j++)
                line[j] += p->bias[column + j];
            for (j = 0; j + LANES <= wide; j += LANES) {
                if (residual)
                    store(residual + to + j, load(residual + to + j) + load(line + j));
                else
                    put(into, to + j, load(line + j), half);
            }
            for (; j < wide; j++) {
                if (residual)
                    residual[to + j] += line[j];
                else
                    put_one(into, to + j, line[j], half);
            }
        }
    }
}

INLINE void normalise(const Step *s, float eps, const int half) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s->rows; row++) {
        const float *x = s->x + row * s->hidden;
        vec squares = all(0);
        for (int64_t i = 0; i < s->hidden; i += LANES)
            squares += load(x + i) * load(x + i);
        float scale = 1.0f / sqrtf(sum(squares) / (float)s->hidden + eps);
        for (int64_t i = 0; i < s->hidden; i += LANES)
            put(s->normed, row * s->hidden + i, load(x + i) * scale, half);
    }
}

/* Queries and keys, each head by itself. */
INLINE void normalise_heads(const Step *s, const Layer *layer, const int half) {
    if (!layer->query_norm)
        return;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t head = 0; head < s->heads + s->key_heads; head++) {
            int64_t at = (row * (s->heads + 2 * s->key_heads) + head) * s->width;
            const float *weight = head < s->heads ? layer->query_norm : layer->key_norm;
            float eps = head < s->heads ? layer->query_eps : layer->key_eps;
            vec squares = all(0);
            for (int64_t i = 0; i < s->width; i += LANES)
                squares += get(s->qkv, at + i, half) * get(s->qkv, at + i, half);
            float scale = 1.0f / sqrtf(sum(squares) / (float)s->width + eps);
            for (int64_t i = 0; i < s->width; i += LANES)
                put(s->qkv, at + i, get(s->qkv, at + i, half) * scale * load(weight + i), half);
        }
}

INLINE void shape(const Step *s, const int half) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t i = 0; i < s->inner; i += LANES) {
            vec gate = get(s->gate_up, 2 * row * s->inner + i, half);
            vec up_part = get(s->gate_up, (2 * row + 1) * s->inner + i, half);
            put(s->shaped, row * s->inner + i, gate * sigmoid(gate) * up_part, half);
        }
}

INLINE Decoding decoding_of(const Step *s, const Layer *layer, const int half) {
    int64_t size = half ? 2 : 4;
    const char *query = s->qkv, *key = query + s->heads * s->width * size;
    return (Decoding){
        .query = query,
        .key = key,
        .value = key + s->key_heads * s->width * size,
        .stride = (s->heads + 2 * s->key_heads) * s->width,
        .cos = s->cos,
        .sin = s->sin,
        .prompt_key = layer->prompt_key,
        .prompt_value = layer->prompt_value,
        .chunks = s->chunks,
        .count = s->chunk_count,
        .begin = s->begin,
        .own_key = layer->own_key,
        .own_value = layer->own_value,
        .columns = s->columns,
        .room = s->room,
        .length = s->length,
        .first = layer->first,
        .heads = s->heads,
        .key_heads = s->key_heads,
        .width = s->width,
        .scale = layer->scale,
        .result = s->attended,
    };
}

/* Every thread of the region runs this; each loop waits for all. */
INLINE void run_layers(const Step *s, Desk *desk, const int half) {
    for (const Layer *layer = s->layers; layer < s->layers + s->count; layer++) {
        normalise(s, layer->eps, half);
        multiply(&layer->into, s->normed, s->rows, s->qkv, NULL, half);
        normalise_heads(s, layer, half);
        Decoding d = decoding_of(s, layer, half);
        /* Rows of one prompt stand side by side, and so do their tasks: its keys stay in the cache. */
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < d.count * d.key_heads; task++)
            decode_chunk(&d, d.chunks + task / d.key_heads, task % d.key_heads, desk, half);
        multiply(&layer->back, s->attended, s->rows, NULL, s->x, half);
        normalise(s, layer->eps_2, half);
        multiply(&layer->gate_up, s->normed, s->rows, s->gate_up, NULL, half);
        shape(s, half);
        multiply(&layer->down, s->shaped, s->rows, NULL, s->x, half);
    }
    normalise(s, s->eps, half);
    multiply(&s->head, s->normed, s->rows, s->logits, NULL, half);
}

/* Returns whether memory ran out. Up to 15 numbers are read behind the rows of keys: the buffers have room for it. */
EXPORT int step(const Step *s, int half, int threads) {
    int64_t queries = CHUNK * (s->heads / s->key_heads), middle = up(s->columns);
    int64_t stride = middle + s->length + 2 * LINE, of_thread = queries * (2 * s->width + stride);
    float *memory = malloc(threads * of_thread * sizeof(float));
    if (!memory)
        return 1;
    int64_t next = 0;
#pragma omp parallel num_threads(threads)
    {
        int64_t mine;
#pragma omp atomic capture
        mine = next++;
        Desk desk = {.query = memory + mine * of_thread, .middle = middle, .stride = stride};
        desk.out = desk.query + queries * s->width;
        desk.scores = desk.out + queries * s->width;
        if (half)
            run_layers(s, &desk, 1);
        else
            run_layers(s, &desk, 0);
    }
    free(memory);
    return 0;
}
