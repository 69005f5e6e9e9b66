/* Which LoRA kernels `auto` chooses: plain C, whatever the device under test is. */
#include <criterion/criterion.h>

#include "kernels/cuda/lora_choice.h"

/* Microseconds that what adapters add to a layer's seven linears of an 8B model takes on an H200, by
 * itself: to results in f32; at 512 tokens and of more than 64 adapters, in bf16. */
static const struct measured {
    int n_tokens, n_adapters, rank;
    double by_row, by_tile; /* modes bgmv and sgmv */
} measured[] = {
    {4, 1, 16, 14.2, 14.6},        {4, 2, 16, 14.5, 15.2},       {4, 4, 16, 15.4, 17.8},
    {6, 3, 16, 14.9, 17.5},        {6, 5, 16, 15.4, 19.6},       {6, 6, 16, 15.7, 20.4},
    {8, 1, 16, 15.7, 15.8},        {8, 2, 16, 16.0, 15.8},       {8, 3, 16, 16.3, 17.6},
    {8, 4, 16, 16.4, 18.2},        {8, 5, 16, 16.8, 19.6},       {8, 6, 16, 16.9, 20.6},
    {8, 7, 16, 17.1, 22.2},        {8, 8, 16, 17.3, 24.3},       {12, 1, 16, 18.1, 17.2},
    {12, 2, 16, 18.5, 16.8},       {12, 3, 16, 19.0, 18.1},      {12, 4, 16, 19.2, 18.5},
    {12, 5, 16, 19.4, 20.0},       {12, 6, 16, 19.7, 21.0},      {12, 7, 16, 20.3, 22.4},
    {12, 8, 16, 20.4, 24.4},       {16, 1, 16, 19.2, 18.4},      {16, 2, 16, 19.5, 18.3},
    {16, 3, 16, 19.7, 18.6},       {16, 4, 16, 19.9, 18.9},      {16, 5, 16, 20.1, 20.2},
    {16, 6, 16, 20.4, 21.3},       {16, 7, 16, 20.5, 22.7},      {16, 8, 16, 20.7, 24.8},
    {20, 1, 16, 20.5, 19.5},       {20, 2, 16, 20.7, 19.4},      {20, 3, 16, 21.0, 19.0},
    {20, 4, 16, 21.5, 19.2},       {20, 5, 16, 21.7, 20.7},      {20, 6, 16, 21.8, 21.6},
    {20, 7, 16, 22.0, 22.9},       {20, 8, 16, 22.2, 24.8},      {24, 1, 16, 23.0, 20.5},
    {24, 2, 16, 23.1, 19.9},       {24, 3, 16, 23.4, 19.7},      {24, 4, 16, 23.5, 19.8},
    {24, 5, 16, 23.8, 20.9},       {24, 6, 16, 23.9, 21.9},      {24, 7, 16, 24.2, 23.3},
    {24, 8, 16, 24.4, 25.0},       {4, 1, 64, 18.7, 20.6},       {4, 2, 64, 19.4, 23.8},
    {4, 4, 64, 21.4, 36.4},        {6, 3, 64, 23.0, 29.7},       {6, 5, 64, 25.4, 44.2},
    {6, 6, 64, 26.5, 47.7},        {8, 1, 64, 23.7, 22.4},       {8, 2, 64, 24.2, 24.5},
    {8, 3, 64, 25.7, 29.9},        {8, 4, 64, 26.8, 37.3},       {8, 5, 64, 28.5, 44.6},
    {8, 6, 64, 29.4, 48.1},        {8, 7, 64, 30.4, 63.3},       {8, 8, 64, 31.7, 66.6},
    {12, 1, 64, 29.7, 25.1},       {12, 2, 64, 30.2, 25.3},      {12, 3, 64, 31.9, 30.8},
    {12, 4, 64, 33.3, 37.6},       {12, 5, 64, 34.6, 45.1},      {12, 6, 64, 36.3, 48.8},
    {12, 7, 64, 37.6, 63.9},       {12, 8, 64, 38.3, 68.9},      {16, 1, 64, 35.9, 27.6},
    {16, 2, 64, 36.6, 26.5},       {16, 3, 64, 38.0, 31.3},      {16, 4, 64, 38.9, 37.9},
    {16, 5, 64, 39.9, 45.5},       {16, 6, 64, 41.2, 49.0},      {16, 7, 64, 42.5, 64.5},
    {16, 8, 64, 44.0, 69.1},       {20, 1, 64, 39.9, 30.4},      {20, 2, 64, 40.9, 28.7},
    {20, 3, 64, 42.7, 32.0},       {20, 4, 64, 43.8, 34.4},      {20, 5, 64, 44.8, 42.0},
    {20, 6, 64, 46.1, 45.9},       {20, 7, 64, 47.6, 50.1},      {20, 8, 64, 48.6, 54.1},
    {24, 1, 64, 50.2, 30.9},       {24, 2, 64, 51.2, 28.1},      {24, 3, 64, 53.7, 33.0},
    {24, 4, 64, 55.1, 35.1},       {24, 5, 64, 56.7, 42.5},      {24, 6, 64, 58.1, 46.2},
    {24, 7, 64, 59.4, 50.5},       {24, 8, 64, 61.2, 54.6},      {32, 12, 8, 23.8, 28.6},
    {40, 12, 8, 25.4, 28.9},       {48, 12, 8, 28.5, 29.4},      {56, 12, 8, 32.2, 29.7},
    {32, 16, 8, 24.2, 33.7},       {40, 16, 8, 26.0, 34.2},      {48, 16, 8, 29.0, 34.3},
    {56, 16, 8, 32.8, 34.7},       {72, 16, 8, 38.4, 33.1},      {96, 16, 8, 46.8, 34.3},
    {128, 16, 8, 61.1, 37.8},      {192, 16, 8, 89.1, 43.3},     {256, 16, 8, 104.9, 54.7},
    {32, 24, 8, 25.7, 45.5},       {40, 24, 8, 27.1, 46.0},      {48, 24, 8, 30.1, 46.4},
    {56, 24, 8, 33.7, 46.6},       {32, 32, 8, 26.7, 61.5},      {40, 32, 8, 28.1, 62.0},
    {48, 32, 8, 31.7, 62.4},       {56, 32, 8, 35.3, 62.9},      {72, 32, 8, 40.9, 54.2},
    {96, 32, 8, 48.8, 55.2},       {128, 32, 8, 63.7, 56.9},     {192, 32, 8, 91.6, 60.0},
    {256, 32, 8, 107.5, 65.0},     {72, 64, 8, 45.1, 91.7},      {96, 64, 8, 52.2, 92.9},
    {128, 64, 8, 66.7, 95.0},      {192, 64, 8, 95.4, 97.5},     {256, 64, 8, 110.6, 100.6},
    {256, 96, 8, 108.2, 138.8},    {512, 96, 8, 182.8, 147.0},   {256, 128, 8, 112.4, 177.1},
    {512, 128, 8, 186.9, 185.0},   {256, 256, 8, 130.0, 379.7},  {512, 256, 8, 200.0, 388.4},
    {32, 12, 16, 31.3, 31.7},      {40, 12, 16, 35.1, 32.1},     {48, 12, 16, 39.0, 32.6},
    {56, 12, 16, 43.8, 33.3},      {32, 16, 16, 31.8, 39.2},     {40, 16, 16, 36.1, 39.9},
    {48, 16, 16, 40.2, 40.2},      {56, 16, 16, 45.3, 40.9},     {72, 16, 16, 50.0, 37.8},
    {96, 16, 16, 68.7, 39.2},      {128, 16, 16, 82.0, 41.8},    {192, 16, 16, 104.0, 47.0},
    {256, 16, 16, 135.7, 57.9},    {32, 24, 16, 33.5, 53.5},     {40, 24, 16, 38.4, 54.3},
    {48, 24, 16, 42.2, 55.0},      {56, 24, 16, 46.8, 55.4},     {32, 32, 16, 36.1, 72.3},
    {40, 32, 16, 40.3, 72.9},      {48, 32, 16, 44.8, 74.0},     {56, 32, 16, 49.4, 74.1},
    {72, 32, 16, 54.1, 59.9},      {96, 32, 16, 73.9, 61.4},     {128, 32, 16, 85.2, 63.5},
    {192, 32, 16, 107.3, 67.1},    {256, 32, 16, 138.5, 72.3},   {72, 64, 16, 64.5, 101.7},
    {96, 64, 16, 83.9, 102.9},     {128, 64, 16, 94.9, 104.8},   {192, 64, 16, 122.3, 108.6},
    {256, 64, 16, 146.6, 112.1},   {256, 96, 16, 149.3, 154.2},  {512, 96, 16, 241.4, 163.2},
    {256, 128, 16, 159.0, 196.6},  {512, 128, 16, 249.2, 204.6}, {256, 256, 16, 200.0, 411.6},
    {512, 256, 16, 285.0, 423.1},  {72, 16, 64, 129.0, 92.7},    {96, 16, 64, 158.5, 95.4},
    {128, 16, 64, 194.3, 99.7},    {192, 16, 64, 280.2, 107.7},  {256, 16, 64, 364.9, 118.6},
    {72, 32, 64, 149.4, 157.0},    {96, 32, 64, 177.5, 160.7},   {128, 32, 64, 209.3, 165.1},
    {192, 32, 64, 293.1, 172.6},   {256, 32, 64, 376.6, 182.9},  {72, 64, 64, 186.8, 281.2},
    {96, 64, 64, 220.9, 284.8},    {128, 64, 64, 251.7, 291.3},  {192, 64, 64, 323.7, 300.4},
    {256, 64, 64, 396.2, 309.1},   {256, 96, 64, 464.3, 380.4},  {512, 96, 64, 783.2, 405.0},
    {256, 128, 64, 509.2, 520.0},  {512, 128, 64, 806.2, 553.0}, {256, 256, 64, 678.6, 1011.0},
    {512, 256, 64, 956.1, 1064.0},
};
enum { N_MEASURED = sizeof measured / sizeof measured[0] };

static struct lora_view view(mlora_lora_mode mode, int n_tokens, int n_adapters, int rank)
{
    return (struct lora_view){
        .mode = mode, .n_tokens = n_tokens, .n_segments = n_adapters, .max_rank = rank};
}

static bool chooses_tiles(mlora_lora_mode mode, int n_tokens, int n_adapters, int rank)
{
    const struct lora_view lora = view(mode, n_tokens, n_adapters, rank);
    return lora_wants_tiles(&lora);
}

Test(lora_choice, of_auto_is_at_most_3_percent_slower_than_the_best_measured)
{
    for (int i = 0; i < N_MEASURED; i++) {
        const struct measured *m = &measured[i];
        const bool tiles = chooses_tiles(MLORA_LORA_AUTO, m->n_tokens, m->n_adapters, m->rank);
        const double best = m->by_row < m->by_tile ? m->by_row : m->by_tile;
        cr_expect_leq(tiles ? m->by_tile : m->by_row, 1.03 * best,
                      "%d tokens of %d adapters of rank %d: %s", m->n_tokens, m->n_adapters,
                      m->rank, tiles ? "tiles" : "token by token");
    }
}

/* Neither a token more nor an adapter less takes tiles away, and no adapter more takes many more
 * tokens. */
Test(lora_choice, has_no_steps)
{
    static const int ranks[] = {1, 8, 16, 32, 64, 512};

    for (int i = 0; i < 6; i++)
        for (int n = 1; n < 512; n++) {
            const int now = lora_tokens_for_tiles(n, ranks[i]);
            const int next = lora_tokens_for_tiles(n + 1, ranks[i]);
            cr_expect_geq(next, now, "%d adapters of rank %d", n, ranks[i]);
            cr_expect_leq(next, now + 20, "%d adapters of rank %d", n, ranks[i]);
            cr_expect(!chooses_tiles(MLORA_LORA_AUTO, now - 1, n, ranks[i]));
            cr_expect(chooses_tiles(MLORA_LORA_AUTO, now, n, ranks[i]));
        }
}

Test(lora_choice, of_a_mode_by_name_is_that_mode)
{
    cr_expect(!chooses_tiles(MLORA_LORA_BGMV, 4096, 1, 16));
    cr_expect(chooses_tiles(MLORA_LORA_SGMV, 1, 1, 16));
    cr_expect(chooses_tiles(MLORA_LORA_LOOP, 1, 1, 16));
}

Test(lora_choice, expands_inside_the_op_that_reads_in_large_steps_of_tiles)
{
    struct lora_view lora = {
        .mode = MLORA_LORA_AUTO, .n_tokens = 129, .n_segments = 7, .max_rank = 32};

    cr_expect(lora_is_fused(&lora));
    lora.n_tokens = 128;
    cr_expect(!lora_is_fused(&lora));
    lora.mode = MLORA_LORA_FUSED;
    cr_expect(lora_is_fused(&lora));
    lora.expands_more = true;
    cr_expect(!lora_is_fused(&lora));
    lora = (struct lora_view){
        .mode = MLORA_LORA_AUTO, .n_tokens = 129, .n_segments = 7, .max_rank = 33};
    cr_expect(!lora_is_fused(&lora));
    lora = (struct lora_view){
        .mode = MLORA_LORA_AUTO, .n_tokens = 129, .n_segments = 64, .max_rank = 32};
    cr_expect(!lora_is_fused(&lora), "token by token");
}

/* The same, added to a step of as many rows with 32 or 48 new tokens, expand beside the base product
 * or after it. They vary by 2 us from run to run. */
static const struct beside {
    int n_rows, n_adapters, rank;
    double beside, after;
} beside[] = {
    {16, 16, 16, 21.5, 23.8}, {24, 24, 16, 31.0, 29.4}, {32, 24, 16, 29.5, 34.9},
    {32, 32, 16, 36.7, 37.6}, {48, 32, 16, 50.3, 55.4}, {48, 48, 16, 56.6, 50.0},
    {64, 16, 16, 34.9, 45.8}, {64, 32, 16, 45.5, 54.9}, {64, 40, 16, 67.7, 68.7},
    {64, 48, 16, 58.9, 53.7}, {64, 56, 16, 66.5, 56.9}, {64, 64, 16, 76.4, 62.7},
    {64, 46, 8, 52.4, 43.3},  {64, 7, 64, 56.6, 66.3},  {64, 64, 64, 215.3, 183.5},
};

Test(lora_choice, of_what_runs_beside_the_product_is_the_best_measured)
{
    for (size_t i = 0; i < sizeof beside / sizeof beside[0]; i++) {
        const struct beside *b = &beside[i];
        const struct lora_view lora = view(MLORA_LORA_AUTO, b->n_rows, b->n_adapters, b->rank);
        const double best = b->beside < b->after ? b->beside : b->after;
        cr_expect_leq(lora_expands_beside(&lora) ? b->beside : b->after, best + 2.0,
                      "%d rows of %d adapters of rank %d", b->n_rows, b->n_adapters, b->rank);
    }
}
