"""Makes small random models, an adapter for each feature of PEFT's LoRA, and what PEFT says of them.

python3 make_peft_cases.py OUT_DIR        (torch, transformers, peft, safetensors; a CPU is enough)

Every adapter is saved by PEFT, read back by PEFT over a fresh base in float32, and scored: log-probabilities of
a prompt's tokens, and of all tokens that could follow it. OUT_DIR/cases.json holds them.
"""
import json, os, shutil, sys, warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as lora_layer, variants
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

warnings.filterwarnings("ignore")
OUT = sys.argv[1]
VOCAB, LENGTH = 64, 14
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
MODELS = {
    "llama": (LlamaConfig(tie_word_embeddings=False, **SIZES), torch.float32),
    "llama-tied": (LlamaConfig(tie_word_embeddings=True, **SIZES), torch.bfloat16),
    "qwen2": (Qwen2Config(tie_word_embeddings=False, **SIZES), torch.bfloat16),
    "qwen3-tied": (Qwen3Config(tie_word_embeddings=True, head_dim=16, **SIZES), torch.float32),
    "mistral": (MistralConfig(tie_word_embeddings=False, sliding_window=6, **SIZES), torch.float32),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
BLOCKS = BdLoraConfig(target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2)


def lora(r=4, alpha=6, targets=QV, **more):
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets, **more)


# name -> config, or (config, how it is saved)
CASES = {
    "llama": {
        "plain": lora(targets=LINEARS),
        "dora": lora(targets=LINEARS, use_dora=True),
        "dora-rslora": lora(r=3, use_dora=True, use_rslora=True, rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 3}),
        "dora-head": lora(targets=["k_proj", "lm_head"], use_dora=True),
        "dora-embed": lora(targets=["down_proj", "embed_tokens"], use_dora=True),
        "lora-bias": lora(targets=LINEARS, lora_bias=True),
        "head": lora(targets=["v_proj", "lm_head"]),
        "head-bias": lora(targets=["lm_head"], lora_bias=True),
        "embed": lora(targets=["q_proj", "embed_tokens"]),
        "embed-head": lora(r=7, targets=["embed_tokens", "lm_head"], use_rslora=True),
        "saved-embed": lora(modules_to_save=["embed_tokens"]),
        "saved-head": lora(modules_to_save=["lm_head"]),
        "saved-both": lora(targets=["o_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        "saved-norms": lora(modules_to_save=["input_layernorm", "model.norm"]),
        "saved-all": lora(targets=LINEARS, use_dora=True, modules_to_save=["norm", "lm_head", "embed_tokens"]),
        "tokens": lora(trainable_token_indices=[9, 3, 40]),
        "tokens-head": lora(trainable_token_indices={"embed_tokens": [9, 3], "lm_head": [5, 60, 11]}),
        "alora": lora(targets=LINEARS, alora_invocation_tokens=[7, 8]),
        "alora-absent": lora(targets=LINEARS, alora_invocation_tokens=[8, 7, 8]),
        "alora-bias": lora(targets=["up_proj", "lm_head"], alora_invocation_tokens=[9], lora_bias=True),
        "bdlora": lora(targets=["q_proj", "o_proj", "up_proj", "down_proj"], use_bdlora=BLOCKS),
        "qalora": lora(targets=["q_proj", "down_proj"], use_qalora=True, qalora_group_size=8),
        "pissa": lora(targets=["q_proj", "down_proj"], init_lora_weights="pissa"),
    },
    "llama-tied": {
        "embed": lora(targets=["q_proj", "embed_tokens"]),
        "head": lora(targets=["q_proj", "lm_head"]),
        "embed-tied": lora(targets=["v_proj", "embed_tokens"], ensure_weight_tying=True),
        "embed-tied-alone": (lora(targets=["v_proj", "embed_tokens"], ensure_weight_tying=True), "alone"),
        "dora-tied": lora(targets=["v_proj", "embed_tokens"], ensure_weight_tying=True, use_dora=True),
        "head-tied": lora(targets=["v_proj", "lm_head"], ensure_weight_tying=True, alpha_pattern={"lm_head": 3}),
        "embed-copied": (lora(targets=["q_proj"]), "copy"),
        "embed-copy-changed": (lora(targets=["q_proj", "embed_tokens"]), "changed"),
        "saved-embed": lora(modules_to_save=["embed_tokens"]),
        "saved-head": lora(modules_to_save=["lm_head"]),
        "saved-tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "tokens": lora(trainable_token_indices=[9, 3, 40]),
        "tokens-apart": lora(trainable_token_indices={"embed_tokens": [9, 3], "lm_head": [5, 60, 11]}),
        "tokens-same": lora(trainable_token_indices={"embed_tokens": [9, 3], "lm_head": [9, 3]}),
        "tokens-head": lora(trainable_token_indices={"lm_head": [60, 11]}),
        "dora": lora(targets=LINEARS, use_dora=True),
    },
    "qwen2": {
        "dora": lora(targets=LINEARS, use_dora=True),
        "lora-bias": lora(targets=["q_proj", "k_proj", "o_proj"], lora_bias=True),
        "bias-all": lora(bias="all"),
        "bias-lora-only": lora(targets=["q_proj", "o_proj"], bias="lora_only"),
        "bias-dora": lora(targets=["q_proj", "k_proj"], bias="all", use_dora=True),
        "all": lora(targets=LINEARS + ["embed_tokens"], bias="all", use_dora=True, modules_to_save=["norm", "lm_head"]),
    },
    "qwen3-tied": {
        "saved-norms": lora(modules_to_save=["norm"]),
        "saved-q-norm": lora(modules_to_save=["q_norm"]),
        "dora": lora(targets=LINEARS, use_dora=True),
    },
    "mistral": {
        "list": lora(targets=["o_proj", "mlp.up_proj", "model.layers.1.self_attn.k_proj"]),
        "regex": lora(targets=r"model\.layers\.\d+\.(self_attn\.[qk]|mlp\.down)_proj"),
        "all-linear": lora(targets="all-linear"),
        "exclude-list": lora(targets=LINEARS, exclude_modules=["k_proj", "layers.0.mlp.gate_proj"]),
        "exclude-regex": lora(targets="all-linear", exclude_modules=r".*\.1\.self_attn\..*"),
        "layers": lora(targets=LINEARS, layers_to_transform=[1]),
        "layers-pattern": lora(targets=LINEARS, layers_to_transform=0, layers_pattern="layers"),
        # the first key that matches counts, in the file's order: here it is not the sorted one
        "patterns": lora(rank_pattern={"v_proj": 2, ".*_proj": 5}, alpha_pattern={"q_proj": 3, ".*_proj": 12}),
        "patterns-wide": lora(rank_pattern={".*_proj": 5, "v_proj": 2}, alpha_pattern={".*_proj": 12, "q_proj": 3}),
        "dora": lora(targets="all-linear", use_dora=True),
    },
}


def change(model):
    """Random values for all that the adapter has; as large as the base's, so that a slip shows."""
    for name, p in model.named_parameters():
        last = name.split(".")[-1]
        if "magnitude" in name:
            p.data *= 0.6 + 0.8 * torch.rand(p.shape)
        elif "modules_to_save" in name and p.ndim == 1:
            p.data *= 0.6 + 0.8 * torch.rand(p.shape)
        elif "modules_to_save" in name or "trainable_tokens_delta" in name:
            p.data.copy_(torch.randn(p.shape) * 0.25)  # in place: tied ones stay tied
        elif "lora_" in name:
            p.data.copy_(torch.randn(p.shape) * 0.25)
        elif last == "bias" and model.peft_config["default"].bias != "none" and p.requires_grad:
            p.data += torch.randn(p.shape).to(p) * 0.3


def fresh(model):
    return AutoModelForCausalLM.from_pretrained(f"{OUT}/{model}", dtype=torch.float32)


def score(model, ids):
    with torch.no_grad():
        lp = torch.log_softmax(model.float().eval()(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return [round(lp[i, t].item(), 7) for i, t in enumerate(ids[1:])], [round(v, 7) for v in lp[-1].tolist()]


def make(model, name, config, ids):
    how = None
    if isinstance(config, tuple):
        config, how = config
    where = f"{OUT}/{model}/adapters/{name}"
    peft = get_peft_model(fresh(model), config)
    if config.init_lora_weights == "pissa":
        peft.peft_config["default"].init_lora_weights = True
        peft.save_pretrained(f"{where}/initial")
        peft.peft_config["default"].init_lora_weights = "pissa"
    change(peft)
    if config.init_lora_weights == "pissa":
        peft.save_pretrained(where, path_initial_model_for_weight_conversion=f"{where}/initial")
        shutil.rmtree(f"{where}/initial", ignore_errors=True)
    else:
        peft.save_pretrained(where, save_embedding_layers=how in ("copy", "changed"))
    if os.path.exists(f"{where}/README.md"):
        os.remove(f"{where}/README.md")
    path = f"{where}/adapter_model.safetensors"
    tensors = load_file(path)
    if how == "alone":
        tensors = {k: v for k, v in tensors.items() if "lm_head" not in k}
    if how == "changed":
        key = next(k for k in tensors if k.endswith("embed_tokens.base_layer.weight"))
        tensors[key] = torch.randn(tensors[key].shape) * 0.25
    if model != "llama":
        tensors = {k: v.to(torch.bfloat16) for k, v in tensors.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    settings = json.load(open(f"{where}/adapter_config.json"))
    settings["base_model_name_or_path"] = model
    for field in ("target_modules", "exclude_modules"):  # PEFT holds lists as sets
        if isinstance(settings[field], list):
            settings[field].sort()
    for field in ("rank_pattern", "alpha_pattern"):  # PEFT writes keys sorted, and reads them in the file's order
        settings[field] = getattr(config, field)
    json.dump(settings, open(f"{where}/adapter_config.json", "w"), indent=1)
    logprobs, following = score(PeftModel.from_pretrained(fresh(model), where), ids)
    return {"name": name, "ids": ids, "logprobs": logprobs, "next": following}


def main():
    # QA-LoRA is written for GPTQ layers; its arithmetic is the same over a plain linear
    resolve = lora_layer.Linear.resolve_lora_variant
    lora_layer.Linear.resolve_lora_variant = lambda self, *, config, **k: (
        variants.QALoraLinearVariant() if config.use_qalora else resolve(self, config=config, **k))
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(0)
    result = []
    for model, (config, dtype) in MODELS.items():
        base = AutoModelForCausalLM.from_config(config)
        for name, p in base.named_parameters():
            p.data = (1 + 0.2 * torch.randn(p.shape)) if "norm" in name else torch.randn(p.shape) * 0.25
        base.to(dtype).save_pretrained(f"{OUT}/{model}")
        ids = torch.randint(3, VOCAB, (LENGTH,)).tolist()
        ids[0], ids[3], ids[5:7], ids[9:11] = 1, 9, [7, 8], [7, 8]
        logprobs, following = score(fresh(model), ids)
        cases = [{"name": "base", "ids": ids, "logprobs": logprobs, "next": following}]
        for name, adapter in CASES[model].items():
            cases.append(make(model, name, adapter, ids))
            moved = max(abs(a - b) for a, b in zip(cases[-1]["next"], following))
            print(f"{model:11} {name:20} moves the next token by {moved:.3f}", flush=True)
            assert (moved < 1e-5) == (name in ("alora-absent",)), name
        result.append({"model": model, "cases": cases})
    json.dump(result, open(f"{OUT}/cases.json", "w"), separators=(",", ":"))


main()
