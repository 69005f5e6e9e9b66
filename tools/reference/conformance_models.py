"""The base models of the conformance matrix: random, small, and each odd in some way of its own.

They have 96 tokens, three layers, and weights large enough that attention is not uniform and the
logits differ by several nats: a wrong scale, mask or rotation anywhere is seen at the end.
"""
import json
import os

import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
LAYERS = 3
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

COMMON = dict(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, max_position_embeddings=128, rms_norm_eps=1e-5,
              bos_token_id=1, eos_token_id=2)
DEFAULT = dict(rope_type="default", rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)


def shape(hidden, mlp, heads, kv_heads, head_dim, tied, rope):
    return dict(COMMON, hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads,
                num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied, rope_parameters=rope)


# name: family, config. "old" below is the spelling of config.json before transformers 5.
MODELS = {
    "llama": ("llama", shape(64, 112, 4, 2, 16, False, DEFAULT)),
    "llama-tied": ("llama", shape(64, 96, 4, 1, 24, True, LLAMA3)),
    "llama-bias": ("llama", dict(shape(60, 100, 3, 3, 20, False, YARN), attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(shape(64, 112, 4, 2, 24, False, DEFAULT), sliding_window=8)),
    "mistral-tied": ("mistral", dict(shape(48, 80, 4, 4, 12, True, YARN), sliding_window=None)),
    "qwen2": ("qwen2", dict(shape(64, 112, 4, 2, 16, False, LINEAR), use_sliding_window=False)),
    "qwen2-tied": ("qwen2", dict(shape(56, 88, 4, 2, 14, True, DEFAULT), use_sliding_window=True, sliding_window=6,
                                 max_window_layers=1)),
    "qwen3": ("qwen3", dict(shape(64, 112, 4, 2, 32, False, DEFAULT), attention_bias=True)),
    "qwen3-tied": ("qwen3", shape(64, 112, 4, 4, 24, True, YARN)),
}
OLD_SPELLING = {"llama-tied", "qwen2", "mistral-tied"}


def write_tokenizer(directory):
    """96 tokens that merge nothing: the matrix speaks in ids, but a model directory has a tokenizer."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581"]
    pieces += [chr(c) for c in range(ord("!"), ord("!") + VOCABULARY - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(os.path.join(directory, "tokenizer.json"))


def randomise(model):
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        if name.endswith("norm.weight"):
            p.data = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            p.data = 0.3 * noise
        elif "lm_head" in name or "embed_tokens" in name:  # one matrix, where they are tied
            p.data = 2.0 * noise / p.shape[1] ** 0.5
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            p.data = gain * noise / p.shape[1] ** 0.5


def spell_old(path):
    config = json.load(open(path))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = dict(rope, type=kind) if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    json.dump(config, open(path, "w"), indent=2)


def write_model(directory, name, weights):
    """The model `name` in the dtype `weights`; the values depend on both names only."""
    family, keys = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys), dtype=torch.float32)
    randomise(model)
    model.tie_weights()
    model.generation_config.eos_token_id = 2
    model.to(DTYPES[weights]).save_pretrained(directory)
    if name in OLD_SPELLING:
        spell_old(os.path.join(directory, "config.json"))
    write_tokenizer(directory)


def read_model(directory, dtype):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype]).eval()
