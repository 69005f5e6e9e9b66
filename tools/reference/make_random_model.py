#!/usr/bin/env python3
"""Write a Llama checkpoint of random bf16 weights, for measuring speed on real shapes.

    python3 tools/reference/make_random_model.py OUT_DIR [--shape 1b|3b|8b|tiny] [--seed N]

Needs no package. The tokenizer of tests/fixtures/tiny-llama2 is put beside the weights. The
weights are normal with a deviation of 0.02, drawn once for 4 million values and repeated in
shifted order: enough for speed, not for sense.
"""
import argparse
import array
import json
import os
import random
import shutil
import struct

SHAPES = {  # layers, hidden, mlp, heads, kv heads, head_dim, vocabulary
    "tiny": (2, 256, 688, 4, 2, 64, 2048),
    "1b": (16, 2048, 8192, 32, 8, 64, 128256),
    "3b": (28, 3072, 8192, 24, 8, 128, 128256),
    "8b": (32, 4096, 14336, 32, 8, 128, 128256),
}
POOL = 1 << 22  # values


def bf16(value):
    return struct.unpack("<I", struct.pack("<f", value))[0] + 0x8000 >> 16


def tensors(layers, hidden, mlp, heads, kv_heads, head_dim, vocab):
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,)
        yield p + "self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield p + "self_attn.k_proj.weight", (kv_heads * head_dim, hidden)
        yield p + "self_attn.v_proj.weight", (kv_heads * head_dim, hidden)
        yield p + "self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield p + "post_attention_layernorm.weight", (hidden,)
        yield p + "mlp.gate_proj.weight", (mlp, hidden)
        yield p + "mlp.up_proj.weight", (mlp, hidden)
        yield p + "mlp.down_proj.weight", (hidden, mlp)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    shape = SHAPES[args.shape]
    layers, hidden, mlp, heads, kv_heads, head_dim, vocab = shape
    os.makedirs(args.out, exist_ok=True)
    json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
               "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp,
               "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
               "vocab_size": vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
               "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
               "bos_token_id": 1, "eos_token_id": 2}, open(os.path.join(args.out, "config.json"), "w"), indent=2)
    fixture = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/fixtures/tiny-llama2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(fixture, name), args.out)

    rng = random.Random(args.seed)
    gauss = [bf16(rng.gauss(0, 0.02)) for _ in range(1 << 16)]
    pool = array.array("H", rng.choices(gauss, k=POOL)).tobytes()
    ones = array.array("H", [0x3F80] * max(hidden, 1)).tobytes()

    header, offset = {}, 0
    for name, dims in tensors(*shape):
        size = 2
        for n in dims:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(args.out, "model.safetensors"), "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors(*shape):
            left = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            if len(dims) == 1:
                out.write(ones[:left])
                continue
            while left > 0:
                start = 2 * rng.randrange(POOL // 2)
                piece = pool[start:start + left]
                out.write(piece)
                left -= len(piece)
    print(f"{args.out}: {offset / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
