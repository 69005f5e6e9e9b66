#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/philox.h"

TestSuite(sample, .init = device_open, .fini = device_close);

static const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1};
static const struct sampling plain = {.temperature = 1, .top_p = 1, .repetition_penalty = 1};

/* One token for each row of logits, without penalties. */
static void sample(int32_t *ids, const float *logits, const struct sampling *sampling, int Q, int V)
{
    int32_t *nothing = zeros((size_t)Q + 1, sizeof *nothing);
    const size_t bytes = ((size_t)Q + 1) * sizeof *nothing;
    const struct sample_view view = {
        .Q = Q,
        .sampling = upload(sampling, (size_t)Q * sizeof *sampling),
        .history = upload(nothing, bytes),
        .history_start = upload(nothing, bytes),
        .n_prompt = upload(nothing, bytes),
    };
    int32_t *out = device_memory((size_t)Q * sizeof *out);

    dev->ops->sample(dev, out, upload(logits, (size_t)Q * (size_t)V * sizeof *logits), &view, V);
    download(ids, out, (size_t)Q * sizeof *ids);
    free(nothing);
}

/* How often each token is drawn from the same logits in n draws. */
static void count_draws(int *count, const float *logits, struct sampling sampling, int V, int n)
{
    float *rows = zeros((size_t)(n * V), sizeof *rows);
    struct sampling *samplings = zeros((size_t)n, sizeof *samplings);
    int32_t *ids = zeros((size_t)n, sizeof *ids);

    for (int i = 0; i < n; i++) {
        memcpy(rows + i * V, logits, (size_t)V * sizeof *rows);
        samplings[i] = sampling;
        samplings[i].draw = (uint32_t)i;
    }
    sample(ids, rows, samplings, n, V);
    memset(count, 0, (size_t)V * sizeof *count);
    for (int i = 0; i < n; i++) {
        cr_assert(ids[i] >= 0 && ids[i] < V);
        count[ids[i]]++;
    }
    free(rows);
    free(samplings);
    free(ids);
}

/* Fail unless exactly the tokens in `kept` ("1101") are ever drawn. */
static void expect_kept(const float *logits, struct sampling sampling, const char *kept)
{
    const int V = (int)strlen(kept);
    int count[16];

    count_draws(count, logits, sampling, V, 3000);
    for (int v = 0; v < V; v++)
        cr_expect_eq(count[v] > 0, kept[v] == '1', "token %d of %s: %d draws", v, kept, count[v]);
}

Test(sample, philox_gives_the_known_words)
{
    /* Known answers of Random123's own distribution (kat_vectors, philox4x32-10). */
    static const struct {
        uint32_t counter[4];
        uint64_t key;
        uint32_t want[4];
    } known[] = {
        {{0, 0, 0, 0}, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
        {{~0u, ~0u, ~0u, ~0u}, UINT64_MAX, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
        {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
         0x299f31d0a4093822u,
         {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t got[4];
        philox4x32(got, known[i].counter, known[i].key);
        cr_expect_arr_eq(got, known[i].want, sizeof got);
    }
}

Test(sample, takes_the_lowest_id_of_the_largest_when_greedy)
{
    const float logits[3][5] = {{1, 3, 3, 2, 3}, {-5, -4, -3, -3, -9}, {-INFINITY, 0, 0, 0, 0}};
    const struct sampling sampling[3] = {greedy, greedy, greedy};
    int32_t ids[3];

    sample(ids, &logits[0][0], sampling, 3, 5);
    cr_expect_eq(ids[0], 1);
    cr_expect_eq(ids[1], 2);
    cr_expect_eq(ids[2], 1);
}

Test(sample, gives_minus_one_for_damaged_logits)
{
    const float logits[5][2] = {
        {1, NAN}, {NAN, 1}, {INFINITY, 1}, {-INFINITY, -INFINITY}, {-INFINITY, 1}};

    for (int drawn = 0; drawn < 2; drawn++) {
        const struct sampling one = drawn ? plain : greedy;
        const struct sampling sampling[5] = {one, one, one, one, one};
        int32_t ids[5];
        sample(ids, &logits[0][0], sampling, 5, 2);
        for (int q = 0; q < 4; q++) cr_expect_eq(ids[q], -1, "row %d", q);
        cr_expect_eq(ids[4], 1);
    }
}

Test(sample, draws_from_the_softmax)
{
    /* 100000 draws against probabilities of 1, 2, 3, 4, ... 10 parts of 55, at temperature 0.5
     * of half the logits. Chi-squared with 9 degrees of freedom is below 27.9 in 999 of 1000. */
    enum { V = 10, N = 100000 };
    float logits[V];
    int count[V];
    double chi = 0;
    struct sampling sampling = plain;

    sampling.temperature = 0.5f;
    sampling.seed = 0x123456789abcdef0u;
    for (int v = 0; v < V; v++) logits[v] = 0.5f * logf((float)(v + 1)) + 40;
    count_draws(count, logits, sampling, V, N);
    for (int v = 0; v < V; v++) {
        const double want = N * (v + 1) / 55.0;
        chi += (count[v] - want) * (count[v] - want) / want;
    }
    cr_expect_lt(chi, 27.9);
}

Test(sample, draws_rare_tokens_at_their_rate)
{
    /* One token of probability about 1/1001 among 40 that share the rest: 100 of 100000, give or
     * take 10; five times that is far out. */
    enum { V = 41, N = 100000 };
    float logits[V] = {0};
    int count[V];

    logits[40] = logf(40.0f / 1000.0f);
    count_draws(count, logits, plain, V, N);
    cr_expect(count[40] > 50 && count[40] < 150, "%d", count[40]);
}

Test(sample, top_k_keeps_the_k_largest_and_their_equals)
{
    const float logits[6] = {0.3f, 0.1f, 0.5f, 0.3f, 0.0f, -0.2f};
    struct sampling sampling = plain;

    sampling.top_k = 1;
    expect_kept(logits, sampling, "001000");
    sampling.top_k = 2;
    expect_kept(logits, sampling, "101100");
    sampling.top_k = 4;
    expect_kept(logits, sampling, "111100");
    sampling.top_k = 6;
    expect_kept(logits, sampling, "111111");
    sampling.top_k = 0;
    expect_kept(logits, sampling, "111111");
}

Test(sample, top_p_keeps_the_smallest_set_that_reaches_p)
{
    /* Probabilities 0.1, 0.4, 0.2, 0.3 */
    const float logits[4] = {logf(0.1f), logf(0.4f), logf(0.2f), logf(0.3f)};
    struct sampling sampling = plain;

    sampling.top_p = 1e-6f;
    expect_kept(logits, sampling, "0100");
    sampling.top_p = 0.39f;
    expect_kept(logits, sampling, "0100");
    sampling.top_p = 0.41f;
    expect_kept(logits, sampling, "0101");
    sampling.top_p = 0.69f;
    expect_kept(logits, sampling, "0101");
    sampling.top_p = 0.71f;
    expect_kept(logits, sampling, "0111");
    sampling.top_p = 0.91f;
    expect_kept(logits, sampling, "1111");
    sampling.top_k = 2; /* of 0.7 that are left, 0.4 are more than half */
    sampling.top_p = 0.5f;
    expect_kept(logits, sampling, "0100");
    sampling.top_p = 0.6f;
    expect_kept(logits, sampling, "0101");
}

/* Probabilities in proportion to e^-av: the first n have (1 - e^-an) / (1 - e^-aV) of them. */
static void check_wide(int V, double top_p)
{
    enum { Q = 16 };
    const double a = 1e-6, n = -log(1 - top_p * (1 - exp(-a * V))) / a;
    float *logits = zeros((size_t)Q * (size_t)V, sizeof *logits);
    struct sampling sampling[Q];
    int32_t ids[Q], most = 0;

    for (int q = 0; q < Q; q++) {
        sampling[q] = plain;
        sampling[q].top_p = (float)top_p;
        sampling[q].draw = (uint32_t)q;
        for (int v = 0; v < V; v++) logits[(size_t)q * (size_t)V + (size_t)v] = (float)(-a * v);
    }
    sample(ids, logits, sampling, Q, V);
    for (int q = 0; q < Q; q++) {
        cr_expect_lt(ids[q], n + 100, "%d of %d", ids[q], V); /* weights are rounded */
        if (ids[q] > most) most = ids[q];
    }
    cr_expect_gt(most, 0.7 * n); /* 16 draws over all that is kept */
    free(logits);
}

Test(sample, top_p_keeps_the_smallest_set_of_a_wide_row)
{
    check_wide(150000, 0.5);
    check_wide(250001, 0.5);
    check_wide(250000, 0.9);
}

Test(sample, min_p_is_relative_to_the_largest)
{
    const float logits[4] = {logf(0.1f), logf(0.4f), logf(0.2f), logf(0.3f)};
    struct sampling sampling = plain;

    sampling.min_p = 0.24f;
    expect_kept(logits, sampling, "1111");
    sampling.min_p = 0.26f;
    expect_kept(logits, sampling, "0111");
    sampling.min_p = 0.6f;
    expect_kept(logits, sampling, "0101");
    sampling.min_p = 1;
    expect_kept(logits, sampling, "0100");
    sampling.min_p = 0.26f;
    sampling.temperature = 2; /* square roots: 0.5 of the largest for 0.1 */
    expect_kept(logits, sampling, "1111");
}

/* A naive top_k, top_p and min_p by sorting: kept[v]. */
struct token {
    double probability;
    int id;
};

static int descending(const void *a, const void *b)
{
    const double x = ((const struct token *)a)->probability;
    const double y = ((const struct token *)b)->probability;
    return x < y ? 1 : x > y ? -1 : 0;
}

Test(sample, never_draws_outside_what_sorting_keeps)
{
    enum { V = 3000 };
    struct numbers numbers = {4};
    struct token *tokens = zeros(V, sizeof *tokens);

    for (int round = 0; round < 40; round++) {
        float *logits = next_floats(&numbers, V, DTYPE_F32);
        struct sampling sampling = plain;
        sampling.temperature = 0.1f + 0.02f * (float)round;
        sampling.top_k = round % 3 ? next_int(&numbers, 1, 100) : 0;
        sampling.top_p = round % 2 ? 0.3f + 0.01f * (float)round : 1;
        sampling.min_p = round % 5 ? 0 : 0.5f;
        double max = -1e30, all = 0;
        for (int v = 0; v < V; v++) {
            logits[v] *= 3;
            if ((double)logits[v] > max) max = (double)logits[v];
        }
        for (int v = 0; v < V; v++)
            tokens[v] =
                (struct token){exp(((double)logits[v] - max) / (double)sampling.temperature), v};
        qsort(tokens, V, sizeof *tokens, descending);
        int n_kept = sampling.top_k ? sampling.top_k : V;
        for (int i = 0; i < n_kept; i++) all += tokens[i].probability;
        double sum = 0;
        for (int i = 0; i < n_kept; i++) {
            sum += tokens[i].probability;
            /* One more than the exact place: the sums differ in the last bits. */
            if (sum >= (double)sampling.top_p * all * (1 + 1e-6)) n_kept = i + 1;
        }
        for (int draw = 0; draw < 5; draw++) {
            int32_t id;
            int place = 0;
            sampling.draw = (uint32_t)draw;
            sampling.seed = (uint64_t)round;
            sample(&id, logits, &sampling, 1, V);
            while (place < V && tokens[place].id != id) place++;
            cr_assert_lt(place, n_kept);
            cr_assert(tokens[place].probability >= (double)sampling.min_p * (1 - 1e-6));
        }
        free(logits);
    }
    free(tokens);
}

/* ---- the draw, by sorting in double ---------------------------------------------------------- */

static const int32_t some_history[] = {3, 17, 400, 17, 90, 3, 250, 17, 90, 301};
enum { SOME = sizeof some_history / sizeof *some_history, SOME_PROMPT = 4 };

/* Logits of several kinds: none but few can be left out by their value, some by their place. */
enum { FLAT, WIDE, RISING, MASKED, ONE_LARGE, IN_STEPS, PENALIZED, KINDS };

static float logit_of_kind(int kind, struct numbers *numbers, int v, int V)
{
    const float bell = next_float(numbers) + next_float(numbers) + next_float(numbers);
    switch (kind) {
    case FLAT:
        return 0.01f * bell;
    case RISING:
        return 15.0f * (float)v / (float)V + bell;
    case MASKED:
        return next_int(numbers, 0, 99) ? -INFINITY : bell;
    case ONE_LARGE:
        return v == V / 3 ? 12.0f : bell;
    case IN_STEPS:
        return rintf(bell);
    default:
        return 3.0f * bell;
    }
}

/* The logits as some_history penalizes them. */
static void penalize_naively(double *logits, const struct sampling *sampling)
{
    for (int i = 0; i < SOME; i++) {
        int before = 0, in_output = 0;
        for (int j = 0; j < SOME; j++) {
            before += j < i && some_history[j] == some_history[i];
            in_output += j >= SOME_PROMPT && some_history[j] == some_history[i];
        }
        if (before) continue;
        double *logit = &logits[some_history[i]];
        const double penalty = (double)sampling->repetition_penalty;
        *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
        if (in_output)
            *logit -= (double)sampling->presence_penalty +
                      (double)sampling->frequency_penalty * in_output;
    }
}

/* The token that is drawn, or -1 where rounding may decide. tokens[i]: the i-th likeliest. */
static int naive_draw(const struct token *tokens, int V, const struct sampling *sampling)
{
    double all = 0, through = 0, best = -INFINITY, second = -INFINITY;
    double sum = 0; /* of what is likelier than token i */
    int id = -1, is_open = 0;

    for (int i = 0; i < V; i++) all += tokens[i].probability;
    for (int i = 0; i < V && tokens[i].probability > 0; i++) {
        if (i > 0) through += tokens[i - 1].probability;
        if (i > 0 && tokens[i].probability < tokens[i - 1].probability) sum = through;
        const double share = (double)sampling->top_p * all;
        if (sampling->top_p < 1 && sum > 0 && sum >= share * (1 + 1e-4)) break;
        if (tokens[i].probability < (double)sampling->min_p) break;
        const uint32_t counter[4] = {(uint32_t)tokens[i].id / 4, sampling->draw, 0, 0};
        uint32_t words[4];
        philox4x32(words, counter, sampling->seed);
        const double w = ((double)words[tokens[i].id % 4] + 0.5) * 0x1p-32;
        const double value = log(tokens[i].probability) - log(-log1p(-w));
        if (value <= second) continue;
        second = value;
        if (value <= best) continue;
        second = best;
        best = value;
        id = tokens[i].id;
        is_open = sampling->top_p < 1 && sum > share * (1 - 1e-4);
    }
    return is_open || best - second < 1e-3 ? -1 : id;
}

static void check_draws(int V)
{
    static const struct {
        float top_p, min_p;
    } ways[] = {{1, 0}, {0.9f, 0}, {0.5f, 0}, {0.99f, 0}, {0.1f, 0}, {1, 0.1f}, {0.9f, 0.02f}};
    enum { WAYS = sizeof ways / sizeof *ways, Q = KINDS * WAYS };
    struct numbers numbers = {(uint64_t)V};
    struct sampling sampling[Q];
    float *logits = zeros((size_t)Q * (size_t)V, sizeof *logits);
    double *wanted = zeros((size_t)V, sizeof *wanted);
    struct token *tokens = zeros((size_t)V, sizeof *tokens);
    int32_t history[WAYS * SOME], start[Q + 1] = {0}, n_prompt[Q] = {0}, ids[Q];
    int n_open = 0;

    for (int q = 0; q < Q; q++) {
        sampling[q] = plain;
        sampling[q].temperature = 0.7f;
        sampling[q].top_p = ways[q % WAYS].top_p;
        sampling[q].min_p = ways[q % WAYS].min_p;
        sampling[q].seed = next_word(&numbers);
        sampling[q].draw = (uint32_t)q;
        start[q + 1] = start[q];
        if (q / WAYS == PENALIZED) {
            memcpy(history + start[q], some_history, sizeof some_history);
            start[q + 1] += SOME;
            n_prompt[q] = SOME_PROMPT;
            sampling[q].repetition_penalty = 1.5f;
            sampling[q].presence_penalty = -4;
            sampling[q].frequency_penalty = 0.5f;
        }
        float *row = logits + (size_t)q * (size_t)V;
        if (q % WAYS > 0) /* as the row before */
            memcpy(row, row - V, (size_t)V * sizeof *row);
        else
            for (int v = 0; v < V; v++) row[v] = logit_of_kind(q / WAYS, &numbers, v, V);
    }
    const struct sample_view view = {
        .Q = Q,
        .sampling = upload(sampling, sizeof sampling),
        .history = upload(history, sizeof history),
        .history_start = upload(start, sizeof start),
        .n_prompt = upload(n_prompt, sizeof n_prompt),
    };
    int32_t *out = device_memory(sizeof ids);
    dev->ops->sample(dev, out, upload(logits, (size_t)Q * (size_t)V * sizeof *logits), &view, V);
    download(ids, out, sizeof ids);

    for (int q = 0; q < Q; q++) {
        if (q % WAYS == 0) {
            double max = -INFINITY;
            for (int v = 0; v < V; v++)
                wanted[v] = (double)logits[(size_t)q * (size_t)V + (size_t)v];
            if (q / WAYS == PENALIZED) penalize_naively(wanted, &sampling[q]);
            for (int v = 0; v < V; v++) max = fmax(max, wanted[v]);
            for (int v = 0; v < V; v++)
                tokens[v] =
                    (struct token){exp((wanted[v] - max) / (double)sampling[q].temperature), v};
            qsort(tokens, (size_t)V, sizeof *tokens, descending);
        }
        const int want = naive_draw(tokens, V, &sampling[q]);
        n_open += want < 0;
        cr_expect(want < 0 || ids[q] == want, "kind %d, way %d of %d: %d, not %d", q / WAYS,
                  q % WAYS, V, ids[q], want);
    }
    cr_expect_lt(n_open, Q / 10);
    free(logits);
    free(wanted);
    free(tokens);
}

Test(sample, draws_what_sorting_and_the_same_noise_draw)
{
    check_draws(128256);
    check_draws(50257); /* rows that do not begin at 16 bytes */
}

Test(sample, draws_what_sorting_draws_from_few)
{
    check_draws(2000);
    check_draws(502);
}

Test(sample, draws_the_same_whatever_shares_the_batch)
{
    enum { Q = 37, V = 501 };
    struct numbers numbers = {5};
    float *logits = next_floats(&numbers, Q * V, DTYPE_F32);
    struct sampling sampling[Q];
    int32_t all[Q], other = 0;

    for (int q = 0; q < Q; q++) {
        sampling[q] = plain;
        sampling[q].seed = next_word(&numbers);
        sampling[q].draw = (uint32_t)q;
        sampling[q].top_k = q % 3 ? 0 : 40;
        sampling[q].top_p = q % 2 ? 1 : 0.9f;
    }
    sample(all, logits, sampling, Q, V);
    for (int q = 0; q < Q; q++) {
        int32_t alone;
        sample(&alone, logits + q * V, &sampling[q], 1, V);
        cr_expect_eq(alone, all[q]);
        sampling[q].seed++;
        sample(&alone, logits + q * V, &sampling[q], 1, V);
        other += alone != all[q];
    }
    cr_expect_gt(other, Q / 2); /* and differently for another seed */
    free(logits);
}

Test(sample, penalizes_the_history)
{
    /* History of row 0: prompt 0 1 0, output 1 2 2. Row 1 has none. */
    const float logits[2][5] = {{4, 4, -1, 1.9f, 0}, {4, 4, 5, 1.9f, 0}};
    const int32_t history[6] = {0, 1, 0, 1, 2, 2}, history_start[3] = {0, 6, 6};
    const int32_t n_prompt[2] = {3, 0};
    struct sampling sampling[2] = {greedy, greedy};
    /* Greedy tells which is the largest of what the penalties leave of 4, 4, -1 and `third`. */
    /* clang-format off */
    static const struct {
        float repetition, presence, frequency, third;
        int32_t want;
    } cases[] = {
        {2, 0, 0, 1.9f, 0},       /* 2 2 -2: each of the history once, however often it is there */
        {2, 0, 0, 2.1f, 3},
        {1, 2, 0, 3.9f, 0},       /* 4 2 -3: only what was generated                             */
        {1, 0, 1.5f, 3.9f, 0},    /* 4 2.5 -4                                                    */
        {1, -7, 0, 4.5f, 1},      /* 4 11 6                                                      */
        {1, 0, -7, 4.5f, 2},      /* 4 11 13: times the count                                    */
        {4, 0, -3, 3.5f, 1},      /* 1 1 -4, then 1 4 2                                          */
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        float rows[2][5];
        int32_t ids[2];
        memcpy(rows, logits, sizeof rows);
        rows[0][3] = cases[i].third;
        sampling[0].repetition_penalty = cases[i].repetition;
        sampling[0].presence_penalty = cases[i].presence;
        sampling[0].frequency_penalty = cases[i].frequency;
        const struct sample_view view = {
            2, upload(sampling, sizeof sampling), upload(history, sizeof history),
            upload(history_start, sizeof history_start), upload(n_prompt, sizeof n_prompt)};
        const float *given = upload(rows, sizeof rows);
        int32_t *out = device_memory(sizeof ids);
        float after[2][5];

        for (int twice = 0; twice < 2; twice++) { /* counts are zeros again */
            dev->ops->sample(dev, out, given, &view, 5);
            download(ids, out, sizeof ids);
            cr_expect_eq(ids[0], cases[i].want, "case %zu: token %d", i, ids[0]);
            cr_expect_eq(ids[1], 2);
        }
        download(after, given, sizeof after);
        cr_expect_arr_eq(after, rows, sizeof rows); /* the logits are not changed */
    }
}
