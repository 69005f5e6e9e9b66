/* tokenizer.json, the format of Hugging Face's tokenizers library, with a BPE model. A text goes
 * through the same stages as there: added tokens are taken out, the rest is normalized, cut into
 * pre-tokens and merged, and the post-processor's tokens are put around. */
#ifndef MLORA_TOKENIZER_HF_H
#define MLORA_TOKENIZER_HF_H

#include "tokenizer/added.h"
#include "tokenizer/bpe.h"
#include "tokenizer/decoder.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/pretokenizer.h"

struct hf {
    struct added added;
    struct added_search raw;        /* tokens that are searched in the text as it came */
    struct added_search normalized; /* and those in normalized text */
    struct normalizer normalizer;
    struct pretokenizer pretokenizer;
    struct bpe bpe;
    struct decoder decoder;
    struct ids prefix, suffix; /* of the post-processor */
    int n_ids;                 /* one past the largest id */
    int32_t *added_of;         /* [n_ids] index of the added token with this id, or -1 */
};

/* Read a tokenizer.json. Returns OK, EIO, EFORMAT, EUNSUPPORTED or ENOMEM; freed with hf_free
 * also after a failure. */
mlora_status hf_read(struct hf *out, const char *path);
void hf_free(struct hf *hf); /* accepts zeroes */

/* As tokenizer_encode, for valid UTF-8. `written`: see added_scope; NULL outside of chats.
 * Returns OK, EINVAL (see split_next), EUNSUPPORTED (only with `written`) or ENOMEM. */
mlora_status hf_encode(const struct hf *hf, struct ids *out, const char *text, size_t bytes,
                       int flags, const char *written);

/* As tokenizer_decode, tokenizer_piece and tokenizer_find; ids are in the range. */
mlora_status hf_decode(const struct hf *hf, struct buffer *out, const int32_t *ids, int n,
                       bool keep_special);
mlora_status hf_piece(const struct hf *hf, struct buffer *out, int32_t id);
int32_t hf_find(const struct hf *hf, const char *text, size_t bytes);

#endif
