"""Makes tests/fixtures/tokenizers: small tokenizers of every supported form, and what the reference
libraries make of odd texts with them; and chat templates with the prompts that Jinja renders.

    pip install tokenizers==0.23.3 sentencepiece==0.2.3 jinja2==3.1.6
    python3 tools/reference/make_tokenizer_cases.py tests/fixtures/tokenizers

Every tokenizer is trained here on made-up text. A folder holds tokenizer.json or tokenizer.model
and cases.json: [{text, ids (with the post-processor's tokens), plain (ids when special tokens are
not parsed, without those tokens), decoded, decoded_with_special}].
"""
import copy
import json
import os
import random
import sys

import sentencepiece
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

OUT = sys.argv[1]
RANDOM = random.Random(20240726)
WORDS = ("the a old young quick fox king ship lamp river sings finds keeps breaks opens it's they're "
         "don't we'll in under over behind 7 42 1999 2,048 café naïve straße Łódź ... -- !").split()
CORPUS = [" ".join(RANDOM.choice(WORDS) for _ in range(12)) + RANDOM.choice([".", "!\n", "?  ", "\t"])
          for _ in range(400)]
ODD = ["", " ", "  ", "   x", "x   ", "\n", "\n\n  \n x", " \r\n\t", "a\u00a0b", "\u3000x", "\u180ex",
       "'s 'S '\u017f 'T 'rE 'Ve 'LL 'm", "it'S they'RE we\u2019ll", "x's y'd", "1234567 12 \u0663\u0664 \u00b2\u00bd\u2167",
       "e\u0301 \u1112\u1161\u11ab a\u0316\u0301\u0334 \u0344", "\U0001f98a\U0001f98a", "\u4e2d\u6587 \ud55c\uae00",
       "\u2581 \u2581x \u2581\u2581", "<s> </s> <unk>", "<0x41><0x0A>", "\x00\x01\x7f", "\ufeff\ufffd",
       "\U00010d4a\U0001e5ff", "don't stop\u2026 at 3.14159!\n\n  - ok", "AaBb \u00c0\u0178 \u01c5", "_a_ -b- (c) [d]",
       "\U0001d7d8\U000e0041", "x" * 40, " " * 20 + "y", "-" * 30, "!\n\n!", "\u0085\u2028 z"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")


def write(name, path, content):
    os.makedirs(os.path.join(OUT, name), exist_ok=True)
    with open(os.path.join(OUT, name, path), "w") as file:
        json.dump(content, file, ensure_ascii=True, separators=(",", ":"))
        file.write("\n")


def random_texts(pieces, n):
    return ["".join(RANDOM.choice(pieces) for _ in range(RANDOM.randint(1, 10))) for _ in range(n)]


def save(name, tokenizer, texts):
    """Write a tokenizer and its cases; a text on which the reference itself fails is left out."""
    form = json.loads(tokenizer.to_str())
    form["truncation"] = form["padding"] = None
    write(name, "tokenizer.json", form)
    cases = []
    for text in texts:
        try:
            tokenizer.encode_special_tokens = True
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.encode_special_tokens = False
            ids = tokenizer.encode(text).ids
        except BaseException as error:  # a panic of the reference
            if "Panic" not in type(error).__name__:
                raise
            continue
        cases.append({"text": text, "ids": ids, "plain": plain, "decoded": tokenizer.decode(ids),
                      "decoded_with_special": tokenizer.decode(ids, skip_special_tokens=False)})
    write(name, "cases.json", cases)


def byte_level(pre, normalizer=None, vocab=400, special=("<|endoftext|>",), **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior, invert),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def added(tokenizer):
    """Every flag of added tokens, alone and together."""
    tokenizer.add_special_tokens([AddedToken(f"<|im_{x}|>", normalized=False) for x in ("start", "end")])
    tokenizer.add_tokens([
        AddedToken("[single]", single_word=True, normalized=False), AddedToken("[left]", lstrip=True),
        AddedToken("[right]", rstrip=True), AddedToken("[both]", lstrip=True, rstrip=True, special=True),
        AddedToken("caf\u00e9!", normalized=True), AddedToken("ab", normalized=False),
        AddedToken("abab", normalized=False), AddedToken("  ", normalized=False, lstrip=True)])
    return tokenizer


def sentencepiece_model(name, texts, edit=None, **options):
    prefix = os.path.join(OUT, name, "tokenizer")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in CORPUS), model_prefix=prefix,
        model_type="bpe", normalization_rule_name="identity", minloglevel=2, **options)
    os.remove(prefix + ".vocab")
    if edit:
        model = sentencepiece_model_pb2.ModelProto()
        with open(prefix + ".model", "rb") as file:
            model.ParseFromString(file.read())
        edit(model)
        with open(prefix + ".model", "wb") as file:
            file.write(model.SerializeToString())
    model = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    write(name, "cases.json", [{"text": t, "plain": model.encode(t), "ids": [model.bos_id()] + model.encode(t),
                                "decoded": model.decode(model.encode(t))} for t in texts])


def unuse(model):
    for i, piece in enumerate(model.pieces):
        if piece.type == 1 and len(piece.piece) > 1 and i % 3 == 0:
            piece.type = 5


def metaspace(scheme, split_words, base, byte_fallback, fuse_unk):
    form = copy.deepcopy(base)
    form["normalizer"] = None
    form["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme,
                             "split": split_words}
    form["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme,
                       "split": split_words}
    form["model"]["byte_fallback"] = byte_fallback
    form["model"]["fuse_unk"] = fuse_unk
    return Tokenizer.from_str(json.dumps(form))


def bpe_from_sentencepiece(name):
    """The same pieces as a tokenizer.json, in the form of Llama-2's."""
    model = sentencepiece.SentencePieceProcessor(model_file=os.path.join(OUT, name, "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = sorted((-model.get_score(vocab[a + b]), a, b) for piece in vocab for cut in range(1, len(piece))
                    for a, b in [(piece[:cut], piece[cut:])] if a in vocab and b in vocab and
                    not model.is_control(vocab[piece]) and not model.is_unknown(vocab[piece]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for _, a, b in merges], unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return json.loads(tokenizer.to_str())


# ---- chat -----------------------------------------------------------------------------------------

TURNS = "{% for message in messages %}"
FIRST_SYSTEM = ("{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
                "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}\n")
ALTERNATE = ("{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{% endif %}")
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
DEFAULT = ("{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\\nBe \"kind\".<|im_end|>\\n' }}{% endif %}")


def mistral(user, with_system, answer, where):
    return (FIRST_SYSTEM + "{{- bos_token }}\n{%- for message in loop_messages %}\n    " + ALTERNATE.replace("{% ", "{%- ")
            .replace("{{ ", "{{- ") + "\n    {%- if message['role'] == \"user\" %}\n        {%- if loop." + where +
            " and system_message is defined %}\n            {{- " + with_system + " }}\n        {%- else %}\n"
            "            {{- " + user + " }}\n        {%- endif %}\n    {%- elif message.role == 'assistant' %}\n"
            "        {{- " + answer + " }}\n    {%- endif %}\n{%- endfor %}\n")


TEMPLATES = {
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
              "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
              "{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + ALTERNATE +
              "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
              "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
              "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
              "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": TURNS + "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
              "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
              "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
    "llama3-date": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = \"26 Jul 2024\" %}\n"
                   "{%- endif %}\n\n{#- the system message goes behind the dates #}\n{%- if messages[0].role == 'system' %}\n"
                   "    {%- set system_message = messages[0].content|trim %}\n    {%- set messages = messages[1:] %}\n"
                   "{%- else %}\n    {%- set system_message = \"\" %}\n{%- endif %}\n"
                   "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}\n"
                   "{%- if tools is defined %}\n    {{- \"Environment: ipython\\n\" }}\n{%- endif %}\n"
                   "{{- \"Cutting Knowledge Date: December 2023\\n\" }}\n{{- \"Today Date: \" + date_string + \"\\n\\n\" }}\n"
                   "{{- system_message }}\n{{- \"<|eot_id|>\" }}\n{%- for message in messages %}\n"
                   "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + "
                   "'<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
                   "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    "chatml": TURNS + "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}" +
              GENERATE,
    "chatml-default": TURNS + DEFAULT + "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
                      "'\\n'}}{% endfor %}" + GENERATE,
    "chatml-bos-trim": "{{ bos_token }}\n{%- for message in messages %}\n{{- '<|im_start|>' + message.role + \"\\n\" + "
                       "message.content | trim + '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
                       "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "chatml-lines": TURNS + "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'}}\n{% endfor %}" +
                    GENERATE,
    "chatml-open": TURNS + DEFAULT + "{{'<|im_start|>' + message['role'] + '\\n' + message['content']}}"
                   "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\\n'}}{% endif %}"
                   "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
                   "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml-thinks": "{%- set ns = namespace(open=true, last_query_index=messages|length - 1) %}\n"
                     "{%- for message in messages[::-1] %}\n    {%- if ns.open and message.role == 'user' and not("
                     "message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n"
                     "        {%- set ns.open = false %}\n        {%- set ns.last_query_index = messages|length - 1 - loop.index0 %}\n"
                     "    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    {%- set content = message.content %}\n"
                     "    {%- if message.role != 'assistant' %}\n"
                     "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n    {%- else %}\n"
                     "        {%- set reasoning = '' %}\n        {%- if '</think>' in content %}\n"
                     "            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
                     "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
                     "        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}\n"
                     "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + "
                     "'\\n</think>\\n\\n' + content.lstrip('\\n') }}\n        {%- else %}\n"
                     "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n        {%- endif %}\n"
                     "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if tools %}{%- endif %}\n"
                     "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "mistral-v1": "{{ bos_token }}" + TURNS + ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
                  "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
                  "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    "mistral-first": mistral("' [INST] ' + message['content'] + ' [/INST]'",
                             "' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]'",
                             "' ' + message['content'] + eos_token", "first"),
    "mistral-v3": mistral("\"[INST] \" + message[\"content\"] + \"[/INST]\"",
                          "\"[INST] \" + system_message + \"\\n\\n\" + message[\"content\"] + \"[/INST]\"",
                          "\" \" + message[\"content\"]|trim + eos_token", "last"),
    "mistral-tight": mistral("\"[INST]\" + message[\"content\"] + \"[/INST]\"",
                             "\"[INST]\" + system_message + \"\\n\\n\" + message[\"content\"] + \"[/INST]\"",
                             "message[\"content\"] + eos_token", "last"),
    "zephyr": TURNS + "\n" + "\n".join("{% " + branch + " message['role'] == '" + role + "' %}\n{{ '<|" + role + "|>\\n' + "
                                       "message['content'] + eos_token }}" for branch, role in
                                       (("if", "user"), ("elif", "system"), ("elif", "assistant"))) +
              "\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
}


def chats():
    def refuse(text):
        raise TemplateError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    contents = ["Hi there", "  padded\n", "\u00a0caf\u00e9\u3000", "", "   ", "don't\tstop", "\x1cz\x1f", "Who lost the key?",
                "<think>\nhm\n\n</think>\n\nYes.", "</think> no", "<tool_response>7</tool_response>"]
    talks = (["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"],
             ["user", "assistant"], ["user", "user"], ["user", "assistant", "assistant"])
    result = []
    for name, text in TEMPLATES.items():
        template, prompts = environment.from_string(text), []
        for roles in talks:
            for _ in range(2):
                messages = [{"role": role, "content": RANDOM.choice(contents)} for role in roles]
                try:
                    prompt = template.render(messages=messages, add_generation_prompt=True, bos_token="<s>",
                                             eos_token="</s>")
                except TemplateError:
                    prompt = None
                prompts.append({"messages": messages, "prompt": prompt})
        result.append({"name": name, "template": text, "prompts": prompts})
    return result


# ---- all ------------------------------------------------------------------------------------------

mixed = random_texts(ODD[1:] + WORDS + [" ", "\n"], 40)
save("gpt2", byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), ODD + mixed)
save("qwen2", added(byte_level(split(Regex(QWEN2)), normalizers.NFC())), ODD + mixed + random_texts(
    ["<|im_start|>", "<|im_end|>", "[single]", "[left]", "[right]", "[both]", "caf\u00e9!", "cafe\u0301!", "ab", "abab", " ",
     "  ", "x", "_", "\n", "\u3000", "\u00e9"], 80))
save("llama3", byte_level(split(Regex(LLAMA3)), ignore_merges=True), ODD + mixed)
save("regex", byte_level(split(Regex(r"\s?[\p{L}\p{M}]+|\s?\d{1,2}|[^\s]"), "merged_with_next")), ODD[:23] + mixed[:20])
save("behaviors", byte_level(pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split("-", "merged_with_previous"),
    pre_tokenizers.Split(Regex(r"x"), "contiguous"), pre_tokenizers.Split("!", "removed"),
    pre_tokenizers.Split(Regex(r"[a-c]+"), "merged_with_next", invert=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False)])), ODD + mixed)
sentencepiece_model("sentencepiece", ODD + mixed, byte_fallback=True, remove_extra_whitespaces=False, vocab_size=420)
sentencepiece_model("sentencepiece-odd", ODD + mixed + ["USER: hi", "xUSERx", "a  b ab c"], edit=unuse, byte_fallback=False,
                    remove_extra_whitespaces=True, user_defined_symbols=["USER", "ab c", "-b-"], vocab_size=200,
                    character_coverage=0.98)
llama2 = bpe_from_sentencepiece("sentencepiece")
save("metaspace-always", metaspace("always", True, llama2, True, True), ODD + mixed[:20])
save("metaspace-first", metaspace("first", False, llama2, False, True), ODD + mixed[:20])
save("metaspace-never", metaspace("never", True, llama2, False, False), ODD + mixed[:20])
write("", "chats.json", chats())
