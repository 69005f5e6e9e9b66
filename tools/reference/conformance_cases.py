"""The cases of the conformance matrix: what adapter, on which model, and what must come of it.

An adapter is made by PEFT itself: get_peft_model, random values where training would have put its
own, save_pretrained. A case may then edit the files, for what other programs write. Where the edit
must not change what is computed, the reference keeps the files as they were before.
"""
import copy
import json
import os
import shutil
import zlib
from dataclasses import dataclass, field

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conformance_models import DTYPES, LAYERS, VOCABULARY

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = ATTENTION + ["gate_proj", "up_proj", "down_proj"]
INVOCATION = [7, 8, 9]
TOKENS = [5, 17, 40, 95]  # those that trainable_token_indices replaces; some prompts have them


# ---- prompts --------------------------------------------------------------------------------


def random_ids(n, seed):
    """Ids that are neither special, nor of the invocation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCABULARY, (n,), generator=generator).tolist()


# One token; less and more than a block of the KV cache, and than every sliding window.
PROMPTS = [random_ids(1, 1), random_ids(6, 2), random_ids(17, 3), TOKENS + random_ids(20, 4), random_ids(33, 5),
           random_ids(20, 6) + TOKENS[::-1] + random_ids(16, 7)]
MORE = [random_ids(40, 20 + i) for i in range(10)]  # for the statistics of bf16
INVOKED = [random_ids(12, 1) + INVOCATION + random_ids(14, 2), INVOCATION + random_ids(20, 3),
           random_ids(18, 4) + INVOCATION, random_ids(5, 5) + INVOCATION + random_ids(6, 6) + INVOCATION + random_ids(9, 7),
           random_ids(9, 8) + INVOCATION[:2] + random_ids(4, 9), random_ids(30, 10) + INVOCATION + [7, 8] + random_ids(3, 11)]
NOT_INVOKED = [random_ids(24, 1), random_ids(9, 2) + INVOCATION[:2] + random_ids(7, 3), INVOCATION[::-1] + random_ids(9, 4)]


# ---- adapters -------------------------------------------------------------------------------


def randomise(model):
    """Values as large as training gives: LoRA's part is about 0.4 of its layer's output."""
    scales = {}
    for name, module in model.named_modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            scales[name] = abs(module.scaling.get("default", 1.0)) or 1.0
    embedding = model.get_input_embeddings()
    spread = getattr(embedding, "weight", torch.ones(1)).std().item()

    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        owner = name.split(".lora_")[0]
        if "lora_embedding_A" in name:
            p.data = noise
        elif "lora_embedding_B" in name:
            p.data = 0.6 * spread * noise / (scales[owner] * p.shape[1] ** 0.5)
        elif "lora_A" in name:
            p.data = noise / p.shape[-1] ** 0.5
        elif "lora_B" in name and name.endswith("bias"):
            p.data = 0.3 * noise / scales[owner]
        elif "lora_B" in name:
            p.data = 0.4 * noise / (scales[owner] * p.shape[-1] ** 0.5)
        elif "lora_magnitude" in name:
            p.data = p.data * (1.0 + 0.3 * noise)
        elif "modules_to_save" in name:
            p.data = p.data + (0.3 if p.dim() == 1 else 0.5 * p.std().item()) * noise
        elif "trainable_tokens_delta" in name:
            p.data = spread * noise
        elif p.requires_grad:
            p.data = p.data + 0.3 * noise


def cast(directory, dtypes):
    """Store the tensors in these dtypes, one after the other."""
    path = os.path.join(directory, "adapter_model.safetensors")
    tensors = load_file(path)
    names = sorted(tensors)
    save_file({n: tensors[n].to(DTYPES[dtypes[i % len(dtypes)]]).contiguous() for i, n in enumerate(names)}, path,
              {"format": "pt"})


def lora(edit=None, stored=None, save=None, **keys):
    """PEFT's LoRA with `keys`; `edit` changes the files that mlora gets, not those of the reference."""

    def make(base, directory):
        config = LoraConfig(**dict(dict(task_type="CAUSAL_LM", r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
                                   **copy.deepcopy(keys)))
        model = get_peft_model(copy.deepcopy(base), config)
        randomise(model)
        model.save_pretrained(f"{directory}/adapter", **(save or {}))
        if stored:
            cast(f"{directory}/adapter", stored)
        if edit:
            shutil.copytree(f"{directory}/adapter", f"{directory}/reference")
            edit(f"{directory}/adapter")

    return make


def both(make, edit):
    """`make`, then the same edit for mlora and the reference."""

    def made(base, directory):
        make(base, directory)
        edit(f"{directory}/adapter")

    return made


def converted(kind, **keys):
    """An initialisation that changes the base, saved by PEFT as an adapter of the base as it was."""

    def make(base, directory):
        config = LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=6, target_modules=LINEARS, init_lora_weights=kind, **keys)
        model = get_peft_model(copy.deepcopy(base), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(f"{directory}/initial")
        model.peft_config["default"].init_lora_weights = kind
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data + 0.3 * p.std() * torch.randn(p.shape)
        model.save_pretrained(f"{directory}/adapter", path_initial_model_for_weight_conversion=f"{directory}/initial")

    return make


def qalora(group, **keys):
    """QA-LoRA's files: A is [r, in / group]. PEFT makes them for GPTQ layers only."""

    def edit(directory):
        path = os.path.join(directory, "adapter_model.safetensors")
        tensors = load_file(path)
        for name in tensors:
            if "lora_A" in name:  # the pooled inputs are sums of `group` values, divided by it, times the groups
                pooled = tensors[name][:, ::group].contiguous()
                tensors[name] = pooled * group ** 0.5 / pooled.shape[1] * group ** 0.5
        save_file(tensors, path, {"format": "pt"})

    return both(lora(use_qalora=True, qalora_group_size=group, **keys), edit)


def other(config, randomised=True):
    """A PEFT adapter of another kind than LoRA, as PEFT saves it."""

    def make(base, directory):
        model = get_peft_model(copy.deepcopy(base), config())
        if randomised:
            for p in model.parameters():
                if p.requires_grad:
                    p.data = p.data + 0.1 * torch.randn(p.shape)
        model.save_pretrained(f"{directory}/adapter")

    return make


# ---- edits of the files ---------------------------------------------------------------------


def config_edit(**values):
    def edit(directory):
        path = os.path.join(directory, "adapter_config.json")
        config = json.load(open(path))
        config.update(values)
        json.dump(config, open(path, "w"), indent=2)

    return edit


def config_text(change):
    def edit(directory):
        path = os.path.join(directory, "adapter_config.json")
        text = open(path).read()
        open(path, "w").write(change(text))

    return edit


def tensor_edit(change):
    """`change` takes and returns the dictionary of tensors."""

    def edit(directory):
        path = os.path.join(directory, "adapter_model.safetensors")
        save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path, {"format": "pt"})

    return edit


def rename(change):
    return tensor_edit(lambda tensors: {change(n): t for n, t in tensors.items()})


def fused(tensors):
    """One A and a stacked B for q, k, v and for gate, up."""
    out = {}
    for name, t in tensors.items():
        for parts, whole in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
            if parts[0] in name:
                out[name.replace(parts[0], whole)] = torch.cat([tensors[name.replace(parts[0], p)] for p in parts]) \
                    if "lora_B" in name else t
    return out


def fuse_edit(directory):
    tensor_edit(fused)(directory)
    config_edit(target_modules=["qkv_proj", "gate_up_proj"])(directory)


def share_a(directory):
    """q, k, v and gate, up get the A of the first of them, as a fused linear has one A."""

    def change(tensors):
        for name in tensors:
            if "lora_A" in name:
                for part, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
                    if part in name:
                        tensors[name] = tensors[name.replace(part, first)].clone()
        return tensors

    tensor_edit(change)(directory)


def fused_names(base, directory):
    lora(target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])(base, directory)
    share_a(f"{directory}/adapter")
    shutil.copytree(f"{directory}/adapter", f"{directory}/reference")
    fuse_edit(f"{directory}/adapter")


def add_tensor(name, *shape):
    return tensor_edit(lambda tensors: dict(tensors, **{name: torch.ones(shape)}))


def drop(part):
    return tensor_edit(lambda tensors: {n: t for n, t in tensors.items() if part not in n})


def keep(part):
    return tensor_edit(lambda tensors: {n: t for n, t in tensors.items() if part in n})


def untie(directory):
    config_edit(ensure_weight_tying=False)(directory)
    drop("lm_head")(directory)


def pickle_only(directory):
    path = os.path.join(directory, "adapter_model.safetensors")
    torch.save(load_file(path), os.path.join(directory, "adapter_model.bin"))
    os.remove(path)


def pickle_too(directory):
    torch.save({}, os.path.join(directory, "adapter_model.bin"))


def truncate(directory):
    path = os.path.join(directory, "adapter_model.safetensors")
    os.truncate(path, os.path.getsize(path) - 100)


def remove_file(name):
    return lambda directory: os.remove(os.path.join(directory, name))


def magnitudes(change):
    return tensor_edit(lambda tensors: dict(change(n, t) if "magnitude" in n else (n, t) for n, t in tensors.items()))


# ---- the list -------------------------------------------------------------------------------


@dataclass
class Case:
    name: str
    model: str
    weights: str  # the dtype in which the model is stored
    make: object  # (base model, directory): writes directory/adapter and, if it differs, directory/reference
    refused: str = None  # must be refused, by a message with these words
    prompts: list = field(default_factory=lambda: PROMPTS)
    lenient: bool = False
    without: object = None  # configuration values or an edit that take the feature away: the reference must differ then
    same_as_base: bool = False  # else it must differ from the base
    qalora: bool = False
    fixture: bool = False  # ships with its values, for tests without Python

    @property
    def seed(self):
        return zlib.crc32(f"{self.name}/{self.model}/{self.weights}".encode())


UNTIED = ["llama", "mistral", "qwen2", "qwen3"]
TIED = ["llama-tied", "mistral-tied", "qwen2-tied", "qwen3-tied"]
MIXED = ["llama-bias", "mistral", "qwen2-tied", "qwen3"]
BIASED = ["llama-bias", "qwen2", "qwen2-tied", "qwen3"]

RANKS = {"layers.0.self_attn.q_proj": 3, "v_proj": 16, r"layers\.[12]\.mlp\..*": 5}
ALPHAS = {"q_proj": 30, r"layers\.1\..*": 3.5, r".*mlp\.up_proj": 20, r"^model\.layers\.2\.self_attn\.o_proj": 7}
# The first match counts. PEFT sorts the keys when it saves: ranks in another order it could not load again.
OVERLAP = {"k_proj": 6, r"layers\..*\.q_proj": 2, r"layers\.0\..*": 4, "q_proj": 12}
UNSORTED = {"q_proj": 30, r"layers\.0\..*": 4, r"layers\..*\.q_proj": 2, "k_proj": 6}


def features():
    """Name, models, arguments of Case. The weights of the models alternate between f32 and bf16."""
    yield "plain", UNTIED, dict(make=lora())
    yield "plain, all seven linears", TIED, dict(make=lora(target_modules=LINEARS))
    yield "all-linear", MIXED, dict(make=lora(config_edit(target_modules="all-linear"), target_modules="all-linear"))
    yield "rsLoRA", UNTIED, dict(make=lora(use_rslora=True, r=16, lora_alpha=4, target_modules=LINEARS),
                                 without=dict(use_rslora=False))
    yield "rank_pattern", TIED, dict(make=lora(rank_pattern=RANKS, target_modules=LINEARS))
    yield "alpha_pattern", UNTIED, dict(make=lora(alpha_pattern=ALPHAS, target_modules=LINEARS), without=dict(alpha_pattern={}))
    yield "rank_pattern and alpha_pattern, rsLoRA", MIXED, dict(
        make=lora(rank_pattern=OVERLAP, alpha_pattern=OVERLAP, use_rslora=True, target_modules=LINEARS),
        without=dict(alpha_pattern={}))
    yield "patterns whose keys overlap", TIED[:2] + UNTIED[2:], dict(
        make=lora(rank_pattern=OVERLAP, alpha_pattern=ALPHAS, target_modules=LINEARS), without=dict(alpha_pattern={}))
    yield "alpha_pattern whose keys are not sorted", UNTIED[:2], dict(
        make=both(lora(target_modules=ATTENTION), config_edit(alpha_pattern=UNSORTED)),
        without=dict(alpha_pattern=dict(sorted(UNSORTED.items()))))
    yield "target_modules as regex", UNTIED, dict(
        make=lora(target_modules=r"model\.layers\.[02]\.(self_attn\.(q|o)_proj|mlp\..*_proj)"))
    yield "exclude_modules as list", TIED[:2], dict(
        make=lora(target_modules=LINEARS, exclude_modules=["o_proj", "layers.1.mlp.up_proj"]))
    yield "exclude_modules as regex", UNTIED[2:], dict(
        make=lora(target_modules="all-linear", exclude_modules=r".*layers\.1\..*|.*down_proj"))
    yield "layers_to_transform", UNTIED, dict(make=lora(target_modules=ATTENTION, layers_to_transform=[0, 2]))
    yield "layers_pattern", MIXED[:2], dict(make=lora(target_modules=LINEARS, layers_to_transform=1, layers_pattern="layers"))

    yield "DoRA", UNTIED, dict(make=lora(use_dora=True), without=dict(use_dora=False))
    yield "DoRA, all seven linears", TIED, dict(make=lora(use_dora=True, target_modules=LINEARS), without=dict(use_dora=False))
    yield "DoRA, rsLoRA, patterns", MIXED, dict(
        make=lora(use_dora=True, use_rslora=True, rank_pattern=RANKS, alpha_pattern=ALPHAS, target_modules=LINEARS),
        without=dict(use_dora=False))
    yield "lora_bias", UNTIED, dict(make=lora(lora_bias=True, target_modules=LINEARS), without=dict(lora_bias=False))
    yield "bias=all", BIASED, dict(make=lora(bias="all"), without=dict(bias="none"))
    yield "bias=lora_only", BIASED, dict(make=lora(bias="lora_only", target_modules=ATTENTION), without=dict(bias="none"))
    yield "bias=all, DoRA", BIASED[:2], dict(make=lora(bias="all", use_dora=True, target_modules=LINEARS))

    yield "modules_to_save embed_tokens", UNTIED, dict(make=lora(modules_to_save=["embed_tokens"]), without=dict(modules_to_save=None))
    yield "modules_to_save embed_tokens, tied", TIED, dict(make=lora(modules_to_save=["embed_tokens"]), without=dict(modules_to_save=None))
    yield "modules_to_save lm_head", UNTIED, dict(make=lora(modules_to_save=["lm_head"]), without=dict(modules_to_save=None))
    yield "modules_to_save lm_head, tied", TIED[:2], dict(make=lora(modules_to_save=["lm_head"]), without=dict(modules_to_save=None))
    yield "modules_to_save norm", MIXED, dict(make=lora(modules_to_save=["norm"]), without=dict(modules_to_save=None))
    yield "modules_to_save embed_tokens, lm_head, norms", UNTIED[1:3], dict(
        make=lora(modules_to_save=["embed_tokens", "lm_head", "model.norm", "input_layernorm"], target_modules=LINEARS),
        without=dict(modules_to_save=None))
    yield "modules_to_save, ensure_weight_tying", TIED, dict(
        make=lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), without=untie)

    yield "LoRA on embed_tokens", UNTIED, dict(make=lora(target_modules=["embed_tokens", "q_proj"]))
    yield "LoRA on embed_tokens, tied", TIED, dict(
        make=lora(target_modules=["embed_tokens", "q_proj"], use_rslora=True), without=dict(use_rslora=False))
    yield "LoRA on embed_tokens, ensure_weight_tying", TIED, dict(
        make=lora(target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True), without=dict(ensure_weight_tying=False))
    yield "LoRA on lm_head", UNTIED, dict(make=lora(target_modules=["lm_head", "down_proj"]))
    yield "LoRA on lm_head, tied", TIED[:2], dict(make=lora(target_modules=["lm_head", "down_proj"]))
    yield "LoRA on embed_tokens and lm_head", UNTIED[:2], dict(
        make=lora(target_modules=["embed_tokens", "lm_head"], alpha_pattern={"lm_head": 40}), without=dict(alpha_pattern={}))
    yield "trainable_token_indices", UNTIED, dict(
        make=lora(trainable_token_indices=TOKENS), without=dict(trainable_token_indices=None))
    yield "trainable_token_indices, tied", TIED, dict(
        make=lora(trainable_token_indices={"embed_tokens": TOKENS}), without=dict(trainable_token_indices=None))
    yield "trainable_token_indices of both layers", UNTIED[:2], dict(
        make=lora(trainable_token_indices={"embed_tokens": TOKENS[:2], "lm_head": TOKENS[1:]}))
    yield "trainable_token_indices, ensure_weight_tying", TIED[2:], dict(
        make=lora(trainable_token_indices=TOKENS, ensure_weight_tying=True))

    alora = dict(alora_invocation_tokens=INVOCATION, target_modules=LINEARS)
    yield "aLoRA", UNTIED, dict(make=lora(**alora), prompts=INVOKED, without=dict(alora_invocation_tokens=None))
    yield "aLoRA that is not invoked", TIED[:2], dict(make=lora(**alora), prompts=NOT_INVOKED, same_as_base=True)
    yield "PiSSA, converted", UNTIED, dict(make=converted("pissa"))
    yield "OLoRA, converted", TIED[:2] + UNTIED[2:], dict(make=converted("olora"))
    bd = dict(target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    yield "BD-LoRA", UNTIED, dict(make=lora(use_bdlora=peft.BdLoraConfig(nblocks=2, **bd), target_modules=LINEARS))
    yield "BD-LoRA, some linears", TIED[:1], dict(
        make=lora(use_bdlora=peft.BdLoraConfig(nblocks=4, match_strict=False, target_modules_bd_a=["o_proj"]), target_modules=ATTENTION))
    yield "QA-LoRA", UNTIED[:2], dict(make=qalora(4, target_modules=LINEARS), qalora=True)


def singles():
    """Name, model, weights, arguments of Case."""
    yield "rank 1", "llama", "f32", dict(make=lora(r=1, target_modules=LINEARS))
    yield "rank larger than every width", "qwen3-tied", "f32", dict(make=lora(r=150, target_modules=LINEARS))
    yield "rank 512", "llama-bias", "f32", dict(make=lora(r=512))
    yield "ranks 1, 7 and 33", "mistral", "bf16", dict(make=lora(rank_pattern={"q_proj": 1, "k_proj": 7, "o_proj": 33}, target_modules=ATTENTION))
    yield "lora_alpha 0", "llama", "f32", dict(make=lora(lora_alpha=0), same_as_base=True)
    yield "lora_alpha negative", "qwen2", "f32", dict(make=lora(lora_alpha=-9))
    yield "lora_alpha 0.7", "qwen3", "bf16", dict(make=both(lora(), config_edit(lora_alpha=0.7)))
    yield "adapter stored as f16", "llama", "f32", dict(make=lora(stored=["f16"], target_modules=LINEARS))
    yield "adapter stored as f16", "mistral", "bf16", dict(make=lora(stored=["f16"], target_modules=LINEARS))
    yield "adapter stored as bf16", "qwen2-tied", "f32", dict(make=lora(stored=["bf16"], target_modules=LINEARS))
    yield "adapter stored as bf16", "qwen3", "bf16", dict(make=lora(stored=["bf16"], target_modules=LINEARS))
    yield "adapter stored as f32, bf16 and f16", "llama-tied", "f32", dict(make=lora(stored=["f32", "bf16", "f16"], target_modules=LINEARS))
    yield "DoRA stored as bf16", "llama", "bf16", dict(make=lora(stored=["bf16"], use_dora=True, target_modules=LINEARS), without=dict(use_dora=False))
    yield "base stored as f16", "llama", "f16", dict(make=lora(target_modules=LINEARS))
    yield "base stored as f16, DoRA", "qwen2", "f16", dict(make=lora(use_dora=True))
    yield "DoRA on embed_tokens", "llama", "f32", dict(make=lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]))
    yield "DoRA on lm_head", "qwen2", "f32", dict(make=lora(use_dora=True, target_modules=["lm_head", "q_proj"]))
    yield "lora_bias on lm_head", "mistral", "f32", dict(make=lora(lora_bias=True, target_modules=["lm_head"]))
    yield "aLoRA of one token", "qwen3", "bf16", dict(make=lora(alora_invocation_tokens=[7]), prompts=INVOKED,
                                                      without=dict(alora_invocation_tokens=None))
    yield "modules_to_save down_proj", "llama", "f32", dict(make=lora(modules_to_save=["down_proj"]))
    yield "modules_to_save beats target_modules", "mistral", "f32", dict(
        make=lora(modules_to_save=["lm_head"], target_modules=["lm_head", "q_proj"]), without=dict(modules_to_save=None))
    yield "a whole lm_head.weight beside the factors", "llama", "f32", dict(
        make=both(lora(modules_to_save=["lm_head"]), config_edit(modules_to_save=None)), without=drop("lm_head"))
    yield "whole norm weights beside the factors", "qwen3", "f32", dict(
        make=both(lora(modules_to_save=["norm"]), config_edit(modules_to_save=None)), without=drop("norm"))
    yield "target_modules null", "qwen2", "f32", dict(make=lora(config_edit(target_modules=None), target_modules=None))
    yield "target_modules by whole names", "qwen3", "bf16", dict(
        make=lora(target_modules=["model.layers.1.self_attn.q_proj", "self_attn.o_proj", "model.layers.0.mlp.up_proj"]))
    yield "init gaussian", "llama", "f32", dict(make=lora(init_lora_weights="gaussian"))
    yield "init orthogonal", "qwen2", "f32", dict(make=lora(init_lora_weights="orthogonal"))
    yield "init MiCA", "qwen3", "f32", dict(make=lora(init_lora_weights="mica", r=4))
    yield "VeLoRA", "mistral", "f32", dict(make=lora(velora_config=peft.VeloraConfig(num_groups=16)))
    yield "MonteCLoRA", "llama", "f32", dict(make=lora(monteclora_config=peft.MontecloraConfig(num_samples=2)))
    yield "lora_dropout 0.5, fan_in_fan_out", "llama", "f32", dict(make=both(lora(lora_dropout=0.5), config_edit(fan_in_fan_out=True)))
    yield "QA-LoRA flag on a plain linear", "llama", "f32", dict(make=lora(use_qalora=True))
    yield "a target without tensors", "llama", "f32", dict(make=both(lora(target_modules=LINEARS), drop("layers.1.mlp")))
    yield "no tensors at all", "qwen2", "f32", dict(make=both(lora(), drop("lora_")), same_as_base=True)
    yield "a pickle beside the safetensors", "llama", "f32", dict(make=lora(pickle_too))
    yield "save_embedding_layers on a plain adapter", "llama", "f32", dict(make=lora(save=dict(save_embedding_layers=True)))
    yield "save_embedding_layers on a plain adapter, lenient", "llama", "f32", dict(
        make=lora(save=dict(save_embedding_layers=True)), lenient=True)
    yield "LoRA on embed_tokens, base not copied", "qwen3", "f32", dict(
        make=lora(target_modules=["embed_tokens", "k_proj"], save=dict(save_embedding_layers=False)))
    yield "an unknown field that is null", "llama", "f32", dict(make=lora(config_edit(some_new_field=None, another={})))
    yield "untargeted tensors, lenient", "llama", "f32", dict(
        make=both(lora(target_modules=ATTENTION), config_edit(target_modules=["q_proj", "v_proj"])), lenient=True)
    yield "unknown tensors, lenient", "qwen2", "f32", dict(make=lora(add_tensor("base_model.model.vision.lora_A.weight", 8, 64)), lenient=True)

    wild = dict(target_modules=LINEARS)
    yield "names: .default. left in", "llama", "f32", dict(make=lora(rename(lambda n: n.replace(".weight", ".default.weight")), **wild))
    yield "names: no prefix", "mistral", "f32", dict(make=lora(rename(lambda n: n.removeprefix("base_model.model.")), **wild))
    yield "names: no prefix, no model.", "qwen3", "f32", dict(make=lora(rename(lambda n: n.removeprefix("base_model.model.model.")), **wild))
    yield "names: prefix twice", "qwen2", "f32", dict(make=lora(rename(lambda n: "base_model.model." + n), **wild))
    yield "names: torch.compile", "llama-tied", "f32", dict(make=lora(rename(lambda n: n.replace("base_model.model.", "base_model.model._orig_mod.")), **wild))
    yield "names: FSDP", "llama", "bf16", dict(make=lora(rename(lambda n: n.replace("layers.1.", "layers.1._fsdp_wrapped_module.")), **wild))
    yield "names: language_model.", "llama", "f32", dict(make=lora(rename(lambda n: n.replace(".model.layers", ".language_model.model.layers")), **wild))
    yield "names: fused qkv_proj and gate_up_proj", "llama", "f32", dict(make=fused_names)
    yield "names: fused qkv_proj and gate_up_proj", "mistral-tied", "bf16", dict(make=fused_names)
    dora = dict(use_dora=True, target_modules=LINEARS)
    yield "DoRA magnitude [out, 1]", "llama", "f32", dict(make=lora(magnitudes(lambda n, t: (n, t[:, None])), **dora))
    yield "DoRA magnitude [1, out], .weight", "qwen3", "f32", dict(make=lora(magnitudes(lambda n, t: (n + ".weight", t[None])), **dora))
    yield "DoRA magnitude .default.weight", "qwen2", "f32", dict(make=lora(magnitudes(lambda n, t: (n + ".default.weight", t)), **dora))


def refusals():
    """Name, words of the message, maker, on the model "llama"."""
    for kind in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"):
        yield f"{kind}, not converted", "init_lora_weights", lora(config_edit(init_lora_weights=kind))
    yield "KaSA", "kasa_config", lora(config_edit(kasa_config={"beta": 1e-4, "gamma": 1e-3}))
    yield "Arrow", "arrow_config", lora(config_edit(arrow_config={"top_k": 2}))
    yield "layer_replication", "layer_replication", lora(config_edit(layer_replication=[[0, 2], [1, 3]]))
    yield "target_parameters", "target_parameters", lora(config_edit(target_parameters=["mlp.experts.gate_up_proj"]))
    yield "megatron_config", "megatron_config", lora(config_edit(megatron_config={"a": 1}))
    yield "task_type SEQ_CLS", "task_type", lora(config_edit(task_type="SEQ_CLS"))
    yield "an unknown field with a value", "some_new_field", lora(config_edit(some_new_field="yes"))
    yield "untargeted tensors", "target_modules", lora(config_edit(target_modules=["q_proj"]))
    yield "unknown tensors", "base_model.model.vision", lora(add_tensor("base_model.model.vision.lora_A.weight", 8, 64))
    yield "pickle only", "adapter_model.bin", lora(pickle_only)
    yield "no weights", "adapter_model.safetensors", lora(remove_file("adapter_model.safetensors"))
    yield "no configuration", "adapter_config.json", lora(remove_file("adapter_config.json"))
    yield "weights cut off", "adapter_model.safetensors", lora(truncate)
    yield "configuration is no JSON", "adapter_config.json", lora(config_text(lambda text: text[:-20]))
    yield "rank of the files differs", "rank", lora(config_edit(r=4))
    yield "A without B", "lora_B", lora(drop("layers.1.self_attn.q_proj.lora_B"))
    yield "base of another width", "base", lora(tensor_edit(
        lambda ts: {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in ts.items()}))
    yield "base with more layers", "layer", lora(rename(lambda n: n.replace("layers.2.", f"layers.{LAYERS + 4}.")))
    yield "r is a string", "r", lora(config_edit(r="8"))
    yield "a factor of integers", "lora_A", lora(tensor_edit(
        lambda ts: {n: (100 * t).to(torch.int8) if "layers.0.self_attn.q_proj.lora_A" in n else t for n, t in ts.items()}))
    yield "regex that does not compile", "target_modules", lora(config_edit(target_modules="(q_proj"))

    t = ["q_proj", "v_proj"]
    kinds = {
        "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=t, feedforward_modules=[]),
        "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=t),
        "LoKr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=t),
        "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
        "AdaLoRA": lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=t, total_step=10),
        "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=t, oft_block_size=8),
        "BOFT": lambda: peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], boft_block_size=4),
        "HRA": lambda: peft.HRAConfig(task_type="CAUSAL_LM", target_modules=t),
        "FourierFT": lambda: peft.FourierFTConfig(task_type="CAUSAL_LM", target_modules=t, n_frequency=10),
        "LN tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        "trainable tokens alone": lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
        "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    for name, config in kinds.items():
        yield name, "peft_type", other(config)


def all_cases():
    cases = []
    for i, (name, models, keys) in enumerate(features()):
        for j, model in enumerate(models):
            weights = "f32" if (i + j) % 2 == 0 or keys.get("qalora") else "bf16"
            cases.append(Case(name, model, weights, fixture=j == (i + 1) % len(models), **keys))
    cases += [Case(name, model, weights, fixture=name.startswith(("names", "DoRA magnitude")), **keys)
              for name, model, weights, keys in singles()]
    cases += [Case(name, "llama", "f32", make, refused=words) for name, words, make in refusals()]
    return cases
