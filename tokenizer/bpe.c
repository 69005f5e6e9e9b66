#include "tokenizer/bpe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tokenizer/unicode.h"

/* ---- merges ------------------------------------------------------------------------------- */

/* The slot of a pair, or the free one where it belongs. */
static struct merge *merge_slot(const struct bpe *bpe, int32_t left, int32_t right)
{
    const uint32_t mask = bpe->n_slots - 1;
    const uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint32_t slot = (uint32_t)hash_u64(key, bpe->vocab.seed) & mask;
    while (bpe->merges[slot].left >= 0 &&
           (bpe->merges[slot].left != left || bpe->merges[slot].right != right))
        slot = (slot + 1) & mask;
    return &bpe->merges[slot];
}

mlora_status bpe_reserve_merges(struct bpe *bpe, size_t n)
{
    if (n > UINT32_MAX / 4) return error_set(MLORA_EFORMAT, "%zu merges are too many", n);
    uint32_t n_slots = 64;
    while (n_slots < 2 * n) n_slots *= 2;
    bpe->merges = malloc(n_slots * sizeof *bpe->merges);
    if (!bpe->merges) return error_set(MLORA_ENOMEM, "out of memory: %zu merges", n);
    for (uint32_t i = 0; i < n_slots; i++) bpe->merges[i] = (struct merge){.left = -1};
    bpe->n_slots = n_slots;
    return MLORA_OK;
}

/* The id of a merge's part or result, or EFORMAT. */
static mlora_status find_part(int32_t *id, const struct bpe *bpe, const char *text, size_t bytes,
                              uint32_t rank)
{
    *id = vocab_find(&bpe->vocab, text, bytes);
    if (*id >= 0) return MLORA_OK;
    return error_set(MLORA_EFORMAT,
                     "merges[%u] needs the token \"%.*s\", which model.vocab does not have", rank,
                     bytes < 64 ? (int)bytes : 64, text);
}

mlora_status bpe_add_merge(struct bpe *bpe, uint32_t rank, const char *left, size_t left_bytes,
                           const char *right, size_t right_bytes)
{
    char short_text[256]; /* one allocation for each of 280,000 merges would be felt */
    const size_t bytes = left_bytes + right_bytes;
    char *whole = bytes <= sizeof short_text ? short_text : malloc(bytes);
    struct merge merge = {.rank = rank};

    if (!whole) return error_set(MLORA_ENOMEM, "out of memory: a token of %zu bytes", bytes);
    memcpy(whole, left, left_bytes);
    memcpy(whole + left_bytes, right, right_bytes);

    mlora_status status = find_part(&merge.left, bpe, left, left_bytes, rank);
    if (status == MLORA_OK) status = find_part(&merge.right, bpe, right, right_bytes, rank);
    if (status == MLORA_OK) status = find_part(&merge.result, bpe, whole, bytes, rank);
    if (status == MLORA_OK) *merge_slot(bpe, merge.left, merge.right) = merge;
    if (whole != short_text) free(whole);
    return status;
}

static const char mark[] = "\xe2\x96\x81"; /* U+2581, a space in SentencePiece's vocabularies */
enum { MARK_BYTES = 3 };

static bool starts_with_mark(const char *text, size_t bytes)
{
    return bytes >= MARK_BYTES && memcmp(text, mark, MARK_BYTES) == 0;
}

static bool ends_with_mark(const char *text, size_t bytes)
{
    return bytes >= MARK_BYTES && memcmp(text + bytes - MARK_BYTES, mark, MARK_BYTES) == 0;
}

/* Whether a symbol that ends without a mark never merges with one that begins with it. */
static bool is_separable(const struct bpe *bpe)
{
    size_t bytes;
    const char *text;

    if (vocab_find(&bpe->vocab, mark, MARK_BYTES) < 0) return false;
    text = vocab_text(&bpe->vocab, bpe->unknown, &bytes); /* stands for other characters */
    if (text && ends_with_mark(text, bytes)) return false;
    for (uint32_t i = 0; i < bpe->n_slots; i++) {
        if (bpe->merges[i].left < 0) continue;
        text = vocab_text(&bpe->vocab, bpe->merges[i].right, &bytes);
        if (!starts_with_mark(text, bytes)) continue;
        text = vocab_text(&bpe->vocab, bpe->merges[i].left, &bytes);
        if (!ends_with_mark(text, bytes)) return false;
    }
    return true;
}

void bpe_index(struct bpe *bpe)
{
    bpe->separable = is_separable(bpe);
    for (int i = 0; i < 256; i++) {
        char text[8];
        const int bytes = snprintf(text, sizeof text, "<0x%02X>", i);
        bpe->byte_id[i] = vocab_find(&bpe->vocab, text, (size_t)bytes);
    }
    for (uint32_t c = 0; c < BPE_SHORT_CHARACTERS; c++) {
        char text[4];
        const size_t bytes = utf8_encode(text, c);
        bpe->character_id[c] = vocab_find(&bpe->vocab, text, bytes);
    }
}

/* ---- encoding ----------------------------------------------------------------------------- */

struct bpe_symbol {
    int32_t id;             /* -1: merged into the one before */
    int32_t previous, next; /* index, -1: none */
};

static mlora_status add_symbol(struct bpe_work *work, int32_t id)
{
    if (work->n_symbols == work->symbol_capacity) {
        const size_t capacity = work->symbol_capacity ? 2 * work->symbol_capacity : 64;
        struct bpe_symbol *symbols = realloc(work->symbols, capacity * sizeof *symbols);
        if (!symbols || capacity > INT32_MAX) {
            if (symbols) work->symbols = symbols;
            return error_set(MLORA_ENOMEM, "out of memory: %zu symbols of one word", capacity);
        }
        work->symbols = symbols;
        work->symbol_capacity = capacity;
    }
    const int32_t n = (int32_t)work->n_symbols++;
    if (n > 0) work->symbols[n - 1].next = n;
    work->symbols[n] = (struct bpe_symbol){.id = id, .previous = n - 1, .next = -1};
    return MLORA_OK;
}

static bool allowed(const struct bpe *bpe, int32_t id, bool plain)
{
    return !plain || !bpe->is_special || !bpe->is_special[id];
}

/* The pre-token's characters as symbols: tokens, bytes, or the unknown token. */
static mlora_status add_characters(const struct bpe *bpe, struct bpe_work *work, const char *text,
                                   size_t bytes)
{
    bool unknown = false; /* an unknown token waits; the reference adds it before the next known
                           * character, so after the bytes of those that fell back */
    mlora_status status = MLORA_OK;
    uint32_t c;

    for (size_t i = 0, n; i < bytes && status == MLORA_OK; i += n) {
        n = utf8_decode(text + i, bytes - i, &c);
        int32_t id =
            c < BPE_SHORT_CHARACTERS ? bpe->character_id[c] : vocab_find(&bpe->vocab, text + i, n);
        if (id >= 0) {
            if (unknown) status = add_symbol(work, bpe->unknown);
            unknown = false;
            if (status == MLORA_OK) status = add_symbol(work, id);
            continue;
        }
        bool fall_back = bpe->byte_fallback;
        for (size_t k = 0; k < n; k++)
            if (bpe->byte_id[(unsigned char)text[i + k]] < 0) fall_back = false;
        if (fall_back) {
            for (size_t k = 0; k < n && status == MLORA_OK; k++)
                status = add_symbol(work, bpe->byte_id[(unsigned char)text[i + k]]);
        } else if (bpe->unknown >= 0) {
            if (unknown && !bpe->fuse_unknown) status = add_symbol(work, bpe->unknown);
            unknown = true;
        }
    }
    if (unknown && status == MLORA_OK) status = add_symbol(work, bpe->unknown);
    return status;
}

/* Put the pair that starts at symbol `left` on the heap if it merges. */
static mlora_status consider(const struct bpe *bpe, struct bpe_work *work, int32_t left, bool plain)
{
    const struct bpe_symbol *symbol = &work->symbols[left];
    const struct merge *merge = merge_slot(bpe, symbol->id, work->symbols[symbol->next].id);
    if (merge->left < 0 || !allowed(bpe, merge->result, plain)) return MLORA_OK;
    const struct merge_candidate pair = {merge->rank, left, (uint32_t)merge->result};
    return merge_heap_push(&work->heap, pair);
}

static mlora_status merge_all(const struct bpe *bpe, struct bpe_work *work, bool plain)
{
    struct bpe_symbol *symbols = work->symbols;
    mlora_status status = MLORA_OK;

    work->heap.n = 0;
    for (size_t i = 0; i + 1 < work->n_symbols && status == MLORA_OK; i++)
        status = consider(bpe, work, (int32_t)i, plain);

    while (work->heap.n > 0 && status == MLORA_OK) {
        const struct merge_candidate top = merge_heap_pop(&work->heap);
        struct bpe_symbol *left = &symbols[top.left];
        if (left->id < 0 || left->next < 0) continue;
        struct bpe_symbol *right = &symbols[left->next];
        const struct merge *merge = merge_slot(bpe, left->id, right->id);
        if (merge->left < 0 || (uint32_t)merge->result != top.result) continue; /* out of date */

        left->id = merge->result;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) symbols[left->next].previous = top.left;
        if (left->previous >= 0) status = consider(bpe, work, left->previous, plain);
        if (left->next >= 0 && status == MLORA_OK) status = consider(bpe, work, top.left, plain);
    }
    return status;
}

static mlora_status encode_word(const struct bpe *bpe, struct bpe_work *work, struct ids *out,
                                const char *text, size_t bytes, bool plain)
{
    work->n_symbols = 0;
    mlora_status status = add_characters(bpe, work, text, bytes);
    if (status == MLORA_OK && bpe->n_slots && work->n_symbols > 1)
        status = merge_all(bpe, work, plain);
    for (size_t i = 0; i < work->n_symbols && status == MLORA_OK; i++)
        if (work->symbols[i].id >= 0) status = ids_push(out, work->symbols[i].id);
    return status;
}

/* The bytes before the first mark that follows something else. Short stretches stay in the
 * cache, which makes a long text without pre-tokens several times faster. */
static size_t word_bytes(const char *text, size_t bytes)
{
    size_t from = 0;
    while (starts_with_mark(text + from, bytes - from)) from += MARK_BYTES;
    const char *next = memmem(text + from, bytes - from, mark, MARK_BYTES);
    return next ? (size_t)(next - text) : bytes;
}

mlora_status bpe_encode(const struct bpe *bpe, struct bpe_work *work, struct ids *out,
                        const char *text, size_t bytes, bool plain)
{
    mlora_status status = MLORA_OK;

    if (bpe->ignore_merges) {
        const int32_t id = vocab_find(&bpe->vocab, text, bytes);
        if (id >= 0 && allowed(bpe, id, plain)) return ids_push(out, id);
    }
    for (size_t n; bytes > 0 && status == MLORA_OK; text += n, bytes -= n) {
        n = bpe->separable ? word_bytes(text, bytes) : bytes;
        status = encode_word(bpe, work, out, text, n, plain);
    }
    return status;
}

void bpe_work_free(struct bpe_work *work)
{
    free(work->symbols);
    merge_heap_free(&work->heap);
    *work = (struct bpe_work){0};
}

void bpe_free(struct bpe *bpe)
{
    vocab_free(&bpe->vocab);
    free(bpe->merges);
    free(bpe->is_special);
    *bpe = (struct bpe){0};
}
