/* Byte-pair encoding of one pre-token, as tokenizer.json's model "BPE" defines it: the pair with
 * the lowest rank merges first, the leftmost of equals. A heap and a linked list keep a pre-token
 * of a megabyte at n log n. */
#ifndef MLORA_TOKENIZER_BPE_H
#define MLORA_TOKENIZER_BPE_H

#include "tokenizer/merge_heap.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/vocab.h"

struct merge {
    int32_t left, right; /* ids; left -1: a free slot */
    uint32_t rank;
    int32_t result;
};

enum { BPE_SHORT_CHARACTERS = 0x250 }; /* covers the byte-level alphabet */

struct bpe {
    struct vocab vocab;
    struct merge *merges; /* [n_slots] open addressing by (left, right) */
    uint32_t n_slots;     /* a power of two; 0: no merges */
    int32_t unknown;      /* -1: none */
    bool fuse_unknown;    /* a run of unknown characters is one token */
    bool byte_fallback;   /* an unknown character is its bytes */
    bool ignore_merges;   /* a pre-token that is in the vocabulary is that token */
    int32_t byte_id[256]; /* of <0xHH>, -1: none */
    int32_t character_id[BPE_SHORT_CHARACTERS]; /* of one character, -1: none */
    bool separable;      /* no merge joins "x" and "▁...": words after a mark merge alone */
    uint8_t *is_special; /* [vocab.n_ids] ids that plain text must not merge to; may be NULL */
};

/* Working memory of one encoding, reused from pre-token to pre-token. */
struct bpe_work {
    struct bpe_symbol *symbols;
    size_t n_symbols, symbol_capacity;
    struct merge_heap heap;
};

/* Allocate room for `n` merges, then add them in order of rank. A pair that comes twice counts
 * with its last rank. Returns OK, EFORMAT (texts that are not in the vocabulary) or ENOMEM. */
mlora_status bpe_reserve_merges(struct bpe *bpe, size_t n);
mlora_status bpe_add_merge(struct bpe *bpe, uint32_t rank, const char *left, size_t left_bytes,
                           const char *right, size_t right_bytes);

/* Fill byte_id, character_id and separable from the vocabulary and the merges. */
void bpe_index(struct bpe *bpe);

/* Encode a pre-token, valid UTF-8, onto the end of `out`. `plain`: no merge gives an id that is in
 * is_special, so that several characters never spell a special token. Returns OK or ENOMEM. */
mlora_status bpe_encode(const struct bpe *bpe, struct bpe_work *work, struct ids *out,
                        const char *text, size_t bytes, bool plain);

void bpe_work_free(struct bpe_work *work);
void bpe_free(struct bpe *bpe); /* accepts zeroes */

#endif
