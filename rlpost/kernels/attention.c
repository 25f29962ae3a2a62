/* Causal attention of flat rows, forward and backward, without ever holding the scores (Dao 2023, arXiv:2307.08691).

A segment is a run of tokens that sees itself causally and, before itself, all of its prompt. Segments that share
tokens are a family; one thread does one key head of a family, so sums need no locks and have one order.
Queries and keys are turned to their positions here (rotary embeddings, Su et al. 2021, arXiv:2104.09864). */

#include "pieces.h"

#define BLOCK 32
/* Queries whose scores are held at once. */

typedef struct {
    int32_t start, length, prompt_start, prompt;
} Segment;

typedef struct {
    int32_t first, end;
    /* its tokens */
    int32_t segments, segments_end;
    /* their numbers */
} Family;

typedef struct {
    const Segment *segments;
    const Family *families;
    int64_t count;
    int64_t most_tokens, most_keys;
    /* of a family; of a segment with its prompt, each rounded up to lanes */
    const void *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;
    const float *cos, *sin;
    /* [tokens, width] */
    int64_t heads, key_heads, width;
    float scale;
    void *result;
    /* [tokens, heads * width] */
    float *total;
    /* [tokens, heads] logarithm of the sum of e^score */
} Attention;

typedef struct {
    const void *grad;
    /* [tokens, heads * width] */
    void *of_query, *of_key, *of_value;
    int64_t stride;
    /* of these three */
} Gradients;

static void scores_of(int64_t m, int64_t n, int64_t k, const float *a, const float *b, int64_t b_stride, float *c,
                      int64_t c_stride) {
    product(m, n, k, a, k, 1, b, b_stride, c, c_stride, 0);
}

static void weighted(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_stride, const float *b, float *c,
                     int more) {
    if (more)
        product(m, n, k, a, a_stride, 1, b, n, c, n, 1);
    else
        product(m, n, k, a, a_stride, 1, b, n, c, n, 0);
}

static void add_transposed(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_stride, const float *b, float *c) {
    product(m, n, k, a, 1, a_stride, b, n, c, n, 1);
}

/* The transpose of `turned`. */
INLINE void turned_back(const float *from, const float *cos, const float *sin, float factor, int64_t width, void *to,
                        int64_t at, const int half) {
    int64_t middle = width / 2;
    for (int64_t i = 0; i < middle; i++) {
        float a = from[i] * factor, b = from[middle + i] * factor;
        put_one(to, at + i, a * cos[i] + b * sin[middle + i], half);
        put_one(to, at + middle + i, b * cos[middle + i] - a * sin[i], half);
    }
}

INLINE void transpose(const float *from, int64_t rows, int64_t width, float *to, int64_t stride) {
    for (int64_t i = 0; i < width; i++) {
        for (int64_t t = 0; t < rows; t++)
            to[i * stride + t] = from[t * width + i];
        for (int64_t t = rows; t < stride; t++)
            to[i * stride + t] = 0;
    }
}

/* What one thread works in. */
typedef struct {
    int64_t padded, stride, key_room;
    float *key, *key_t, *value, *value_t, *of_key, *of_value, *scores, *slopes, *query, *grad, *out;
} Room;

static int64_t room_size(const Attention *a, Room *room, int backward) {
    room->padded = up(a->width);
    room->stride = up(a->most_tokens) + 2 * LANES;
    room->key_room = up(a->most_keys) + 2 * LANES;
    int64_t of_rows = room->stride * room->padded, of_block = BLOCK * room->padded;
    int64_t of_scores = BLOCK * room->key_room;
    return (backward ? 6 : 3) * of_rows + (backward ? 2 : 1) * of_scores + 3 * of_block;
}

static void divide_room(Room *r, float *all_of_it, int backward) {
    int64_t of_rows = r->stride * r->padded, of_block = BLOCK * r->padded;
    float *at = all_of_it;
    float **rows[] = {&r->key, &r->key_t, &r->value, &r->value_t, &r->of_key, &r->of_value};
    for (int i = 0; i < (backward ? 6 : 3); i++, at += of_rows)
        *rows[i] = at;
    float **blocks[] = {&r->query, &r->grad, &r->out};
    for (int i = 0; i < 3; i++, at += of_block)
        *blocks[i] = at;
    r->scores = at;
    r->slopes = at + BLOCK * r->key_room;
}

INLINE void read_keys(const Attention *a, const Family *f, int64_t head, Room *r, const int half) {
    for (int64_t t = f->first; t < f->end; t++) {
        int64_t at = (t - f->first) * r->padded;
        turned(a->key, t * a->key_stride + head * a->width, a->cos + t * a->width, a->sin + t * a->width, 1, a->width,
               r->padded, r->key + at, half);
        row_of(a->value, t * a->value_stride + head * a->width, a->width, r->padded, r->value + at, half);
    }
    transpose(r->key, f->end - f->first, r->padded, r->key_t, r->stride);
}

INLINE void read_queries(const Attention *a, int64_t first, int64_t rows, int64_t head, Room *r, const int half) {
    for (int64_t t = first; t < first + rows; t++)
        turned(a->query, t * a->query_stride + head * a->width, a->cos + t * a->width, a->sin + t * a->width, a->scale,
               a->width, r->padded, r->query + (t - first) * r->padded, half);
}

/* A block of queries, and the keys that it sees: all of the prompt's, and its own up to its end. */
typedef struct {
    int64_t first, rows;
    /* within the segment */
    int64_t prompt, own;
    /* keys */
    int64_t prompt_at, own_at;
    /* their places within the family */
    int64_t prompt_room;
    /* columns of scores before those of its own keys */
} Block;

INLINE Block block_of(const Segment *s, int64_t family_first, int64_t first) {
    int64_t rows = s->length - first < BLOCK ? s->length - first : BLOCK;
    return (Block){first, rows, s->prompt, first + rows, s->prompt_start - family_first, s->start - family_first,
                   up(s->prompt)};
}

/* Scores, and nothing where a query sees no key. */
INLINE void block_scores(const Block *b, const float *rows, const float *columns, Room *r, float *into) {
    if (b->prompt)
        scores_of(b->rows, b->prompt, r->padded, rows, columns + b->prompt_at, r->stride, into, r->key_room);
    scores_of(b->rows, b->own, r->padded, rows, columns + b->own_at, r->stride, into + b->prompt_room, r->key_room);
}

INLINE void attend_segment(const Attention *a, const Family *f, const Segment *s, int64_t head, Room *r,
                           const int half) {
    for (int64_t first = 0; first < s->length; first += BLOCK) {
        Block b = block_of(s, f->first, first);
        read_queries(a, s->start + first, b.rows, head, r, half);
        block_scores(&b, r->query, r->key_t, r, r->scores);
        float scale[BLOCK];
        for (int64_t i = 0; i < b.rows; i++) {
            float *row = r->scores + i * r->key_room;
            int64_t seen = first + i + 1;
            float most = largest_of(row + b.prompt_room, seen, largest_of(row, b.prompt, -INFINITY));
            float total = exp_row(row, b.prompt, b.prompt_room, most) +
                          exp_row(row + b.prompt_room, seen, up(b.own), most);
            a->total[(s->start + first + i) * a->heads + head] = most + logf(total);
            scale[i] = 1 / total;
        }
        if (b.prompt)
            weighted(b.rows, r->padded, b.prompt, r->scores, r->key_room, r->value + b.prompt_at * r->padded, r->out, 0);
        weighted(b.rows, r->padded, b.own, r->scores + b.prompt_room, r->key_room, r->value + b.own_at * r->padded,
                 r->out, b.prompt > 0);
        for (int64_t i = 0; i < b.rows; i++)
            for (int64_t j = 0; j < a->width; j++)
                put_one(a->result, ((s->start + first + i) * a->heads + head) * a->width + j,
                        r->out[i * r->padded + j] * scale[i], half);
    }
}

INLINE void attend_family(const Attention *a, const Family *f, int64_t key_head, Room *r, const int half) {
    read_keys(a, f, key_head, r, half);
    int64_t repeats = a->heads / a->key_heads;
    for (int64_t n = f->segments; n < f->segments_end; n++)
        for (int64_t head = key_head * repeats; head < (key_head + 1) * repeats; head++)
            attend_segment(a, f, a->segments + n, head, r, half);
}

/* Gradients of one segment's queries; those of keys and values are added to the room's. */
INLINE void segment_backward(const Attention *a, const Gradients *g, const Family *f, const Segment *s, int64_t head,
                             Room *r, const int half) {
    for (int64_t first = 0; first < s->length; first += BLOCK) {
        Block b = block_of(s, f->first, first);
        int64_t own = b.prompt_room, end = b.prompt_room + up(b.own);
        read_queries(a, s->start + first, b.rows, head, r, half);
        for (int64_t i = 0; i < b.rows; i++)
            row_of(g->grad, ((s->start + first + i) * a->heads + head) * a->width, a->width, r->padded,
                   r->grad + i * r->padded, half);
        block_scores(&b, r->query, r->key_t, r, r->scores);
        block_scores(&b, r->grad, r->value_t, r, r->slopes);
        for (int64_t i = 0; i < b.rows; i++) {
            int64_t token = s->start + first + i;
            float *weights = r->scores + i * r->key_room, *slopes = r->slopes + i * r->key_room, mean = 0;
            for (int64_t j = 0; j < a->width; j++)
                mean += r->grad[i * r->padded + j] * get_one(a->result, (token * a->heads + head) * a->width + j, half);
            float total = a->total[token * a->heads + head];
            exp_row(weights, b.prompt, own, total);
            exp_row(weights + own, first + i + 1, end - own, total);
            for (int64_t j = 0; j < end; j += LANES)
                store(slopes + j, load(weights + j) * (load(slopes + j) - mean));
        }
        float *of_query = r->out;
        if (b.prompt) {
            int64_t at = b.prompt_at * r->padded;
            weighted(b.rows, r->padded, b.prompt, r->slopes, r->key_room, r->key + at, of_query, 0);
            add_transposed(b.prompt, r->padded, b.rows, r->slopes, r->key_room, r->query, r->of_key + at);
            add_transposed(b.prompt, r->padded, b.rows, r->scores, r->key_room, r->grad, r->of_value + at);
        }
        int64_t at = b.own_at * r->padded;
        weighted(b.rows, r->padded, b.own, r->slopes + own, r->key_room, r->key + at, of_query, b.prompt > 0);
        add_transposed(b.own, r->padded, b.rows, r->slopes + own, r->key_room, r->query, r->of_key + at);
        add_transposed(b.own, r->padded, b.rows, r->scores + own, r->key_room, r->grad, r->of_value + at);
        for (int64_t i = 0; i < b.rows; i++) {
            int64_t token = s->start + first + i;
            turned_back(of_query + i * r->padded, a->cos + token * a->width, a->sin + token * a->width, a->scale,
                        a->width, g->of_query, token * g->stride + head * a->width, half);
        }
    }
}

INLINE void family_backward(const Attention *a, const Gradients *g, const Family *f, int64_t key_head, Room *r,
                            const int half) {
    int64_t tokens = f->end - f->first, repeats = a->heads / a->key_heads;
    read_keys(a, f, key_head, r, half);
    transpose(r->value, tokens, r->padded, r->value_t, r->stride);
    memset(r->of_key, 0, tokens * r->padded * sizeof(float));
    memset(r->of_value, 0, tokens * r->padded * sizeof(float));
    for (int64_t n = f->segments; n < f->segments_end; n++)
        for (int64_t head = key_head * repeats; head < (key_head + 1) * repeats; head++)
            segment_backward(a, g, f, a->segments + n, head, r, half);
    for (int64_t t = f->first; t < f->end; t++) {
        int64_t from = (t - f->first) * r->padded, to = t * g->stride + key_head * a->width;
        turned_back(r->of_key + from, a->cos + t * a->width, a->sin + t * a->width, 1, a->width, g->of_key, to, half);
        for (int64_t j = 0; j < a->width; j++)
            put_one(g->of_value, to + j, r->of_value[from + j], half);
    }
}

INLINE int over_families(const Attention *a, const Gradients *g, int threads, const int half) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Room room;
        float *memory = malloc(room_size(a, &room, g != NULL) * sizeof(float));
        failed |= memory == NULL;
        if (memory)
            divide_room(&room, memory, g != NULL);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a->count * a->key_heads; task++) {
            const Family *f = a->families + task / a->key_heads;
            if (!memory)
                continue;
            if (g)
                family_backward(a, g, f, task % a->key_heads, &room, half);
            else
                attend_family(a, f, task % a->key_heads, &room, half);
        }
        free(memory);
    }
    return failed;
}

/* Both return whether memory ran out. */
EXPORT int attend(const Attention *a, int half, int threads) {
    return half ? over_families(a, NULL, threads, 1) : over_families(a, NULL, threads, 0);
}

EXPORT int attend_backward(const Attention *a, const Gradients *g, int half, int threads) {
    return half ? over_families(a, g, threads, 1) : over_families(a, g, threads, 0);
}
