#include "tokenizer/added.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tokenizer/unicode.h"

/* ---- building ----------------------------------------------------------------------------- */

static int compare(const struct added_token *a, const struct added_token *b)
{
    const size_t shorter =
        a->pattern_bytes < b->pattern_bytes ? a->pattern_bytes : b->pattern_bytes;
    const int order = memcmp(a->pattern, b->pattern, shorter);
    if (order != 0) return order;
    return a->pattern_bytes < b->pattern_bytes ? -1 : a->pattern_bytes > b->pattern_bytes;
}

static int compare_indices(const void *a, const void *b, void *tokens)
{
    const struct added_token *all = tokens;
    return compare(&all[*(const int *)a], &all[*(const int *)b]);
}

mlora_status added_search_build(struct added_search *out, const struct added *added,
                                bool normalized)
{
    *out = (struct added_search){0};
    out->order = malloc(((size_t)added->n + 1) * sizeof *out->order);
    if (!out->order) return error_set(MLORA_ENOMEM, "out of memory: %d added tokens", added->n);
    for (int i = 0; i < added->n; i++) {
        const struct added_token *token = &added->tokens[i];
        if (token->normalized != normalized) continue;
        if (token->pattern_bytes == 0 || token->pattern_bytes > ADDED_BYTES_MAX)
            return error_set(MLORA_EFORMAT,
                             "added token \"%.64s\" is %zu bytes long, must be 1 to %d",
                             token->text, token->pattern_bytes, ADDED_BYTES_MAX);
        out->order[out->n++] = i;
    }
    qsort_r(out->order, (size_t)out->n, sizeof *out->order, compare_indices, added->tokens);

    for (int i = 0; i < out->n; i++) {
        const struct added_token *token = &added->tokens[out->order[i]];
        if (i > 0 && compare(&added->tokens[out->order[i - 1]], token) == 0)
            return error_set(MLORA_EFORMAT, "added token \"%.64s\" is listed twice", token->text);
        out->first[(unsigned char)token->pattern[0] + 1] = i + 1;
    }
    for (int b = 1; b <= 256; b++)
        if (out->first[b] < out->first[b - 1]) out->first[b] = out->first[b - 1];
    return MLORA_OK;
}

void added_search_free(struct added_search *search)
{
    free(search->order);
    *search = (struct added_search){0};
}

void added_free(struct added *added)
{
    for (int i = 0; i < added->n; i++) {
        free(added->tokens[i].text);
        free(added->tokens[i].pattern);
    }
    free(added->tokens);
    *added = (struct added){0};
}

/* ---- searching ---------------------------------------------------------------------------- */

/* The first pattern in order[low, high) whose byte number `depth` is at least `byte`. */
static int lower_bound(const struct added_search *search, const struct added *added, int low,
                       int high, size_t depth, int byte)
{
    while (low < high) {
        const int middle = low + (high - low) / 2;
        const struct added_token *token = &added->tokens[search->order[middle]];
        const int at = depth < token->pattern_bytes ? (unsigned char)token->pattern[depth] : -1;
        if (at < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Whether the scope lets a token be the `bytes` at `start`. */
static bool in_scope(const struct added_scope *scope, const struct added_token *token, size_t start)
{
    if (!scope || !scope->written || !token->special) return true;
    return !memchr(scope->written + start, 0, token->pattern_bytes);
}

static int longest_at(const struct added_search *search, const struct added *added,
                      const char *text, size_t bytes, size_t start, const struct added_scope *scope)
{
    if (start >= bytes) return -1;
    int low = search->first[(unsigned char)text[start]];
    int high = search->first[(unsigned char)text[start] + 1];
    int best = -1;

    for (size_t depth = 1; low < high; depth++) {
        /* order[low, high) share text[start, start + depth); the shortest comes first */
        const int index = search->order[low];
        if (added->tokens[index].pattern_bytes == depth) {
            if (in_scope(scope, &added->tokens[index], start)) best = index;
            low++;
        }
        if (start + depth >= bytes) break;
        const int byte = (unsigned char)text[start + depth];
        low = lower_bound(search, added, low, high, depth, byte);
        high = lower_bound(search, added, low, high, depth, byte + 1);
    }
    return best;
}

int added_longest(const struct added_search *search, const struct added *added, const char *text,
                  size_t bytes)
{
    return longest_at(search, added, text, bytes, 0, NULL);
}

/* Whether a token at [start, end) touches a word character. */
static bool beside_word(const char *text, size_t bytes, size_t start, size_t end)
{
    uint32_t c;
    if (start > 0 && utf8_decode_back(text, start, &c) && (unicode_classes(c) & UNICODE_WORD))
        return true;
    return utf8_decode(text + end, bytes - end, &c) && (unicode_classes(c) & UNICODE_WORD);
}

bool added_next(const struct added_search *search, const struct added *added, const char *text,
                size_t bytes, const struct added_scope *scope, size_t taken, size_t *position,
                struct added_span *out)
{
    uint32_t c;

    if (search->n == 0) return false;
    for (size_t start = *position; start < bytes;) {
        const int index = longest_at(search, added, text, bytes, start, scope);
        if (index < 0) {
            start++;
            continue;
        }
        const struct added_token *token = &added->tokens[index];
        size_t end = start + token->pattern_bytes;
        if ((scope->plain && token->special) ||
            (token->single_word && beside_word(text, bytes, start, end))) {
            start = end; /* the reference goes on behind a match that it does not take */
            continue;
        }
        *position = end;
        if (token->lstrip) {
            if (start < taken) start = taken; /* rstrip of the token before has reached it */
            while (start > taken) {
                const size_t n = utf8_decode_back(text, start, &c);
                if (!(unicode_classes(c) & UNICODE_SPACE) || n > start - taken) break;
                start -= n;
            }
        }
        if (token->rstrip)
            for (size_t n; (n = utf8_decode(text + end, bytes - end, &c)) &&
                           (unicode_classes(c) & UNICODE_SPACE);)
                end += n;
        if (start >= end) { /* nothing is left of it, and the reference gives no token then */
            start = *position;
            continue;
        }
        *out = (struct added_span){start, end, token->id};
        return true;
    }
    return false;
}
