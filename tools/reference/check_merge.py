#!/usr/bin/env python3
"""Does transformers load what `mlora merge` writes, and does it compute the adapter?

    python3 tools/reference/check_merge.py [--mlora build/mlora]   (a minute; needs torch, transformers)

Merges every adapter of tests/fixtures/peft into its model, loads the result with transformers in
f32, and compares log-probabilities with those that PEFT gave for the adapter beside the base
(cases.json), and with `mlora score` on the same checkpoint. Bars, in nats: 1e-4 to mlora; to PEFT
1e-4 over weights in f32, and 0.1 over weights in bf16, which are rounded once more by merging.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FIXTURES = os.path.join(ROOT, "tests", "fixtures")


def logprobs_of_transformers(directory, ids):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True)
    keys = {k: v for k, v in info.items() if v}
    if keys:
        raise RuntimeError(f"{directory}: transformers says {keys}")
    with torch.no_grad():
        logprobs = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def logprobs_of_mlora(mlora, directory, ids):
    command = [mlora, "score", "--model", directory, "--tokenizer", os.path.join(FIXTURES, "tiny-llama2"), "--quiet",
               "--backend", "cpu", "--json", "--ids", ",".join(map(str, ids))]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return torch.tensor([token["logprob"] for token in json.loads(out)["tokens"][1:]])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mlora", default=os.path.join(ROOT, "build", "mlora"))
    mlora = parser.parse_args().mlora
    wrong = n = 0

    with open(os.path.join(FIXTURES, "peft", "cases.json")) as file:
        models = json.load(file)
    print(f"{'case':32} {'to PEFT':>9} {'to mlora':>9}")
    with tempfile.TemporaryDirectory() as temporary:
        for model in models:
            base = os.path.join(FIXTURES, "peft", model["model"])
            with open(os.path.join(base, "config.json")) as file:
                bar = 1e-4 if json.load(file)["dtype"] == "float32" else 0.1
            for case in model["cases"]:
                if case["name"] == "base":
                    continue
                name = f"{model['model']}/{case['name']}"
                output = os.path.join(temporary, name.replace("/", "-"))
                adapter = os.path.join(base, "adapters", case["name"])
                made = subprocess.run([mlora, "merge", "--model", base, "--adapter", adapter, "--output", output],
                                      capture_output=True, text=True)
                if made.returncode == 2:
                    print(f"{name:32} refused: {made.stderr.strip().split(': ', 2)[2]}")
                    continue
                got = logprobs_of_transformers(output, case["ids"])
                to_peft = (got - torch.tensor(case["logprobs"])).abs().max().item()
                to_mlora = (got - logprobs_of_mlora(mlora, output, case["ids"])).abs().max().item()
                bad = to_peft > bar or to_mlora > 1e-4
                print(f"{name:32} {to_peft:9.1e} {to_mlora:9.1e}{'  WRONG' if bad else ''}")
                wrong += bad
                n += 1
    print(f"{n} merged, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
