"""Makes tokenizer/unicode_table.c: the character classes that the reference tokenizers use.

    pip install tokenizers==0.23.3        (and libutf8proc, which the program normalizes with)
    python3 tools/reference/make_unicode.py > tokenizer/unicode_table.c

The reference is asked about every code point, so the table holds the Unicode versions that are
compiled into it: Oniguruma's \\p{L}, \\p{N}, \\s (Unicode 16), Rust's is_numeric (Unicode 17) and
the regex crate's \\w. Its NFC is older (Unicode 9): code points on which utf8proc differs are
marked, they take no part in ordering and composing there.
"""
import ctypes
import sys

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

LETTER, NUMBER, SPACE, WORD, NUMERIC, INERT = 1, 2, 4, 8, 16, 32
BLOCK = 128
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def in_regex_class(pattern):
    """Code points that Oniguruma matches: those that a replacement by nothing removes."""
    text = "".join(map(chr, CODE_POINTS))
    left = set(normalizers.Replace(Regex(pattern), "").normalize_str(text))
    return {c for c in CODE_POINTS if chr(c) not in left}


def numeric():
    digits = pre_tokenizers.Digits(individual_digits=True)
    found = set()
    for start in range(0, len(CODE_POINTS), 4096):
        text = "".join("a" + chr(c) for c in CODE_POINTS[start:start + 4096])
        found |= {ord(piece) for piece, _ in digits.pre_tokenize_str(text) if len(piece) == 1}
    return found - {ord("a")}


def word():
    """A token that must be a single word is not found after a word character."""
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0}, merges=[], unk_token="<unk>"))
    tokenizer.add_tokens([AddedToken("Q", single_word=True, normalized=False)])
    q = tokenizer.token_to_id("Q")
    return {c for c in CODE_POINTS
            if chr(c) != "Q" and q not in tokenizer.encode(chr(c) + "Q").ids} | {ord("Q")}


def inert():
    """Code points that utf8proc's NFC moves or composes and the reference's does not."""
    lib = ctypes.CDLL("libutf8proc.so.2")
    for name in ("utf8proc_NFC", "utf8proc_NFD"):
        getattr(lib, name).restype = ctypes.c_void_p
        getattr(lib, name).argtypes = [ctypes.c_char_p]
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]

    def utf8proc(form, text):
        memory = getattr(lib, "utf8proc_" + form)(text.encode())
        result = ctypes.string_at(memory).decode()
        free(memory)
        return result

    reference = normalizers.NFC().normalize_str
    found = set()
    for c in CODE_POINTS[1:]:
        char = chr(c)
        apart = utf8proc("NFD", char)
        if apart != char and utf8proc("NFC", apart) != reference(apart):
            assert reference(apart) == apart and reference(char) == char
            found |= {c} | set(map(ord, apart))
        # U+0334 has the lowest combining class, U+0345 the highest
        for text in (char, char + "\u0334", "\u0345" + char, "a" + char + "\u0301"):
            if utf8proc("NFC", text) != reference(text):
                assert reference(text) == text
                found.add(c)
    return found


classes = [0] * 0x110000
for bit, found in ((LETTER, in_regex_class(r"\p{L}")), (NUMBER, in_regex_class(r"\p{N}")),
                   (SPACE, in_regex_class(r"\s")), (WORD, word()), (NUMERIC, numeric()),
                   (INERT, inert())):
    for c in found:
        classes[c] |= bit
    print(f"{bit:2}: {len(found)} code points", file=sys.stderr)

blocks, index = {}, []
for start in range(0, 0x110000, BLOCK):
    block = tuple(classes[start:start + BLOCK])
    index.append(blocks.setdefault(block, len(blocks)))
assert len(blocks) <= 256

out = [f"""/* Made by tools/reference/make_unicode.py from tokenizers {tokenizers.__version__}; do not edit.
 * Stage one says which block a code point's {BLOCK} neighbours share, stage two holds the blocks. */
#include "tokenizer/unicode.h"

/* clang-format off */
const uint8_t unicode_block[0x110000 / {BLOCK}] = {{"""]


def rows(values):
    line = ""
    for value in values:
        if len(line) + len(str(value)) + 1 > 98:
            out.append(line)
            line = ""
        line += f"{value},"
    out.append(line)


rows(index)
out.append(f"}};\n\nconst uint8_t unicode_class[{len(blocks)} * {BLOCK}] = {{")
for block in blocks:
    rows(block)
out.append("};\n/* clang-format on */")
print("\n".join(out))
