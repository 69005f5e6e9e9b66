/* tokenizer.model, SentencePiece's format, of kind BPE: the adjacent pair whose concatenation is
 * the piece with the highest score merges first, the leftmost of equals. Reading follows the
 * validity rules of the reference; a heap and a linked list keep encoding at n log n. */
#ifndef MLORA_TOKENIZER_SENTENCEPIECE_H
#define MLORA_TOKENIZER_SENTENCEPIECE_H

#include "tokenizer/added.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/vocab.h"

enum piece_type { /* the file's numbers */
                  PIECE_NORMAL = 1,
                  PIECE_UNKNOWN = 2,
                  PIECE_CONTROL = 3,
                  PIECE_USER_DEFINED = 4,
                  PIECE_UNUSED = 5,
                  PIECE_BYTE = 6
};

struct sentencepiece {
    struct vocab pieces;   /* normal, user-defined and unused: what text can become */
    struct vocab reserved; /* unknown, control and byte */
    float *scores;         /* [n_ids] */
    uint8_t *types;        /* [n_ids] */
    int n_ids;
    int capacity;
    int32_t unknown;
    int32_t byte_id[256]; /* all there when byte_fallback, else unused */
    bool separable;       /* no piece has a mark behind something else: words merge alone */
    int n_unused;         /* pieces that are split again after merging */
    struct added user;    /* user-defined pieces, which are taken before any merge */
    struct added_search user_search;
    struct added control; /* control pieces: text of a chat template can hold these */
    struct added_search control_search;
    bool byte_fallback;
    bool add_dummy_prefix;
    bool remove_extra_whitespaces;
    bool escape_whitespaces;
    bool prefix_after_control; /* a dummy prefix after each control piece, not only at the start;
                                * "legacy" of tokenizer_config.json */
    char *unknown_text;        /* owned: what the unknown piece decodes to */
    char *bos_text, *eos_text; /* owned: names of the begin and end pieces */
};

/* Read a tokenizer.model. Returns OK, EIO, EFORMAT, EUNSUPPORTED or ENOMEM; freed with
 * sentencepiece_free also after a failure. */
mlora_status sentencepiece_read(struct sentencepiece *out, const char *path);
void sentencepiece_free(struct sentencepiece *model); /* accepts zeroes */

/* Append the ids of `text`, valid UTF-8. `written` NULL: all of it is plain, as in the reference;
 * otherwise control pieces are found where the template wrote them, see added_scope.
 * Returns OK or ENOMEM. */
mlora_status sentencepiece_encode(const struct sentencepiece *model, struct ids *out,
                                  const char *text, size_t bytes, const char *written);

/* As tokenizer_decode, tokenizer_piece and tokenizer_find; ids are in the range. */
mlora_status sentencepiece_decode(const struct sentencepiece *model, struct buffer *out,
                                  const int32_t *ids, int n, bool keep_special);
mlora_status sentencepiece_piece(const struct sentencepiece *model, struct buffer *out, int32_t id);
int32_t sentencepiece_find(const struct sentencepiece *model, const char *text, size_t bytes);

#endif
