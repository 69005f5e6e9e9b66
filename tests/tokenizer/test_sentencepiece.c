/* tokenizer.model files that are damaged or not supported: each is refused with a reason. The
 * files are put together here, field by field. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "tests/tokenizer/files.h"

static struct buffer model; /* the file that is being put together */

static void put_varint(struct buffer *out, uint64_t value)
{
    do {
        const unsigned char byte = (unsigned char)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
        buffer_append(out, &byte, 1);
        value >>= 7;
    } while (value);
}

static void put_bytes(struct buffer *out, int field, const void *data, size_t bytes)
{
    put_varint(out, (uint64_t)field << 3 | 2);
    put_varint(out, bytes);
    buffer_append(out, data, bytes);
}

static void put_number(struct buffer *out, int field, uint64_t value)
{
    put_varint(out, (uint64_t)field << 3);
    put_varint(out, value);
}

static void put_piece(const char *text, float score, int type)
{
    struct buffer piece = {0};
    put_bytes(&piece, 1, text, strlen(text));
    put_varint(&piece, 2 << 3 | 5);
    buffer_append(&piece, &score, sizeof score);
    put_number(&piece, 3, (uint64_t)type);
    put_bytes(&model, 1, piece.data, piece.bytes);
    buffer_free(&piece);
}

static void put_bytes_pieces(int first, int end)
{
    for (int i = first; i < end; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", i);
        put_piece(name, 0, 6);
    }
}

/* trainer_spec: model_type, byte_fallback; normalizer_spec: no extra whitespace is removed. */
static void put_settings(int model_type, bool byte_fallback)
{
    struct buffer spec = {0};
    put_number(&spec, 3, (uint64_t)model_type);
    put_number(&spec, 35, byte_fallback);
    put_bytes(&model, 2, spec.data, spec.bytes);
    spec.bytes = 0;
    put_number(&spec, 4, 0);
    put_bytes(&model, 3, spec.data, spec.bytes);
    buffer_free(&spec);
}

/* Control pieces and a few that merge: ids 0 to 6. */
static void put_pieces(void)
{
    put_piece("<unk>", 0, 2);
    put_piece("<s>", 0, 3);
    put_piece("</s>", 0, 3);
    put_piece("\xe2\x96\x81", -9, 1);
    put_piece("a", -8, 1);
    put_piece("b", -8, 1);
    put_piece("ab", -1, 1);
}

static const char *write_model(void)
{
    static char path[128];
    files_write("tokenizer.model", buffer_text(&model), model.bytes);
    snprintf(path, sizeof path, "%s/tokenizer.model", files_directory());
    return path;
}

static void teardown(void)
{
    buffer_free(&model);
    files_remove();
}

TestSuite(sentencepiece, .fini = teardown);

Test(sentencepiece, merges_by_score)
{
    char ids[64];
    put_pieces();
    put_settings(2, false);
    struct tokenizer *tokenizer = open_tokenizer(write_model());
    encode_to_text(ids, sizeof ids, tokenizer, "aab", 0);
    cr_expect_str_eq(ids, "1 3 4 6");
    encode_to_text(ids, sizeof ids, tokenizer, "xyb", ENCODE_NO_SPECIAL);
    cr_expect_str_eq(ids, "3 0 5"); /* a run of unknown characters is one token */
    encode_to_text(ids, sizeof ids, tokenizer, "<s>", ENCODE_NO_SPECIAL);
    cr_expect_str_eq(ids, "3 0"); /* control pieces are never found in text */
    cr_expect_eq(tokenizer_bos(tokenizer), 1);
    cr_expect_eq(tokenizer_eos(tokenizer), 2);
    cr_expect_eq(tokenizer_vocab_size(tokenizer), 7);
    tokenizer_close(tokenizer);
}

Test(sentencepiece, refuses_damaged_pieces)
{
    put_settings(2, false);
    const size_t settings_bytes = model.bytes;
    const struct {
        const char *text;
        float score;
        int type;
        const char *part;
    } bad[] = {
        {"a", 0, 1, "piece 7: token \"a\" is defined twice"},
        {"<s>", 0, 3, "piece 7: token \"<s>\" is defined twice"},
        {"", 0, 1, "piece 7 is 0 bytes long, must be 1 to 1024"},
        {"c", 0, 7, "piece 7 has type 7, must be 1 to 6"},
        {"c", 0, 0, "piece 7 has type 0"},
        {"\xff", 0, 1, "piece 7 is not UTF-8"},
        {"c", __builtin_nanf(""), 1, "piece 7 has a score that is not a number"},
        {"c", 0, 2, "pieces 0 and 7 are both of type UNKNOWN"},
        {"<0x41>", 0, 6, "trainer_spec.byte_fallback is false"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        model.bytes = settings_bytes;
        put_pieces();
        put_piece(bad[i].text, bad[i].score, bad[i].type);
        expect_refused(write_model(), MLORA_EFORMAT, bad[i].part);
    }
}

Test(sentencepiece, needs_all_byte_pieces_for_byte_fallback)
{
    put_settings(2, true);
    put_pieces();
    put_bytes_pieces(0, 255);
    expect_refused(write_model(), MLORA_EFORMAT, "the byte piece <0xFF> is missing");
    put_piece("<0xff>", 0, 6);
    expect_refused(write_model(), MLORA_EFORMAT, "the byte piece <0xFF> is missing");
    put_bytes_pieces(255, 256);
    expect_refused(write_model(), MLORA_EFORMAT, "there are 257 byte pieces");
}

Test(sentencepiece, needs_an_unknown_piece)
{
    put_settings(2, false);
    put_piece("a", 0, 1);
    expect_refused(write_model(), MLORA_EFORMAT, "no piece is of type UNKNOWN");
}

Test(sentencepiece, refuses_other_kinds_by_name)
{
    struct buffer spec = {0};
    put_pieces();
    put_settings(1, false);
    expect_refused(write_model(), MLORA_EUNSUPPORTED, "model_type is UNIGRAM, only BPE");

    model.bytes = 0;
    put_pieces();
    put_settings(2, false);
    const size_t good = model.bytes;
    put_bytes(&spec, 2, "charsmap", 8);
    put_bytes(&model, 3, spec.data, spec.bytes);
    expect_refused(write_model(), MLORA_EUNSUPPORTED,
                   "normalizer_spec.precompiled_charsmap is not empty (8 bytes)");
    model.bytes = good;
    put_bytes(&model, 5, spec.data, spec.bytes);
    expect_refused(write_model(), MLORA_EUNSUPPORTED, "denormalizer_spec.precompiled_charsmap");

    model.bytes = good;
    spec.bytes = 0;
    put_number(&spec, 24, 1);
    put_bytes(&model, 2, spec.data, spec.bytes);
    expect_refused(write_model(), MLORA_EUNSUPPORTED, "treat_whitespace_as_suffix");
    buffer_free(&spec);

    files_write_text("tokenizer.model", "IQ== 0\nIg== 1\n");
    expect_refused(files_directory(), MLORA_EUNSUPPORTED, "is a tiktoken file");
}

Test(sentencepiece, refuses_wrong_wire_types)
{
    put_settings(2, false);
    put_pieces();
    const size_t good = model.bytes;
    struct buffer part = {0};

    put_number(&model, 1, 5);
    expect_refused(write_model(), MLORA_EFORMAT, "the model has the wrong wire type");
    model.bytes = good;
    put_number(&part, 1, 5);
    put_bytes(&model, 1, part.data, part.bytes);
    expect_refused(write_model(), MLORA_EFORMAT, "a piece has the wrong wire type");
    model.bytes = good;
    part.bytes = 0;
    put_bytes(&part, 3, "x", 1);
    put_bytes(&model, 2, part.data, part.bytes);
    expect_refused(write_model(), MLORA_EFORMAT, "trainer_spec has the wrong wire type");
    model.bytes = good;
    put_bytes(&model, 3, part.data, part.bytes);
    expect_refused(write_model(), MLORA_EFORMAT, "normalizer_spec has the wrong wire type");
    buffer_free(&part);
}

/* Cut at every byte, a model is refused or is one with fewer pieces: it is never read beyond. */
Test(sentencepiece, survives_truncation_anywhere)
{
    put_settings(2, false);
    put_pieces();
    put_varint(&model, 1 << 3 | 2);
    put_varint(&model, 1000);
    expect_refused(write_model(), MLORA_EFORMAT, "the model is cut short or damaged");
    const size_t whole = model.bytes;
    for (size_t bytes = 0; bytes < whole; bytes++) {
        struct tokenizer *tokenizer;
        model.bytes = bytes;
        tokenizer_open(&tokenizer, write_model());
        tokenizer_close(tokenizer);
    }
    model.bytes = 0;
    expect_refused(write_model(), MLORA_EFORMAT, "has no pieces");
}

Test(sentencepiece, survives_a_flipped_byte_anywhere)
{
    cr_assert_eq(
        file_read_all(&model, "tests/fixtures/tokenizers/sentencepiece/tokenizer.model", 1 << 20),
        MLORA_OK);
    for (size_t i = 0; i < model.bytes; i += 3) {
        struct tokenizer *tokenizer;
        model.data[i] = (char)(model.data[i] ^ (1 << i % 8));
        if (tokenizer_open(&tokenizer, write_model()) == MLORA_OK) {
            struct ids ids = {0};
            tokenizer_encode(tokenizer, &ids, "the king", 8, 0);
            ids_free(&ids);
        }
        tokenizer_close(tokenizer);
        model.data[i] = (char)(model.data[i] ^ (1 << i % 8));
    }
}

Test(sentencepiece, refuses_added_tokens_that_the_model_lacks)
{
    put_settings(2, false);
    put_pieces();
    write_model();
    files_write_text("added_tokens.json", "{\"<s>\": 1}");
    tokenizer_close(open_tokenizer(files_directory()));
    files_write_text("added_tokens.json", "{\"<|im_start|>\": 7}");
    expect_refused(files_directory(), MLORA_EUNSUPPORTED,
                   "the added token \"<|im_start|>\" of added_tokens.json");
}
