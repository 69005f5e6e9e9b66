/* A caller of the kernels: their header only, compiled as C99 and as C++, on the CPU backend. All
 * values are worked by hand. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/mlora_kernels.h"

static int n_failed;

static void check(int holds, const char *what)
{
    if (holds) return;
    fprintf(stderr, "kernels: failed: %s (%s)\n", what, mlora_kernels_error());
    n_failed++;
}

static void check_floats(const float *got, const float *want, int n, const char *what)
{
    for (int i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) <= 1e-6f)) {
            fprintf(stderr, "kernels: %s[%d] is %g, not %g\n", what, i, (double)got[i],
                    (double)want[i]);
            n_failed++;
        }
}

static void check_ints(const int32_t *got, const int32_t *want, int n, const char *what)
{
    for (int i = 0; i < n; i++)
        if (got[i] != want[i]) {
            fprintf(stderr, "kernels: %s[%d] is %d, not %d\n", what, i, got[i], want[i]);
            n_failed++;
        }
}

static void check_refused(int status, const char *text)
{
    if (status == MLORA_KERNELS_EINVAL && strcmp(mlora_kernels_error(), text) == 0) return;
    fprintf(stderr, "kernels: status %d, \"%s\", not \"%s\"\n", status, mlora_kernels_error(),
            text);
    n_failed++;
}

/* Four tokens of adapters 1, none, 0, 1; y has a column before two slices of two and one. Segments
 * hold one of no adapter first and an empty one last. Adapter 0 leaves slice 1 alone. */
static const float a0[] = {1, 2}, b0[] = {1, -1};
static const float a1[] = {0, 1}, b1[] = {3, 4}, a1_second[] = {1, 0}, b1_second[] = {5};
static const int32_t slot[] = {1, -1, 0, 1}, order[] = {1, 2, 0, 3};
static const int32_t segment_slot[] = {-1, 0, 1, -1}, segment_start[] = {0, 1, 2, 4, 0};
static const float x[] = {1, 1, 2, 3, 1, -1, 2, 0};

static mlora_kernels_factors factor(const float *a, const float *b, float scale)
{
    mlora_kernels_factors factors;
    memset(&factors, 0, sizeof factors);
    factors.a = a;
    factors.b = b;
    factors.rank = 1;
    factors.dtype = MLORA_KERNELS_F32;
    factors.scale = scale;
    return factors;
}

static mlora_kernels_lora make_lora(mlora_kernels_factors *table)
{
    mlora_kernels_lora lora;
    memset(table, 0, 2 * MLORA_KERNELS_LINEARS * sizeof *table);
    memset(&lora, 0, sizeof lora);
    table[0] = factor(a0, b0, 2);
    table[MLORA_KERNELS_LINEARS] = factor(a1, b1, 1);
    table[MLORA_KERNELS_LINEARS + 1] = factor(a1_second, b1_second, 1);
    lora.factors = table;
    lora.n_layers = 1;
    lora.n_slices = 2;
    lora.T = 4;
    lora.K = 2;
    lora.N = 4;
    lora.offset[0] = 1;
    lora.width[0] = 2;
    lora.offset[1] = 3;
    lora.width[1] = 1;
    lora.dtype = MLORA_KERNELS_F32;
    lora.max_rank = 1;
    lora.h_by_slice = 1;
    lora.n_segments = 4;
    lora.n_tokens = 4;
    lora.max_segment = 4;
    lora.slot = slot;
    lora.segment_slot = segment_slot;
    lora.segment_start = segment_start;
    lora.order = order;
    return lora;
}

static void test_lora(mlora_kernels *kernels)
{
    mlora_kernels_factors table[2 * MLORA_KERNELS_LINEARS];
    mlora_kernels_lora lora = make_lora(table);
    const float h_want[] = {1, 7, -1, 0, 1, 7, 7, 2};
    const float h_want_by_token[] = {1, 1, 7, 7, -1, 7, 0, 2};
    const float want[] = {10, 13, 14, 15, 10, 10, 10, 10, 10, 8, 12, 10, 10, 10, 10, 20};
    float h[8], y[16];
    static float workspace[256 / 4 * 2];
    mlora_kernels_run run;
    size_t bytes = 0;

    for (int mode = MLORA_KERNELS_AUTO; mode <= MLORA_KERNELS_FUSED; mode++) {
        lora.mode = mode;
        lora.h_by_slice = 1;
        for (int i = 0; i < 8; i++) h[i] = 7;
        for (int i = 0; i < 16; i++) y[i] = 10;
        check(mlora_kernels_lora_shrink(kernels, h, x, &lora, NULL) == 0, "lora_shrink");
        check_floats(h, h_want, 8, "h by slice");
        check(mlora_kernels_lora_expand(kernels, y, h, &lora, NULL) == 0, "lora_expand");
        check_floats(y, want, 16, "y");

        lora.h_by_slice = 0;
        for (int i = 0; i < 8; i++) h[i] = 7;
        check(mlora_kernels_lora_shrink(kernels, h, x, &lora, NULL) == 0, "lora_shrink");
        check_floats(h, h_want_by_token, 8, "h by token");
    }

    check(mlora_kernels_lora_workspace(kernels, &lora, &bytes) == 0 && bytes == 256, "workspace");
    run.stream = NULL;
    run.workspace = (void *)(((uintptr_t)workspace + 255) / 256 * 256);
    run.workspace_bytes = bytes;
    for (int i = 0; i < 16; i++) y[i] = 10;
    check(mlora_kernels_lora_add(kernels, y, x, &lora, &run) == 0, "lora_add");
    check_floats(y, want, 16, "y of lora_add");

    run.workspace_bytes = 255;
    check_refused(mlora_kernels_lora_add(kernels, y, x, &lora, &run),
                  "lora_add: run.workspace_bytes is 255, 256 are needed: ask the workspace "
                  "function");
    run.workspace_bytes = 256;
    run.workspace = (char *)run.workspace + 4;
    check_refused(mlora_kernels_lora_add(kernels, y, x, &lora, &run),
                  "lora_add: run.workspace is not aligned to 256 bytes");
    check_refused(mlora_kernels_lora_add(kernels, y, x, &lora, NULL), "lora_add: run is NULL");
    check_floats(y, want, 16, "y after refusals");

    lora.n_tokens = lora.max_segment = 0; /* nobody has an adapter: nothing is read */
    lora.factors = NULL;
    check(mlora_kernels_lora_expand(kernels, NULL, NULL, &lora, NULL) == 0, "no tokens");
}

static void test_silu(mlora_kernels *kernels)
{
    /* gate += 2 h, up -= h for token 1 alone */
    const float b_gate[] = {2}, b_up[] = {-1}, h[] = {9, 9, 0.5f, 1};
    const int32_t slots[] = {-1, 0}, one[] = {0}, start[] = {0, 1}, second[] = {1};
    float gate_up[] = {0.5f, 3, 1, 4}, y[] = {0, 0};
    const float want[] = {3 * 0.5f / (1 + expf(-0.5f)), 3 * 2 / (1 + expf(-2.0f))};
    mlora_kernels_factors table[2 * MLORA_KERNELS_LINEARS];
    mlora_kernels_lora lora = make_lora(table);

    table[0] = factor(a0, b_gate, 1);
    table[1] = factor(a0, b_up, 1);
    lora.T = 2;
    lora.N = 2;
    lora.n_tokens = lora.max_segment = lora.n_segments = 1;
    lora.width[0] = lora.width[1] = 1;
    lora.offset[0] = 0;
    lora.offset[1] = 1;
    lora.h_by_slice = 0;
    lora.slot = slots;
    lora.segment_slot = one;
    lora.segment_start = start;
    lora.order = second;
    check(mlora_kernels_lora_expand_silu_mul(kernels, y, gate_up, h, &lora, NULL) == 0, "silu_mul");
    check_floats(y, want, 2, "y of silu_mul");
    lora.offset[1] = 0;
    check_refused(mlora_kernels_lora_expand_silu_mul(kernels, y, gate_up, h, &lora, NULL),
                  "lora_expand_silu_mul: the slices must be gate, columns 0 to N / 2 - 1 of "
                  "gate_up, and up, the other half");
}

/* One wrong field of a struct, and what is said of it behind the name of the function. */
struct wrong_int {
    size_t at;
    int value;
    const char *text;
};
struct wrong_pointer {
    size_t at;
    int shift; /* of a good pointer; NULL where it is 0 */
    const char *text;
};
#define WRONG(type, field, value, text)                                                            \
    {                                                                                              \
        offsetof(type, field), value, #field text                                                  \
    }

static void spoil_int(void *copy, const struct wrong_int *wrong)
{
    memcpy((char *)copy + wrong->at, &wrong->value, sizeof wrong->value);
}

static void spoil_pointer(void *copy, const struct wrong_pointer *wrong)
{
    char *pointer = NULL;
    if (wrong->shift) memcpy(&pointer, (char *)copy + wrong->at, sizeof pointer);
    pointer = wrong->shift ? pointer + wrong->shift : NULL;
    memcpy((char *)copy + wrong->at, &pointer, sizeof pointer);
}

static void check_refused_by(const char *op, int status, const char *text)
{
    char line[256];
    snprintf(line, sizeof line, "%s: %s", op, text);
    check_refused(status, line);
}

static const struct wrong_int wrong_lora[] = {
    WRONG(mlora_kernels_lora, n_layers, 0, " is 0, must be 1 to 65535"),
    WRONG(mlora_kernels_lora, layer, 1, " is 1, must be 0 to 0"),
    WRONG(mlora_kernels_lora, layer, -1, " is -1, must be 0 to 0"),
    WRONG(mlora_kernels_lora, linear, -1, " is -1, must be 0 to 5"),
    WRONG(mlora_kernels_lora, linear, 6, " is 6, must be 0 to 5"),
    WRONG(mlora_kernels_lora, n_slices, 0, " is 0, must be 1 to 3"),
    WRONG(mlora_kernels_lora, n_slices, 4, " is 4, must be 1 to 3"),
    WRONG(mlora_kernels_lora, T, -1, " is -1, must be 0 to 65535"),
    WRONG(mlora_kernels_lora, T, 65536, " is 65536, must be 0 to 65535"),
    WRONG(mlora_kernels_lora, K, 0, " is 0, must be 1 to 1048576"),
    WRONG(mlora_kernels_lora, K, INT32_MIN, " is -2147483648, must be 1 to 1048576"),
    WRONG(mlora_kernels_lora, N, 0, " is 0, must be 1 to 1048576"),
    WRONG(mlora_kernels_lora, N, INT32_MAX, " is 2147483647, must be 1 to 1048576"),
    {offsetof(mlora_kernels_lora, offset[1]), -1, "offset is -1, must be 0 to 3"},
    {offsetof(mlora_kernels_lora, offset[1]), 4, "offset is 4, must be 0 to 3"},
    {offsetof(mlora_kernels_lora, width[0]), 0, "width is 0, must be 1 to 4"},
    {offsetof(mlora_kernels_lora, width[0]), 5, "width is 5, must be 1 to 4"},
    WRONG(mlora_kernels_lora, dtype, MLORA_KERNELS_F16,
          " is 1, must be MLORA_KERNELS_F32 or _BF16"),
    WRONG(mlora_kernels_lora, dtype, -1, " is -1, must be MLORA_KERNELS_F32 or _BF16"),
    WRONG(mlora_kernels_lora, mode, 6, " is 6, must be 0 to 5"),
    WRONG(mlora_kernels_lora, max_rank, 0, " is 0, must be 1 to 512"),
    WRONG(mlora_kernels_lora, max_rank, 513, " is 513, must be 1 to 512"),
    WRONG(mlora_kernels_lora, n_segments, -1, " is -1, must be 0 to 32768"),
    WRONG(mlora_kernels_lora, n_tokens, 5, " is 5, must be 0 to 4"),
    WRONG(mlora_kernels_lora, n_tokens, -4, " is -4, must be 0 to 4"),
    WRONG(mlora_kernels_lora, max_segment, 0, " is 0, must be 1 to 4"),
    WRONG(mlora_kernels_lora, max_segment, 5, " is 5, must be 0 to 4"),
};

#define UNALIGNED " is not aligned to 4 bytes, the size of an element"

static const struct wrong_pointer wrong_lora_arrays[] = {
    WRONG(mlora_kernels_lora, factors, 0, " is NULL"),
    WRONG(mlora_kernels_lora, factors, 4, " is not aligned to 8 bytes, the size of an element"),
    WRONG(mlora_kernels_lora, slot, 0, " is NULL"),
    WRONG(mlora_kernels_lora, slot, 2, UNALIGNED),
    WRONG(mlora_kernels_lora, segment_slot, 0, " is NULL"),
    WRONG(mlora_kernels_lora, segment_slot, 1, UNALIGNED),
    WRONG(mlora_kernels_lora, segment_start, 0, " is NULL"),
    WRONG(mlora_kernels_lora, segment_start, 3, UNALIGNED),
    WRONG(mlora_kernels_lora, order, 0, " is NULL"),
    WRONG(mlora_kernels_lora, order, 2, UNALIGNED),
    WRONG(mlora_kernels_lora, bias, 2, UNALIGNED),
};

/* By each of the functions that take it. */
static void check_lora_refused(mlora_kernels *kernels, const mlora_kernels_lora *lora, float *h,
                               const char *text)
{
    check_refused_by("lora_shrink", mlora_kernels_lora_shrink(kernels, h, x, lora, NULL), text);
    check_refused_by("lora_expand", mlora_kernels_lora_expand(kernels, h, h, lora, NULL), text);
    check_refused_by("lora_add", mlora_kernels_lora_add(kernels, h, x, lora, NULL), text);
    check_refused_by("lora_expand_silu_mul",
                     mlora_kernels_lora_expand_silu_mul(kernels, h, h, h, lora, NULL), text);
}

static void test_refusals(mlora_kernels *kernels)
{
    mlora_kernels_factors table[2 * MLORA_KERNELS_LINEARS];
    const mlora_kernels_lora good = make_lora(table);
    float h[16] = {0};
    float *unaligned = (float *)(void *)((char *)h + 1);
    size_t bytes = 0;
    mlora_kernels_facts facts;

    for (size_t i = 0; i < sizeof wrong_lora / sizeof *wrong_lora; i++) {
        mlora_kernels_lora lora = good;
        spoil_int(&lora, &wrong_lora[i]);
        check_lora_refused(kernels, &lora, h, wrong_lora[i].text);
        check_refused_by("lora_workspace", mlora_kernels_lora_workspace(kernels, &lora, &bytes),
                         wrong_lora[i].text);
    }
    for (size_t i = 0; i < sizeof wrong_lora_arrays / sizeof *wrong_lora_arrays; i++) {
        mlora_kernels_lora lora = good;
        lora.bias = h;
        spoil_pointer(&lora, &wrong_lora_arrays[i]);
        check_lora_refused(kernels, &lora, h, wrong_lora_arrays[i].text);
    }
    check_lora_refused(NULL, &good, h, "kernels is NULL");
    check_lora_refused(kernels, NULL, h, "lora is NULL");
    check_refused(mlora_kernels_lora_workspace(kernels, &good, NULL),
                  "lora_workspace: out is NULL");
    check_refused(mlora_kernels_lora_shrink(kernels, NULL, x, &good, NULL),
                  "lora_shrink: h is NULL");
    check_refused(mlora_kernels_lora_shrink(kernels, h, NULL, &good, NULL),
                  "lora_shrink: x is NULL");
    check_refused(mlora_kernels_lora_shrink(kernels, unaligned, x, &good, NULL),
                  "lora_shrink: h" UNALIGNED);
    check_refused(mlora_kernels_lora_shrink(kernels, h, unaligned, &good, NULL),
                  "lora_shrink: x" UNALIGNED);
    check_refused(mlora_kernels_lora_expand(kernels, NULL, h, &good, NULL),
                  "lora_expand: y is NULL");
    check_refused(mlora_kernels_lora_expand(kernels, unaligned, h, &good, NULL),
                  "lora_expand: y" UNALIGNED);
    check_refused(mlora_kernels_lora_expand(kernels, h, NULL, &good, NULL),
                  "lora_expand: h is NULL");
    mlora_kernels_lora lora = good;
    lora.dtype = MLORA_KERNELS_BF16;
    check_refused(mlora_kernels_lora_add(kernels, h, unaligned, &lora, NULL),
                  "lora_add: x is not aligned to 2 bytes, the size of an element");
    check_refused(mlora_kernels_lora_add(kernels, unaligned, x, &lora, NULL),
                  "lora_add: y is not aligned to 2 bytes, the size of an element");
    check_refused(mlora_kernels_lora_expand_silu_mul(kernels, h, NULL, h, &good, NULL),
                  "lora_expand_silu_mul: gate_up is NULL");
    for (int i = 0; i < 16; i++) check(h[i] == 0, "nothing was written by what was refused");

    check_refused(mlora_kernels_info(NULL, &facts), "info: an argument is NULL");
    check_refused(mlora_kernels_info(kernels, NULL), "info: an argument is NULL");
    check_refused(mlora_kernels_open(NULL, MLORA_KERNELS_VERSION, MLORA_KERNELS_CPU, 1),
                  "open: out is NULL");
}

static const struct wrong_int wrong_paged[] = {
    WRONG(mlora_kernels_paged, T, -1, " is -1, must be 0 to 65535"),
    WRONG(mlora_kernels_paged, Q, 0, " is 0, must be 1 to 65535"),
    WRONG(mlora_kernels_paged, H, 0, " is 0, must be 1 to 1024"),
    WRONG(mlora_kernels_paged, G, 0, " is 0, must be 1 to 1024"),
    WRONG(mlora_kernels_paged, d, 0, " is 0, must be 2 to 512"),
    WRONG(mlora_kernels_paged, d, 514, " is 514, must be 2 to 512"),
    WRONG(mlora_kernels_paged, max_row, 3, " is 3, must be 1 to 2"),
    WRONG(mlora_kernels_paged, max_kv, 1, " is 1, must be 2 to 1073741824"),
    WRONG(mlora_kernels_paged, window, -1, " is -1, must be 0 to 1073741824"),
    WRONG(mlora_kernels_paged, max_blocks, 0, " is 0, must be 1 to 134217728"),
    WRONG(mlora_kernels_paged, dtype, 1, " is 1, must be MLORA_KERNELS_F32 or _BF16"),
    WRONG(mlora_kernels_paged, kv_dtype, 3, " is 3, must be MLORA_KERNELS_F32 or _BF16"),
};

static const struct wrong_pointer wrong_paged_arrays[] = {
    WRONG(mlora_kernels_paged, k, 0, " is NULL"),
    WRONG(mlora_kernels_paged, k, 2, UNALIGNED),
    WRONG(mlora_kernels_paged, v, 0, " is NULL"),
    WRONG(mlora_kernels_paged, v, 2, UNALIGNED),
    WRONG(mlora_kernels_paged, block_table, 0, " is NULL"),
    WRONG(mlora_kernels_paged, block_table, 1, UNALIGNED),
    WRONG(mlora_kernels_paged, row_start, 0, " is NULL"),
    WRONG(mlora_kernels_paged, row_start, 1, UNALIGNED),
    WRONG(mlora_kernels_paged, kv_len, 0, " is NULL"),
    WRONG(mlora_kernels_paged, kv_len, 1, UNALIGNED),
    WRONG(mlora_kernels_paged, position, 0, " is NULL"),
    WRONG(mlora_kernels_paged, position, 1, UNALIGNED),
    WRONG(mlora_kernels_paged, row, 0, " is NULL"),
    WRONG(mlora_kernels_paged, row, 1, UNALIGNED),
    WRONG(mlora_kernels_paged, frequency, 2, UNALIGNED),
};

static void check_paged_refused(mlora_kernels *kernels, const mlora_kernels_paged *paged, float *y,
                                float *qkv, const char *text)
{
    check_refused_by("kv_write", mlora_kernels_kv_write(kernels, qkv, paged, NULL), text);
    check_refused_by("attention", mlora_kernels_attention(kernels, y, qkv, paged, NULL), text);
}

static void test_paged_refusals(mlora_kernels *kernels, const mlora_kernels_paged *good, float *y,
                                float *qkv)
{
    float *unaligned = (float *)(void *)((char *)qkv + 2);
    size_t bytes;

    for (size_t i = 0; i < sizeof wrong_paged / sizeof *wrong_paged; i++) {
        mlora_kernels_paged paged = *good;
        spoil_int(&paged, &wrong_paged[i]);
        check_paged_refused(kernels, &paged, y, qkv, wrong_paged[i].text);
        check_refused_by("attention_workspace",
                         mlora_kernels_attention_workspace(kernels, &paged, &bytes),
                         wrong_paged[i].text);
    }
    for (size_t i = 0; i < sizeof wrong_paged_arrays / sizeof *wrong_paged_arrays; i++) {
        mlora_kernels_paged paged = *good;
        spoil_pointer(&paged, &wrong_paged_arrays[i]);
        check_paged_refused(kernels, &paged, y, qkv, wrong_paged_arrays[i].text);
    }
    check_paged_refused(NULL, good, y, qkv, "kernels is NULL");
    check_paged_refused(kernels, NULL, y, qkv, "paged is NULL");
    check_paged_refused(kernels, good, y, NULL, "qkv is NULL");
    check_paged_refused(kernels, good, y, unaligned, "qkv" UNALIGNED);
    check_refused(mlora_kernels_attention(kernels, NULL, qkv, good, NULL), "attention: y is NULL");
    check_refused(mlora_kernels_attention_workspace(kernels, good, NULL),
                  "attention_workspace: out is NULL");
}

/* A row of two tokens over blocks 1 (positions 0 to 15) and 0: positions 15 and 16. With scale 0
 * each position counts the same. */
static void test_paged(mlora_kernels *kernels)
{
    static float k[2 * 16 * 2], v[2 * 16 * 2];
    const int32_t table[] = {1, 0}, row_start[] = {0, 2}, kv_len[] = {17};
    const int32_t position[] = {15, 16}, row[] = {0, 0};
    float qkv[] = {1, 2, 3, 4, 16, 32, 5, 6, 7, 8, 34, 17};
    const float k_want[] = {3, 4}, k0_want[] = {7, 8}, v_want[] = {16, 32}, v0_want[] = {34, 17};
    const float y_want[] = {1, 2, 50.0f / 17, 49.0f / 17}, same[] = {1, 2, 3, 4, 16, 32};
    const float frequency[] = {3.14159265f / 2}, turned[] = {2, -1, 4, -3};
    float y[4];
    size_t bytes = 1;
    mlora_kernels_paged paged;

    memset(&paged, 0, sizeof paged);
    paged.T = paged.max_row = 2;
    paged.Q = paged.H = paged.G = 1;
    paged.d = 2;
    paged.max_kv = 17;
    paged.max_blocks = 2;
    paged.k = k;
    paged.v = v;
    paged.block_table = table;
    paged.row_start = row_start;
    paged.kv_len = kv_len;
    paged.position = position;
    paged.row = row;
    paged.amplitude = 1;
    check(mlora_kernels_kv_write(kernels, qkv, &paged, NULL) == 0, "kv_write");
    check_floats(qkv, same, 6, "qkv");
    check_floats(k + (16 + 15) * 2, k_want, 2, "k of position 15");
    check_floats(k, k0_want, 2, "k of position 16");
    check_floats(v + (16 + 15) * 2, v_want, 2, "v of position 15");
    check_floats(v, v0_want, 2, "v of position 16");
    check(mlora_kernels_attention_workspace(kernels, &paged, &bytes) == 0 && bytes == 0,
          "attention_workspace");
    check(mlora_kernels_attention(kernels, y, qkv, &paged, NULL) == 0, "attention");
    check_floats(y, y_want, 4, "y of attention");

    /* With a frequency: position 15 turns by 15 quarters, (a, b) to (b, -a). */
    paged.frequency = frequency;
    check(mlora_kernels_kv_write(kernels, qkv, &paged, NULL) == 0, "kv_write, turned");
    for (int i = 0; i < 4; i++) check(fabsf(qkv[i] - turned[i]) < 1e-4f, "qkv, turned");

    test_paged_refusals(kernels, &paged, y, qkv);
    paged.d = 3;
    check_refused(mlora_kernels_attention(kernels, y, qkv, &paged, NULL),
                  "attention: d is 3, must be even");
    paged.d = 2;
    paged.H = 3;
    paged.G = 2;
    check_refused(mlora_kernels_kv_write(kernels, qkv, &paged, NULL),
                  "kv_write: H is 3, must be a multiple of G, 2");
}

static const struct wrong_int wrong_extend[] = {
    WRONG(mlora_kernels_extend, bs, -1, " is -1, must be 0 to 1048576"),
    WRONG(mlora_kernels_extend, capacity, -1, " is -1, must be 0 to 1073741824"),
    WRONG(mlora_kernels_extend, search, 4, " is 4, must be 0 to 3"),
};

static const struct wrong_pointer wrong_extend_arrays[] = {
    WRONG(mlora_kernels_extend, extend_len, 0, " is NULL"),
    WRONG(mlora_kernels_extend, extend_len, 2, UNALIGNED),
    WRONG(mlora_kernels_extend, kv_len, 0, " is NULL"),
    WRONG(mlora_kernels_extend, kv_len, 2, UNALIGNED),
    WRONG(mlora_kernels_extend, adapter, 1, UNALIGNED),
    WRONG(mlora_kernels_extend, total, 0, " is NULL"),
    WRONG(mlora_kernels_extend, total, 1, UNALIGNED),
    WRONG(mlora_kernels_extend, request_start, 0, " is NULL"),
    WRONG(mlora_kernels_extend, request_start, 1, UNALIGNED),
    WRONG(mlora_kernels_extend, token_kv_len, 1, UNALIGNED),
    WRONG(mlora_kernels_extend, clamped_kv_len, 1, UNALIGNED),
    WRONG(mlora_kernels_extend, token_position, 1, UNALIGNED),
    WRONG(mlora_kernels_extend, token_request, 1, UNALIGNED),
    WRONG(mlora_kernels_extend, token_adapter, 1, UNALIGNED),
};

static void test_extend(mlora_kernels *kernels)
{
    const int32_t len[] = {2, 0, 3}, kv_len[] = {5, 9, 3};
    int32_t total = 0, start[4], out[3][6];
    const int32_t start_want[] = {0, 2, 2, 5}, kv_want[] = {4, 5, 1, 2, 3, -7};
    const int32_t clamped_want[] = {4, 4, 1, 2, 3, -7}, request_want[] = {0, 0, 2, 2, 2, -7};
    mlora_kernels_extend extend;

    memset(&extend, 0, sizeof extend);
    for (int i = 0; i < 18; i++) out[i / 6][i % 6] = -7;
    extend.bs = 3;
    extend.capacity = 6;
    extend.topk = 4;
    extend.extend_len = len;
    extend.kv_len = kv_len;
    extend.total = &total;
    extend.request_start = start;
    extend.token_kv_len = out[0];
    extend.clamped_kv_len = out[1];
    extend.token_request = out[2];
    check(mlora_kernels_extend_metadata(kernels, &extend, NULL) == 0, "extend_metadata");
    check(total == 5, "total");
    check_ints(start, start_want, 4, "request_start");
    check_ints(out[0], kv_want, 6, "token_kv_len");
    check_ints(out[1], clamped_want, 6, "clamped_kv_len");
    check_ints(out[2], request_want, 6, "token_request");
    for (size_t i = 0; i < sizeof wrong_extend / sizeof *wrong_extend; i++) {
        mlora_kernels_extend copy = extend;
        spoil_int(&copy, &wrong_extend[i]);
        check_refused_by("extend_metadata", mlora_kernels_extend_metadata(kernels, &copy, NULL),
                         wrong_extend[i].text);
    }
    extend.token_adapter = out[2];
    check_refused(mlora_kernels_extend_metadata(kernels, &extend, NULL),
                  "extend_metadata: adapter is NULL");
    extend.adapter = len;
    extend.token_position = out[0];
    for (size_t i = 0; i < sizeof wrong_extend_arrays / sizeof *wrong_extend_arrays; i++) {
        mlora_kernels_extend copy = extend;
        spoil_pointer(&copy, &wrong_extend_arrays[i]);
        check_refused_by("extend_metadata", mlora_kernels_extend_metadata(kernels, &copy, NULL),
                         wrong_extend_arrays[i].text);
    }
    extend.has_int64_lengths = 1;
    extend.extend_len = start + ((uintptr_t)start % 8 == 0);
    check_refused(mlora_kernels_extend_metadata(kernels, &extend, NULL),
                  "extend_metadata: extend_len is not aligned to 8 bytes, the size of an element");
    check_refused(mlora_kernels_extend_metadata(NULL, &extend, NULL),
                  "extend_metadata: kernels is NULL");
    check_refused(mlora_kernels_extend_metadata(kernels, NULL, NULL),
                  "extend_metadata: extend is NULL");
    check(total == 5, "total after refusals");
    check_ints(out[2], request_want, 6, "token_request after refusals");
}

int main(void)
{
    mlora_kernels *kernels = NULL;
    mlora_kernels_facts facts;

    check_refused(mlora_kernels_open(&kernels, 7, MLORA_KERNELS_CPU, 1),
                  "open: the caller was made for version 7 of libmlora_kernels, this is version 1: "
                  "compile it with the mlora_kernels.h of this library");
    check_refused(mlora_kernels_open(&kernels, MLORA_KERNELS_VERSION, 9, 0),
                  "open: backend is 9, must be MLORA_KERNELS_CPU or _CUDA");
    check(mlora_kernels_open(&kernels, MLORA_KERNELS_VERSION, MLORA_KERNELS_CUDA, 4096) ==
              MLORA_KERNELS_EUNSUPPORTED,
          "there is no GPU 4096");
    check(!kernels, "a handle of no GPU");
    mlora_kernels_close(kernels);

    check(mlora_kernels_open(&kernels, MLORA_KERNELS_VERSION, MLORA_KERNELS_CPU, 2) == 0, "open");
    if (!kernels) return 1;
    check(mlora_kernels_info(kernels, &facts) == 0 && facts.version == mlora_kernels_version() &&
              facts.backend == MLORA_KERNELS_CPU && facts.max_rank == 512 &&
              facts.extend_linear_max == 16 && facts.kv_block == 16 &&
              strstr(facts.description, "2 threads"),
          "info");
    test_lora(kernels);
    test_silu(kernels);
    test_refusals(kernels);
    test_paged(kernels);
    test_extend(kernels);
    mlora_kernels_close(kernels);
    if (n_failed == 0)
        printf("api: kernels work (%s, version %d)\n",
#ifdef __cplusplus
               "C++",
#else
               "C",
#endif
               mlora_kernels_version());
    return n_failed > 0;
}
