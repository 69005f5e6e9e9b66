/* The rotary embedding: from config.json to the angle by which each pair of elements turns per
 * position. Everything but "default" stretches the angles so that a model trained on a short
 * context works on a longer one. */
#include "model/rope.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/error.h"
#include "model/fields.h"

/* ---- config.json -------------------------------------------------------------------------- */

static mlora_status parse_kind(enum rope_kind *out, struct fields *rope)
{
    static const char *const names[] = {[ROPE_DEFAULT] = "default",
                                        [ROPE_LINEAR] = "linear",
                                        [ROPE_LLAMA3] = "llama3",
                                        [ROPE_YARN] = "yarn"};

    const char *name = field_string(rope, "rope_type", field_string(rope, "type", "default"));
    if (rope->status != MLORA_OK) return rope->status;
    for (size_t kind = 0; kind < sizeof names / sizeof names[0]; kind++)
        if (strcmp(name, names[kind]) == 0) {
            *out = (enum rope_kind)kind;
            return MLORA_OK;
        }
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: rope_type \"%.40s\" is not served; served are default, linear, llama3 "
                     "and yarn",
                     rope->path, name);
}

/* Parameters that a kind we serve would have to obey, or that mean another kind. An object is a
 * set of parameters for some of the layers. */
static mlora_status refuse_parameters(const struct fields *rope)
{
    static const char *const keys[] = {"short_factor",        "long_factor",   "short_mscale",
                                       "long_mscale",         "mrope_section", "mrope_interleaved",
                                       "llama_4_scaling_beta"};
    char text[80];

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        const json_t *value = json_object_get(rope->object, keys[i]);
        if (!json_is_neutral(value))
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: %s is %s: it changes the rotary embedding and is not served",
                             rope->path, keys[i], json_short_text(value, text, sizeof text));
    }
    const json_t *partial = json_object_get(rope->object, "partial_rotary_factor");
    if (!json_is_neutral(partial) && json_number_value(partial) != 1.0)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: partial_rotary_factor is %s, served is 1: heads that turn as a whole",
                         rope->path, json_short_text(partial, text, sizeof text));

    for (void *it = json_object_iter((json_t *)rope->object); it;
         it = json_object_iter_next((json_t *)rope->object, it))
        if (json_is_object(json_object_iter_value(it)))
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: %.80s is an object: a rotary embedding that differs from layer "
                             "to layer is not served",
                             rope->path, json_object_iter_key(it));
    return MLORA_OK;
}

static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1.0 ? 1.0 : 0.1 * mscale * log(factor) + 1.0;
}

static void parse_yarn(struct rope_config *out, struct fields *rope)
{
    out->beta_fast = field_double(rope, "beta_fast", 32.0, 0.0, 1e6);
    out->beta_slow = field_double(rope, "beta_slow", 1.0, 0.0, 1e6);
    if (out->beta_fast == 0.0) out->beta_fast = 32.0; /* 0 means the default in transformers */
    if (out->beta_slow == 0.0) out->beta_slow = 1.0;
    out->truncate = field_bool(rope, "truncate", true);

    const double mscale = field_double(rope, "mscale", 0.0, 0.0, 100.0);
    const double mscale_all = field_double(rope, "mscale_all_dim", 0.0, 0.0, 100.0);
    double amplitude = yarn_mscale(out->factor, 1.0);
    if (mscale != 0.0 && mscale_all != 0.0)
        amplitude = yarn_mscale(out->factor, mscale) / yarn_mscale(out->factor, mscale_all);
    out->attention_factor = field_double(rope, "attention_factor", amplitude, 0.0, 1e3);
}

mlora_status rope_parse(struct rope_config *out, const json_t *config, int max_position,
                        const char *path)
{
    /* As in transformers: the old key wins, unless it says nothing; null parameters are none. */
    const char *key = json_is_neutral(json_object_get(config, "rope_scaling")) ? "rope_parameters"
                                                                               : "rope_scaling";
    const json_t *object = json_object_get(config, key);
    char where[1024];

    if (object && !json_is_null(object) && !json_is_object(object))
        return error_set(MLORA_EFORMAT, "%s: %s is %s, an object or null is needed", path, key,
                         json_kind(object));
    snprintf(where, sizeof where, "%s: %s", path, key);
    struct fields top = {config, path, MLORA_OK};
    struct fields rope = {object, where, MLORA_OK}; /* jansson finds no key in NULL */

    mlora_status status = parse_kind(&out->kind, &rope);
    if (status != MLORA_OK) return status;
    status = refuse_parameters(&rope);
    if (status != MLORA_OK) return status;

    const double theta_min = 2.0, theta_max = 1e15;
    const double theta = field_double(&top, "rope_theta", 10000.0, theta_min, theta_max);
    /* Phi-3 and others keep it at the top, where it wins. */
    const double original = field_double(&top, "original_max_position_embeddings", 0.0, 1.0, 1e9);
    if (top.status != MLORA_OK) return top.status;

    out->theta = field_double(&rope, "rope_theta", theta, theta_min, theta_max);
    out->factor = 1.0;
    out->attention_factor = 1.0;
    if (out->kind != ROPE_DEFAULT) out->factor = field_need_double(&rope, "factor", 1e-3, 1e6);
    if (out->kind == ROPE_LLAMA3 || out->kind == ROPE_YARN) {
        out->original_max_position =
            field_double(&rope, "original_max_position_embeddings", max_position, 1.0, 1e9);
        if (original != 0.0) out->original_max_position = original;
    }
    if (out->kind == ROPE_YARN) parse_yarn(out, &rope);
    if (out->kind == ROPE_LLAMA3) {
        out->low_freq_factor = field_need_double(&rope, "low_freq_factor", 1e-6, 1e6);
        out->high_freq_factor = field_need_double(&rope, "high_freq_factor", 1e-6, 1e6);
        if (rope.status == MLORA_OK && out->high_freq_factor <= out->low_freq_factor)
            return error_set(MLORA_EFORMAT,
                             "%s: high_freq_factor is %g, must be greater than low_freq_factor, "
                             "which is %g",
                             where, out->high_freq_factor, out->low_freq_factor);
    }
    return rope.status;
}

/* ---- frequencies -------------------------------------------------------------------------- */

/* Llama 3.1: with w = 2 pi / f positions a turn, and C the context of the training before,
 *   w > C / low:  f / factor           slow pairs are stretched
 *   w < C / high: f                    fast ones stay
 *   between:      (1 - s) f / factor + s f,   s = (C / w - low) / (high - low) */
static float llama3_frequency(const struct rope_config *rope, float f)
{
    const float factor = (float)rope->factor;
    const float context = (float)rope->original_max_position;
    const float low = (float)rope->low_freq_factor, high = (float)rope->high_freq_factor;
    const float w = (float)(2.0 * M_PI) / f;

    if (w > (float)(rope->original_max_position / rope->low_freq_factor)) return f / factor;
    if (w < (float)(rope->original_max_position / rope->high_freq_factor)) return f;
    const float s = (context / w - low) / (high - low);
    return (1.0f - s) * f / factor + s * f;
}

/* The pair, counted in elements, that makes `turns` turns within the original context. */
static double yarn_pair(const struct rope_config *rope, double turns, int d)
{
    return d * log(rope->original_max_position / (turns * 2.0 * M_PI)) / (2.0 * log(rope->theta));
}

/* The pairs between which YaRN's ramp rises, counted and clamped as transformers does it. */
static void yarn_ramp(double *from, double *to, const struct rope_config *rope, int d)
{
    *from = yarn_pair(rope, rope->beta_fast, d);
    *to = yarn_pair(rope, rope->beta_slow, d);
    if (rope->truncate) {
        *from = floor(*from);
        *to = ceil(*to);
    }
    *from = fmax(*from, 0.0);
    *to = fmin(*to, d - 1);
    if (*from == *to) *to += 0.001; /* a step, without a division by zero */
}

/* With f_i = theta^(-2 i / d):
 *   default  f_i
 *   linear   f_i / factor
 *   llama3   above
 *   yarn     (arXiv:2309.00071) r f_i / factor + (1 - r) f_i, r rising from 0 to 1 along the ramp
 * Every step is rounded to f32, as in transformers: at position 100000 a difference in the last
 * bit is a hundredth of a radian. */
void model_config_rope(const struct model_config *config, float *frequency)
{
    const struct rope_config *rope = &config->rope;
    const int d = config->head_dim;
    const float factor = (float)rope->factor;
    double from = 0.0, to = 0.0;

    if (rope->kind == ROPE_YARN) yarn_ramp(&from, &to, rope, d);
    for (int i = 0; i < d / 2; i++) {
        const float exponent = (float)(2 * i) / (float)d;
        const float period = (float)pow((float)rope->theta, exponent); /* in turns of 2 pi */
        const float f = 1.0f / period;

        if (rope->kind == ROPE_DEFAULT) frequency[i] = f;
        if (rope->kind == ROPE_LINEAR) frequency[i] = f / factor;
        if (rope->kind == ROPE_LLAMA3) frequency[i] = llama3_frequency(rope, f);
        if (rope->kind == ROPE_YARN) {
            const float at = ((float)i - (float)from) / (float)(to - from);
            const float keep = 1.0f - fminf(fmaxf(at, 0.0f), 1.0f);
            frequency[i] = 1.0f / (factor * period) * (1.0f - keep) + f * keep;
        }
    }
}
