#!/usr/bin/env python3
"""The cases of `mlora bench` in PyTorch, on the same GPU, printed beside ours.

    mlora bench generate --modes auto --json generate.json ...
    mlora bench kernels --json kernels.json ...
    python3 tools/reference/bench_torch.py generate.json kernels.json

Each report is read for its cases and the model's shape; what PyTorch takes for the same case is
measured and printed with the ratio (above 1: mlora is faster). End to end these are transformers
alone, PEFT with a mixed batch, factors gathered for every row and multiplied as a batch ("gbmm"),
and a loop over the rows; without transformers or PEFT it is said that they are left out. The
kernels are replayed as a CUDA graph over the memory of many layers. Where a case was measured in
several modes, "auto" is compared. A case that PyTorch cannot run is said and costs no other.
"""
import argparse
import importlib.metadata
import json
import math
import os
import statistics
import time

import torch
import torch.nn.functional as F

DEVICE, DTYPE = "cuda", torch.bfloat16
ENOUGH = 512e6  # bytes that no cache holds
LAYERS = 32
LOOPED_ROWS = 64  # a loop over more is not worth its time
PEFT_ADAPTERS = 8  # to load more takes minutes


# ---- time ------------------------------------------------------------------------------------------


def graph_seconds(fn):
    """The median time of one replay of fn()."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(7):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def n_layers(bytes_of_one):
    return LAYERS if bytes_of_one * LAYERS <= ENOUGH else max(2, int(ENOUGH / bytes_of_one) + 1)


def randn(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE, dtype=dtype) * 0.02


# ---- what adapters add to one layer ----------------------------------------------------------------


def linears(c):
    """(K, N) of the seven linears."""
    d, f = c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim") or d // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]


def addon_times(c, row):
    """{way: seconds a layer} for a row of `bench kernels`."""
    T, A, R = row["tokens"], row["adapters"], row["rank"]
    layer_bytes = sum(2 * R * (k + n) for k, n in linears(c))
    rows_bytes = T * layer_bytes
    slots = torch.arange(T, device=DEVICE) % A
    if row["phase"] == "prefill":
        slots = torch.arange(T, device=DEVICE) * A // T
    xs = {k: randn(T, 1, k) for k, _ in linears(c)}
    ys = {n: randn(T, 1, n) for _, n in linears(c)}
    bounds = torch.searchsorted(slots.contiguous(), torch.arange(A + 1, device=DEVICE)).tolist()

    def factors(n_slots, layers):
        return [[(randn(n_slots, R, k), randn(n_slots, n, R)) for k, n in linears(c)] for _ in range(layers)]

    def timed(layers, body):
        def run():
            for layer in layers:
                for (a, b), (k, n) in zip(layer, linears(c)):
                    body(a, b, xs[k], ys[n])

        return graph_seconds(run) / len(layers)

    def gbmm(a, b, x, y):
        y += torch.bmm(torch.bmm(x, a[slots].transpose(1, 2)), b[slots].transpose(1, 2))

    def cheat(a, b, x, y):
        y += torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))

    def loop(a, b, x, y):
        for t in range(T):
            s = t % A
            y[t] += (x[t] @ a[s].t()) @ b[s].t()

    def pieces(a, b, x, y):
        for s in range(A):
            lo, hi = bounds[s], bounds[s + 1]
            y[lo:hi, 0] += (x[lo:hi, 0] @ a[s].t()) @ b[s].t()

    if row["phase"] == "prefill":
        return {"loop over adapters": timed(factors(A, n_layers(A * layer_bytes)), pieces)}
    found = {"gather + bmm": timed(factors(A, n_layers(A * layer_bytes)), gbmm)}
    found["cheat_bmm"] = timed(factors(T, n_layers(rows_bytes)), cheat)
    if T <= LOOPED_ROWS:
        found["loop"] = timed(factors(A, 2), loop)
    return found


# ---- the other kernels -----------------------------------------------------------------------------


def kernel_times(c, row):
    kind, T, shape = row["kernel"], row["tokens"], row["case"]
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    H, G = c["num_attention_heads"], c["num_key_value_heads"]
    if kind == "matmul":
        N, K = int(shape.split()[1]), int(shape.split()[3])
        ws = [randn(N, K) for _ in range(n_layers(2 * N * K))]
        x = randn(T, K)
        return {"torch.matmul": graph_seconds(lambda: [F.linear(x, w) for w in ws]) / len(ws)}
    if kind == "attention":
        Q, kv_len = int(shape.split()[0]), int(shape.split()[3])
        new = T // Q
        layers = n_layers(4 * Q * kv_len * G * head)
        q = randn(Q, H, new, head)
        kvs = [(randn(Q, G, kv_len, head), randn(Q, G, kv_len, head)) for _ in range(layers)]
        causal = new > 1
        found = {}
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            backend = getattr(torch.nn.attention.SDPBackend, name)

            def run():
                with torch.nn.attention.sdpa_kernel(backend):
                    for k, v in kvs:
                        F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

            seconds = attempt(name, lambda: graph_seconds(run))
            if seconds:
                found["SDPA " + name.split("_")[0].lower()] = seconds / layers
        return found
    if kind == "add_rms_norm":
        D = c["hidden_size"]
        w = randn(D)
        pairs = [(randn(T, D), randn(T, D)) for _ in range(n_layers(4 * T * D))]
        return {"add, rms_norm": graph_seconds(lambda: [F.rms_norm(a.add_(b), (D,), w, 1e-5) for a, b in pairs]) / len(pairs)}
    if kind == "silu_mul":
        width = c["intermediate_size"]
        xs = [randn(T, 2 * width) for _ in range(n_layers(4 * T * width))]
        return {"silu, mul": graph_seconds(lambda: [F.silu(x[:, :width]) * x[:, width:] for x in xs]) / len(xs)}
    if kind == "sample":
        logits = randn(T, c["vocab_size"], dtype=torch.float32)
        if shape == "greedy":
            return {"argmax": graph_seconds(lambda: logits.argmax(-1))}
        if "top-p" not in shape:
            return {"softmax, multinomial": graph_seconds(lambda: torch.multinomial((logits / 0.7).softmax(-1), 1))}

        def top_p():
            p, index = (logits / 0.7).softmax(-1).sort(-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p > 0.9, 0)
            return index.gather(-1, torch.multinomial(p, 1))

        return {"sort, cumsum, multinomial": graph_seconds(top_p)}
    return {}


# ---- end to end ------------------------------------------------------------------------------------


class Mixed:
    """Adds each row's own factors to the outputs of all linears, in one of two ways."""

    def __init__(self, model, n_adapters, rank, batch, way):
        self.slots = torch.arange(batch, device=DEVICE) % n_adapters
        self.way, self.handles = way, []
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] not in names:
                continue
            a = randn(n_adapters, rank, module.in_features)
            b = randn(n_adapters, module.out_features, rank)
            self.handles.append(module.register_forward_hook(self.hook(a, b)))

    def hook(self, a, b):
        def add(_, inputs, output):
            x = inputs[0]
            if self.way == "gbmm":
                return output + (x @ a[self.slots].transpose(1, 2)) @ b[self.slots].transpose(1, 2)
            return torch.stack([output[i] + (x[i] @ a[s].t()) @ b[s].t() for i, s in enumerate(self.slots.tolist())])

        return add

    def remove(self):
        for handle in self.handles:
            handle.remove()


def generate_speed(model, vocab, work, batch, tokens, **more):
    """Generated tokens per second of the second of two runs."""
    ids = torch.randint(0, vocab, (batch, work["prompt_tokens"]), device=DEVICE)
    settings = dict(do_sample=work["temperature"] > 0, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
    if settings["do_sample"]:
        settings.update(temperature=work["temperature"], top_p=work["top_p"], top_k=0)
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **more)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return batch * tokens / seconds


def pick(rows, key):
    """One row of each case: mode "auto" where it was measured, else the first."""
    picked = {}
    for row in rows:
        if key(row) not in picked or "auto" in (row.get("mode"), row["case"] if "case" in row else None):
            picked[key(row)] = row
    return picked.values()


def generate_rows(shape, report, tokens):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("    transformers is not installed: left out")
        return

    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    work, vocab = report["workload"], shape["vocab_size"]

    def hooked(way, share):
        mixed = Mixed(model, adapters, rank, batch, way)
        try:
            return generate_speed(model, vocab, work, batch, max(2, tokens // share))
        finally:
            mixed.remove()

    for row in pick(report["cases"], lambda r: (r["batch"], r["adapters"], r["rank"])):
        batch, adapters, rank = row["batch"], row["adapters"], row["rank"]
        ways = {"transformers": lambda: generate_speed(model, vocab, work, batch, tokens)}
        if adapters > 0:
            ways = {
                "transformers + gbmm": lambda: hooked("gbmm", 2),
                "transformers + loop": lambda: hooked("loop", 16),
                "PEFT mixed batch": lambda: peft_speed(vocab, model, work, batch, adapters, rank, max(2, tokens // 8)),
            }
        for way, measure in ways.items():
            speed = attempt(way, measure)
            if speed:
                ours = row["tokens/s"]
                yield row, way, ours, speed, "tokens/s", ours / speed


def peft_speed(vocab, model, work, batch, adapters, rank, tokens):
    if adapters > PEFT_ADAPTERS:
        return None
    try:
        import peft
    except ImportError:
        print("    PEFT is not installed: left out")
        return None
    names = [f"a{i}" for i in range(adapters)]
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, lora, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, lora)
    wrapped.eval()
    rows = [names[i % adapters] for i in range(batch)]
    speed = generate_speed(wrapped, vocab, work, batch, tokens, adapter_names=rows)
    wrapped.unload()
    return speed


# ---- beside each other -----------------------------------------------------------------------------


def attempt(what, measure):
    """measure(), or None and a line that says why not."""
    try:
        return measure()
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:  # memory ran out, too
        print(f"    {what}: {(str(error).splitlines() or ['failed'])[0][:100]}")
        torch.cuda.empty_cache()
        return None


def kernel_rows(shape, report):
    def key(row):
        lora = row["kernel"] == "lora"
        return row["kernel"], row["phase"], row["tokens"], row["adapters"], row["rank"], None if lora else row["case"]

    ours = [row for row in report["cases"] if row["case"] not in ("loop rows", "cheat_bmm")]
    for row in pick(ours, key):
        torch.cuda.empty_cache()
        times = addon_times if row["kernel"] == "lora" else kernel_times
        for way, seconds in (attempt(row["case"], lambda: times(shape, row)) or {}).items():
            yield row, way, row["us"], 1e6 * seconds, "us", 1e6 * seconds / row["us"]


def describe(row):
    if "batch" in row:
        return f"batch {row['batch']}, {row['adapters']} x r{row['rank']}", row["mode"]
    where = f"{row['kernel']} {row['phase']} T={row['tokens']}"
    return where + (f" {row['adapters']} x r{row['rank']}" if row["kernel"] == "lora" else ""), row["case"]


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of the base; slower ways make fewer")
    parser.add_argument("--json", help="write the rows as JSON, too, after each of them")
    parser.add_argument("reports", nargs="+", help="written by mlora bench generate or kernels --json")
    args = parser.parse_args()
    versions = {package: version(package) for package in ("transformers", "peft")}
    out = {"bench": "torch", "torch": torch.__version__, **versions, "device": torch.cuda.get_device_name(), "cases": []}
    print(f"PyTorch {torch.__version__}, " + ", ".join(f"{k} {v}" for k, v in versions.items()) + f", on {torch.cuda.get_device_name()}", flush=True)
    keys = ("kernel", "phase", "tokens", "adapters", "rank", "batch", "mode", "case")
    with torch.inference_mode():
        for path in args.reports:
            report = json.load(open(path, encoding="utf-8"))
            shape = report["shape"]
            if report["bench"] not in ("generate", "kernels"):
                parser.error(f"{path}: a report of {report['bench']}: generate or kernels is needed")
            make = generate_rows(shape, report, args.max_new_tokens) if report["bench"] == "generate" else kernel_rows(shape, report)
            for row, way, ours, theirs, unit, ratio in make:
                where, case = describe(row)
                print(f"{where:42} {case:28} {ours:10.1f} {unit:8}   {way:28} {theirs:10.1f} {unit:8} {ratio:7.2f} x", flush=True)
                out["cases"].append({k: row[k] for k in keys if k in row} | {"report": os.path.basename(path), "way": way, "unit": unit, "ours": ours, "torch": theirs, "ratio": ratio})
                if args.json:
                    with open(args.json + ".new", "w", encoding="utf-8") as file:
                        json.dump(out, file, indent=1)
                    os.replace(args.json + ".new", args.json)
    ratios = [row["ratio"] for row in out["cases"]]
    geometric = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else 0
    print(f"{len(ratios)} rows, geometric mean {geometric:.2f} x")


if __name__ == "__main__":
    main()
