#include "tokenizer/vocab.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "engine/base/error.h"

uint64_t hash_seed(void)
{
    uint64_t seed = 0x2545f4914f6cdd1du; /* where the system has no randomness to give */
    if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) < 0) return seed;
    return seed;
}

/* Eight bytes a step: most texts take one or two. */
static uint64_t hash_text(const char *text, size_t bytes, uint64_t seed)
{
    uint64_t hash = seed ^ bytes;
    while (bytes >= 8) {
        uint64_t word;
        memcpy(&word, text, 8);
        hash = hash_u64(word, hash);
        text += 8;
        bytes -= 8;
    }
    uint64_t tail = 0;
    memcpy(&tail, text, bytes);
    return hash_u64(tail, hash);
}

/* The slot that holds the text, or the free one where it belongs. */
static struct vocab_slot *slot_of(const struct vocab *vocab, const char *text, size_t bytes,
                                  uint64_t hash)
{
    const uint32_t mask = vocab->n_slots - 1, tag = (uint32_t)(hash >> 32);
    uint32_t i = (uint32_t)hash & mask;
    for (;; i = (i + 1) & mask) {
        struct vocab_slot *slot = &vocab->slots[i];
        if (slot->entry < 0) return slot;
        const struct vocab_entry *entry = &vocab->entries[slot->entry];
        if (slot->tag == tag && entry->bytes == bytes &&
            memcmp(vocab->arena.data + entry->start, text, bytes) == 0)
            return slot;
    }
}

mlora_status vocab_reserve(struct vocab *vocab, int n)
{
    if (n <= vocab->capacity) return MLORA_OK;
    if (vocab->seed == 0) vocab->seed = hash_seed();

    uint32_t n_slots = 64;
    while (n_slots < 2 * (uint32_t)n) n_slots *= 2;
    const int capacity = (int)(n_slots / 2);
    struct vocab_slot *slots = malloc(n_slots * sizeof *slots);
    struct vocab_entry *entries =
        realloc(vocab->entries, (size_t)capacity * sizeof *vocab->entries);
    if (entries) vocab->entries = entries;
    if (!slots || !entries) {
        free(slots);
        return error_set(MLORA_ENOMEM, "out of memory: a vocabulary of %d tokens", n);
    }
    free(vocab->slots);
    vocab->slots = slots;
    vocab->n_slots = n_slots;
    vocab->capacity = capacity;
    for (uint32_t i = 0; i < n_slots; i++) slots[i].entry = -1;
    for (int i = 0; i < vocab->n; i++) {
        const char *text = vocab->arena.data + entries[i].start;
        const uint64_t hash = hash_text(text, entries[i].bytes, vocab->seed);
        *slot_of(vocab, text, entries[i].bytes, hash) =
            (struct vocab_slot){(uint32_t)(hash >> 32), i};
    }
    return MLORA_OK;
}

/* Make entry_of[] reach `id`. */
static mlora_status reach_id(struct vocab *vocab, int32_t id)
{
    int capacity = vocab->id_capacity ? vocab->id_capacity : 256;
    while (capacity <= id) capacity *= 2;
    if (capacity > vocab->id_capacity) {
        int32_t *entry_of = realloc(vocab->entry_of, (size_t)capacity * sizeof *entry_of);
        if (!entry_of) return error_set(MLORA_ENOMEM, "out of memory: %d token ids", capacity);
        memset(entry_of + vocab->id_capacity, 0xff,
               (size_t)(capacity - vocab->id_capacity) * sizeof *entry_of);
        vocab->entry_of = entry_of;
        vocab->id_capacity = capacity;
    }
    if (id >= vocab->n_ids) vocab->n_ids = id + 1;
    return MLORA_OK;
}

mlora_status vocab_add(struct vocab *vocab, const char *text, size_t bytes, int64_t id)
{
    const int shown = bytes < 64 ? (int)bytes : 64; /* bytes of the text in a message */

    if (id < 0 || id > VOCAB_ID_MAX)
        return error_set(MLORA_EFORMAT, "token \"%.*s\" has id %lld, must be from 0 to %d", shown,
                         text, (long long)id, VOCAB_ID_MAX);
    if (bytes > UINT32_MAX)
        return error_set(MLORA_EFORMAT, "token %lld is %zu bytes long", (long long)id, bytes);

    mlora_status status = MLORA_OK;
    if (vocab->n == vocab->capacity) status = vocab_reserve(vocab, vocab->n + 1);
    if (status != MLORA_OK) return status;

    if (id < vocab->n_ids && vocab->entry_of[id] >= 0)
        return error_set(MLORA_EFORMAT, "id %lld is given to two tokens, the second is \"%.*s\"",
                         (long long)id, shown, text);
    const uint64_t hash = hash_text(text, bytes, vocab->seed);
    struct vocab_slot *slot = slot_of(vocab, text, bytes, hash);
    if (slot->entry >= 0)
        return error_set(MLORA_EFORMAT, "token \"%.*s\" is defined twice", shown, text);

    const size_t start = vocab->arena.bytes;
    status = reach_id(vocab, (int32_t)id);
    if (status == MLORA_OK) status = buffer_append(&vocab->arena, text, bytes);
    if (status == MLORA_OK) status = buffer_append(&vocab->arena, "", 1); /* a NUL for messages */
    if (status != MLORA_OK) return status;
    vocab->entries[vocab->n] =
        (struct vocab_entry){.start = start, .bytes = (uint32_t)bytes, .id = (int32_t)id};
    *slot = (struct vocab_slot){(uint32_t)(hash >> 32), vocab->n};
    vocab->entry_of[id] = vocab->n++;
    if (bytes > vocab->max_bytes) vocab->max_bytes = bytes;
    return MLORA_OK;
}

int32_t vocab_find(const struct vocab *vocab, const char *text, size_t bytes)
{
    if (vocab->n == 0 || bytes > vocab->max_bytes) return -1;
    const int32_t entry = slot_of(vocab, text, bytes, hash_text(text, bytes, vocab->seed))->entry;
    return entry < 0 ? -1 : vocab->entries[entry].id;
}

const char *vocab_text(const struct vocab *vocab, int32_t id, size_t *bytes)
{
    if (id < 0 || id >= vocab->n_ids || vocab->entry_of[id] < 0) return NULL;
    const struct vocab_entry *entry = &vocab->entries[vocab->entry_of[id]];
    *bytes = entry->bytes;
    return vocab->arena.data + entry->start;
}

void vocab_free(struct vocab *vocab)
{
    buffer_free(&vocab->arena);
    free(vocab->entries);
    free(vocab->slots);
    free(vocab->entry_of);
    *vocab = (struct vocab){0};
}
