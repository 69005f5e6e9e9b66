#!/usr/bin/env python3
"""Make tests/fixtures/config/cases.json: small config.json files, and what transformers makes of them.

Everything expected is read off the model that transformers builds (on the meta device, without
weights): sizes from the shapes of its parameters, biases and norms from their presence, windows
from its layers, rotary frequencies from its rotary embedding in float32.

    pip install transformers torch
    python3 tools/reference/make_config_cases.py > tests/fixtures/config/cases.json
"""
import json
import os
import sys
import tempfile

import torch
import transformers

SIZES = dict(hidden_size=256, intermediate_size=320, num_hidden_layers=4, num_attention_heads=32, vocab_size=96)


def llama(**keys):
    return dict(SIZES, architectures=["LlamaForCausalLM"], model_type="llama", **keys)


def mistral(**keys):
    return dict(SIZES, architectures=["MistralForCausalLM"], model_type="mistral", **keys)


def qwen2(**keys):
    return dict(SIZES, architectures=["Qwen2ForCausalLM"], model_type="qwen2", **keys)


def qwen3(**keys):
    return dict(SIZES, architectures=["Qwen3ForCausalLM"], model_type="qwen3", **keys)


LLAMA31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096)

CASES = {
    "llama, all defaults": llama(),
    "llama, no architectures": dict(SIZES, model_type="llama"),
    "llama, grouped heads": llama(num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama, one key head": llama(num_key_value_heads=1),
    "llama, null key heads": llama(num_key_value_heads=None),
    "llama, head_dim of its own": llama(head_dim=128, num_key_value_heads=4),
    "llama, biases": llama(attention_bias=True, mlp_bias=True),
    "llama, tied": llama(tie_word_embeddings=True),
    "llama, several end tokens": llama(bos_token_id=90, eos_token_id=[91, 92, 95]),
    "llama, no end token": llama(bos_token_id=None, eos_token_id=None),
    "llama, sliding_window is not its key": llama(sliding_window=64),
    "llama, theta": llama(rope_theta=500000.0, head_dim=128),
    "llama, theta in rope_parameters": llama(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "llama, theta in both": llama(rope_theta=1e6, rope_parameters=dict(rope_type="default", rope_theta=3e5)),
    "llama, theta at the top only": llama(rope_theta=1e6, rope_parameters=dict(rope_type="default")),
    "llama, null scaling": llama(rope_scaling=None, rope_theta=1e6),
    "llama, linear, old spelling": llama(rope_scaling=dict(type="linear", factor=4.0)),
    "llama, linear, new spelling": llama(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=5e5)),
    "llama, both spellings": llama(rope_scaling=dict(type="linear", factor=4.0), rope_parameters=dict(rope_type="default")),
    "llama 3.1": llama(head_dim=128, max_position_embeddings=131072, rope_theta=500000.0,
                       rope_scaling=dict(LLAMA31, rope_type="llama3")),
    "llama 3.2": llama(head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
                       rope_parameters=dict(LLAMA31, rope_type="llama3", factor=32.0, rope_theta=500000.0)),
    "yarn": llama(head_dim=128, max_position_embeddings=16384, rope_scaling=YARN),
    "yarn, new spelling": llama(head_dim=64, max_position_embeddings=16384, rope_parameters=dict(YARN, rope_theta=1e6)),
    "yarn, no original length": llama(head_dim=64, max_position_embeddings=8192,
                                      rope_scaling=dict(type="yarn", factor=8.0)),
    "yarn, original length at the top": llama(head_dim=64, max_position_embeddings=8192, rope_scaling=YARN,
                                              original_max_position_embeddings=2048),
    "yarn, ends not truncated": llama(head_dim=128, rope_scaling=dict(YARN, truncate=False)),
    "yarn, attention_factor": llama(head_dim=64, rope_scaling=dict(YARN, attention_factor=0.75)),
    "yarn, mscale": llama(head_dim=64, rope_scaling=dict(YARN, mscale=0.707, mscale_all_dim=1.2)),
    "yarn, one mscale": llama(head_dim=64, rope_scaling=dict(YARN, mscale=0.707)),
    "yarn, betas": llama(head_dim=64, rope_scaling=dict(YARN, beta_fast=16, beta_slow=2)),
    "yarn, small head": llama(head_dim=8, rope_scaling=dict(YARN, factor=16.0)),
    "mistral, all defaults": mistral(),
    "mistral, no window": mistral(sliding_window=None, num_key_value_heads=16),
    "mistral, window": mistral(sliding_window=64, rope_theta=1e6, head_dim=128),
    "qwen2, all defaults": qwen2(),
    "qwen2, window unused": qwen2(sliding_window=64, use_sliding_window=False, max_window_layers=2, num_key_value_heads=2),
    "qwen2, window of the last layers": qwen2(sliding_window=64, use_sliding_window=True, max_window_layers=1),
    "qwen2, null window": qwen2(sliding_window=None, use_sliding_window=True, max_window_layers=1),
    "qwen2, default window": qwen2(use_sliding_window=True, max_window_layers=3),
    "qwen2, layer_types": qwen2(sliding_window=64, use_sliding_window=True,
                                layer_types=["sliding_attention", "full_attention"] * 2),
    "qwen2, attention_bias is not its key": qwen2(attention_bias=False, tie_word_embeddings=True),
    "qwen3, all defaults": qwen3(),
    "qwen3, biases": qwen3(attention_bias=True, head_dim=64, num_key_value_heads=8, rope_theta=1e6),
    "qwen3, yarn": qwen3(rope_theta=1e6, rope_scaling=dict(YARN, original_max_position_embeddings=32768)),
}


def expectation(config_dict):
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "config.json"), "w") as file:
            json.dump(config_dict, file)
        config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    rope = type(model.model.rotary_emb)(config=config)
    attention = model.model.layers[0].self_attn
    eos = config.eos_token_id
    windows = [
        # Mistral keeps its window in the config, Qwen in each layer, Llama has none.
        config.sliding_window if config.model_type == "mistral" else getattr(layer.self_attn, "sliding_window", None)
        for layer in model.model.layers
    ]
    layer = "model.layers.0."
    return {
        "architecture": type(model).__name__,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": shapes["model.embed_tokens.weight"][1],
        "mlp_size": shapes[layer + "mlp.gate_proj.weight"][0],
        "n_layers": len(model.model.layers),
        "head_dim": attention.head_dim,
        "q_rows": shapes[layer + "self_attn.q_proj.weight"][0],
        "k_rows": shapes[layer + "self_attn.k_proj.weight"][0],
        "qkv_bias": layer + "self_attn.k_proj.bias" in shapes,
        "o_bias": layer + "self_attn.o_proj.bias" in shapes,
        "mlp_bias": layer + "mlp.down_proj.bias" in shapes,
        "qk_norm": layer + "self_attn.q_norm.weight" in shapes,
        "tied": config.tie_word_embeddings,
        "max_position": config.max_position_embeddings,
        "rms_norm_eps": model.model.norm.variance_epsilon,
        "bos": -1 if config.bos_token_id is None else config.bos_token_id,
        "eos": [] if eos is None else eos if isinstance(eos, list) else [eos],
        "windows": [window or 0 for window in windows],
        "frequency": [float(f) for f in rope.inv_freq.float()],
        "amplitude": float(rope.attention_scaling),
    }


def main():
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    cases = [{"name": name, "config": config, "expect": expectation(config)} for name, config in CASES.items()]
    lines = ",\n".join(json.dumps(case) for case in cases)
    sys.stdout.write(f'{{"made_with": "{made_with}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
