/* The profile of an engine: there when it was asked for, and without effect on what is generated. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <string.h>

#include "tests/engine/harness.h"

static struct answer plain, timed;

static json_t *profile(mlora_engine *engine)
{
    char *text;

    cr_assert_eq(mlora_engine_profile(engine, &text), MLORA_OK, "%s", mlora_error());
    json_t *lines = json_loads(text, 0, NULL);
    mlora_free(text);
    cr_assert(json_is_array(lines));
    return lines;
}

Test(profile, has_to_be_asked_for)
{
    char *text = (char *)&plain;
    mlora_engine *engine = open_model(LLAMA2);

    cr_expect_eq(mlora_engine_profile(engine, &text), MLORA_EINVAL);
    cr_expect_str_eq(mlora_error(), "there is no profile: open the engine with option profile 1");
    cr_expect_null(text);
    mlora_close(engine);
}

Test(profile, changes_no_token_and_counts_every_op)
{
    mlora_options options = options_for(LLAMA2);
    mlora_info info;
    size_t i;
    const json_t *line;
    long long n_norms = 0;

    options.profile = 1;
    mlora_engine *engine = open_engine(&options);
    load_adapter(engine, LLAMA2, "sql");
    mlora_engine_info(engine, &info);
    mlora_request request = greedy("sql", "How many owls live near the bridge?\n", 4, &plain);
    submit(engine, &request);
    run_all(engine);
    json_t *lines = profile(engine);
    cr_expect_eq(json_array_size(lines), 0, "there was no call before");
    json_decref(lines);

    request = greedy("sql", "How many owls live near the bridge?\n", 4, &timed);
    submit(engine, &request);
    run_all(engine);
    expect_same_answer(&timed, &plain, "with its ops timed");
    lines = profile(engine);
    json_array_foreach(lines, i, line)
    {
        if (strstr(json_string_value(json_object_get(line, "op")), "add_rms_norm"))
            n_norms += json_integer_value(json_object_get(line, "calls"));
        cr_expect_geq(json_number_value(json_object_get(line, "seconds")), 0);
    }
    /* one step for the prompt and its first token, then one for each other token */
    cr_expect_eq(n_norms, plain.n * (2 * info.n_layers + 1));
    json_decref(lines);
    mlora_close(engine);
}
