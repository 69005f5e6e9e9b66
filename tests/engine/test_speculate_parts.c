/* What guessing is made of: what to guess, how far, and whether it is worth it. */
#include "engine/speculate.h"

#include <criterion/criterion.h>

Test(speculate, ngram_guesses_what_followed_the_longest_suffix)
{
    int32_t tokens[16] = {1, 2, 3, 9, 8, 2, 3, 7, 5, 1, 2, 3};

    /* "1 2 3" stood at the start: longer than the later "2 3" */
    cr_assert_eq(ngram_draft(tokens, 12, 3), 3);
    cr_expect_arr_eq(tokens + 12, ((int32_t[]){9, 8, 2}), 3 * sizeof *tokens);
    /* of two places with as much in common the later one */
    int32_t again[8] = {4, 6, 4, 7, 4};
    cr_assert_eq(ngram_draft(again, 5, 1), 1);
    cr_expect_eq(again[5], 7);
}

Test(speculate, ngram_guesses_on_into_its_own_guess)
{
    int32_t tokens[8] = {5, 1, 2, 1, 2};

    cr_assert_eq(ngram_draft(tokens, 5, 3), 3);
    cr_expect_arr_eq(tokens + 5, ((int32_t[]){1, 2, 1}), 3 * sizeof *tokens);
}

Test(speculate, ngram_guesses_nothing_new)
{
    int32_t tokens[8] = {1, 2, 3, 4};

    cr_expect_eq(ngram_draft(tokens, 4, 4), 0);
    cr_expect_eq(ngram_draft(tokens, 1, 4), 0);
    tokens[0] = 4;
    cr_expect_eq(ngram_draft(tokens, 4, 0), 0);
    cr_expect_eq(tokens[4], 0, "nothing is written");
}

Test(speculate, guesses_reach_as_far_as_they_are_right)
{
    struct pace pace = {0};

    cr_expect_eq(pace_next(&pace, 8), 2);
    pace_learn(&pace, 2, 2);
    cr_expect_eq(pace_next(&pace, 8), 4);
    pace_learn(&pace, 4, 4);
    cr_expect_eq(pace_next(&pace, 5), 5, "no more than the bound");
    pace_learn(&pace, 5, 3);
    cr_expect_eq(pace_next(&pace, 8), 3);
}

Test(speculate, wrong_guesses_are_tried_again_ever_later)
{
    struct pace pace = {0};
    int waited = 0;

    for (int miss = 1; miss <= 10; miss++) {
        pace_learn(&pace, 1, 0);
        for (waited = 0; pace_next(&pace, 8) == 0; waited++) cr_assert_lt(waited, 100);
        cr_expect_eq(waited, miss < 6 ? 1 << miss : 64, "miss %d: %d steps", miss, waited);
    }
    cr_expect_eq(pace_next(&pace, 8), 1, "a short one first");
    pace_learn(&pace, 1, 1);
    pace_learn(&pace, 2, 0);
    for (waited = 0; pace_next(&pace, 8) == 0;) waited++;
    cr_expect_eq(waited, 2, "a right one forgives");
}

Test(speculate, rests_when_guesses_are_not_worth_it)
{
    struct speculation s = {.n_rows = 32, .longest = 4, .n_accepted = 1};

    speculate_judge(&s); /* 1 of 32 rows gained a token: less than 1 in 16 */
    cr_expect_eq(s.rest, 2);
    s.longest = 4;
    speculate_judge(&s);
    cr_expect_eq(s.rest, 4, "twice as long");
    speculate_judge(&s);
    cr_expect_eq(s.rest, 4, "a step is judged once");
    s.rest = 0;
    s.longest = 4;
    s.n_accepted = 2;
    speculate_judge(&s);
    cr_expect_eq(s.rest, 0);
    cr_expect_eq(s.misses, 0);

    /* four passes of a draft model of a tenth of the size: 32 (1/16 + 4/10) = 14.8 tokens */
    s.pass_cost = 0.1;
    s.longest = 4;
    s.n_accepted = 15;
    speculate_judge(&s);
    cr_expect_eq(s.rest, 0);
    s.longest = 4;
    s.n_accepted = 14;
    speculate_judge(&s);
    cr_expect_eq(s.rest, 2);
}

Test(speculate, is_judged_by_the_clock)
{
    struct speculation s = {.pass_cost = 9, .plain = 0, .n_rows = 10};

    speculate_clock(&s, 0.004);
    speculate_clock(&s, 0.008); /* plain steps: 5 ms of late */
    cr_expect_float_eq(s.plain, 0.005, 1e-12);
    s.longest = 4;
    speculate_clock(&s, 0.006); /* a fifth more: 2 tokens of 10 rows */
    cr_expect_float_eq(s.plain, 0.005, 1e-12);
    s.n_accepted = 2;
    speculate_judge(&s);
    cr_expect_eq(s.rest, 0);
    s.longest = 4;
    speculate_clock(&s, 0.0061);
    speculate_judge(&s);
    cr_expect_eq(s.rest, 2);
    /* one that seems to be faster than without is still not worth it where it gained nothing */
    s.rest = 0;
    s.before = s.n_accepted;
    s.longest = 1;
    speculate_clock(&s, 0.001);
    speculate_judge(&s);
    cr_expect_eq(s.rest, 4);
}

/* What guesses lose stays a small part of the time, whatever a draft model costs. */
Test(speculate, rests_as_long_as_what_was_lost_asks_for)
{
    struct speculation s = {.n_rows = 8};
    double plain = 0, lost = 0;

    speculate_clock(&s, 0.001);
    for (int i = 0; i < 20; i++) {
        s.longest = 4;
        speculate_clock(&s, 0.005); /* takes four plain steps more */
        s.before = s.n_accepted;
        s.n_accepted += 8; /* gains one: three are lost */
        speculate_judge(&s);
        plain += s.rest;
        lost += 3;
    }
    cr_expect_leq(lost, 0.02 * plain, "%g of %g", lost, plain);

    s.longest = 4;
    speculate_clock(&s, 100); /* the process was stopped, maybe */
    speculate_judge(&s);
    cr_expect_leq(s.rest, 512);
}

/* A step that may get guesses is not planned ahead: where none are found few steps are like that. */
Test(speculate, rests_when_there_is_nothing_to_guess)
{
    struct speculation s = {.mode = MLORA_SPECULATE_NGRAM};
    struct speculation always_late = {.mode = MLORA_SPECULATE_NGRAM};
    struct speculation behind = {.mode = MLORA_SPECULATE_DRAFT};

    speculate_looked(&always_late, false, false);
    cr_expect_eq(always_late.rest, 0);
    speculate_looked(&behind, false, true);
    cr_expect_eq(behind.rest, 0, "a draft model follows the prompt first");
    speculate_looked(&s, false, true);
    cr_expect_eq(s.rest, 2);
    for (int i = 0; i < 9; i++) speculate_looked(&s, false, true);
    cr_expect_eq(s.rest, 8, "no longer: looking is cheap");
    s.rest = 0;
    speculate_looked(&s, true, true);
    cr_expect_eq(s.rest, 0);
    speculate_looked(&s, false, true);
    cr_expect_eq(s.rest, 2, "what was found forgives");
}

Test(speculate, counts_guesses_up_to_the_first_wrong_one)
{
    const int32_t drawn[5] = {3, 4, 5, 6, 7};

    cr_expect_eq(count_accepted((int32_t[]){3, 4, 5, 6}, drawn, 4), 4);
    cr_expect_eq(count_accepted((int32_t[]){3, 4, 9, 6}, drawn, 4), 2, "the last one is by chance");
    cr_expect_eq(count_accepted((int32_t[]){9, 4, 5, 6}, drawn, 4), 0);
    cr_expect_eq(count_accepted(NULL, drawn, 0), 0);
}
