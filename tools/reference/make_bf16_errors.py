"""Measures how far transformers + PEFT in bfloat16 are from what they say in float32.

python3 make_bf16_errors.py MODEL_DIR        (torch, transformers, peft, safetensors; a CPU is enough)

For each golden file of the model: its three sequences scored in bfloat16, and the largest difference of a
log-probability, of the greedy tokens and of the 128 likeliest first tokens. MODEL_DIR/golden/bf16.json holds them.
"""
import json, os, sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOP = 128
directory = sys.argv[1]
errors = {}
for name in ["base"] + sorted(os.listdir(f"{directory}/adapters")):
    golden = f"{directory}/golden/{name}"
    if not os.path.exists(f"{golden}.json"):
        continue
    cases, tensors = json.load(open(f"{golden}.json"))["cases"], load_file(f"{golden}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    if name != "base":
        model = PeftModel.from_pretrained(model, f"{directory}/adapters/{name}", autocast_adapter_dtype=False)
    worst = 0.0
    for c, case in enumerate(cases):
        n = len(case["prompt_ids"])
        ids = torch.tensor([case["prompt_ids"] + case["greedy_ids"]])
        with torch.no_grad():
            got = torch.log_softmax(model.eval()(ids).logits[0].float(), -1)
        want = torch.log_softmax(tensors[f"prompt{c}.last_logits"].float(), -1).flatten()
        top = want.topk(TOP).indices
        worst = max(worst, (got[n - 1][top] - want[top]).abs().max().item())
        for i, (token, logprob) in enumerate(zip(case["greedy_ids"], case["greedy_logprobs"])):
            worst = max(worst, abs(got[n - 1 + i, token].item() - logprob))
    errors[name] = round(worst, 4)
json.dump(errors, open(f"{directory}/golden/bf16.json", "w"), indent=1)
