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

static void test_refusals(mlora_kernels *kernels)
{
    mlora_kernels_factors table[2 * MLORA_KERNELS_LINEARS];
    mlora_kernels_lora lora = make_lora(table);
    float h[8];

    check_refused(mlora_kernels_lora_shrink(NULL, h, x, &lora, NULL),
                  "lora_shrink: kernels is NULL");
    check_refused(mlora_kernels_lora_shrink(kernels, NULL, x, &lora, NULL),
                  "lora_shrink: h is NULL");
    check_refused(mlora_kernels_lora_shrink(kernels, h, NULL, &lora, NULL),
                  "lora_shrink: x is NULL");
    lora.max_rank = 600;
    check_refused(mlora_kernels_lora_shrink(kernels, h, x, &lora, NULL),
                  "lora_shrink: max_rank is 600, must be 1 to 512");
    lora = make_lora(table);
    lora.offset[1] = 4;
    check_refused(mlora_kernels_lora_shrink(kernels, h, x, &lora, NULL),
                  "lora_shrink: offset is 4, must be 0 to 3");
    lora = make_lora(table);
    lora.n_slices = 4;
    check_refused(mlora_kernels_lora_shrink(kernels, h, x, &lora, NULL),
                  "lora_shrink: n_slices is 4, must be 1 to 3");
    lora = make_lora(table);
    lora.T = 65536;
    check_refused(mlora_kernels_lora_shrink(kernels, h, x, &lora, NULL),
                  "lora_shrink: T is 65536, must be 0 to 65535");
    lora = make_lora(table);
    lora.dtype = MLORA_KERNELS_F16;
    check_refused(mlora_kernels_lora_shrink(kernels, h, x, &lora, NULL),
                  "lora_shrink: dtype is 1, must be MLORA_KERNELS_F32 or _BF16");
    lora = make_lora(table);
    lora.order = NULL;
    check_refused(mlora_kernels_lora_expand(kernels, h, h, &lora, NULL),
                  "lora_expand: order is NULL");
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

    paged.d = 3;
    check_refused(mlora_kernels_attention(kernels, y, qkv, &paged, NULL),
                  "attention: d is 3, must be even");
    paged.d = 2;
    paged.H = 3;
    paged.G = 2;
    check_refused(mlora_kernels_kv_write(kernels, qkv, &paged, NULL),
                  "kv_write: H is 3, must be a multiple of G, 2");
    paged.H = paged.G = 1;
    paged.row = NULL;
    check_refused(mlora_kernels_attention(kernels, y, qkv, &paged, NULL), "attention: row is NULL");
}

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
    extend.search = 4;
    check_refused(mlora_kernels_extend_metadata(kernels, &extend, NULL),
                  "extend_metadata: search is 4, must be 0 to 3");
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
