#!/usr/bin/env python3
"""The cases of `mlora bench` in PyTorch, on the same GPU, printed beside ours.

    mlora bench generate --modes auto --json generate.json ...
    mlora bench kernels --json kernels.json ...
    python3 tools/reference/bench_torch.py -m tools/shapes/llama-3.1-8b generate.json kernels.json

Each report is read for its cases; what PyTorch takes for the same one is measured and printed with
the ratio (above 1: mlora is faster). End to end these are transformers alone, PEFT with a mixed
batch where it is installed, factors gathered for every row and multiplied as a batch ("gbmm"), and
a loop over the rows. The kernels are replayed as a CUDA graph over the memory of many layers.
"""
import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F

DEVICE, DTYPE = "cuda", torch.bfloat16
ENOUGH = 512e6  # bytes that no cache holds
LAYERS = 32


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

            try:
                found["SDPA " + name.split("_")[0].lower()] = graph_seconds(run) / layers
            except RuntimeError as error:  # a backend that does not take the shape
                print(f"    {name}: {str(error).splitlines()[0][:80]}")
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


def generate_rows(config_dir, report, tokens):
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(config_dir)
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    work, vocab, done = report["workload"], config.vocab_size, {}
    for row in report["cases"]:
        batch, adapters, rank = row["batch"], row["adapters"], row["rank"]
        key = (batch, adapters, rank)
        if key not in done:
            done[key] = {}
            if adapters == 0:
                done[key]["transformers"] = generate_speed(model, vocab, work, batch, tokens)
            else:
                for way, share in (("gbmm", 2), ("loop", 16)):
                    mixed = Mixed(model, adapters, rank, batch, way)
                    done[key]["transformers + " + way] = generate_speed(model, vocab, work, batch, max(2, tokens // share))
                    mixed.remove()
                speed = peft_speed(config, model, work, batch, adapters, rank, max(2, tokens // 8))
                if speed:
                    done[key]["PEFT mixed batch"] = speed
        for name, speed in done[key].items():
            ours = row["tokens/s"]
            yield f"batch {batch}, {adapters} x r{rank}", row["mode"], f"{ours:.0f} tok/s", name, f"{speed:.0f} tok/s", ours / speed


def peft_speed(config, model, work, batch, adapters, rank, tokens):
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
    speed = generate_speed(wrapped, config.vocab_size, work, batch, tokens, adapter_names=rows)
    wrapped.unload()
    return speed


# ---- beside each other -----------------------------------------------------------------------------


def kernel_rows(c, report):
    done = {}
    for row in report["cases"]:
        lora = row["kernel"] == "lora"
        if row["case"] in ("loop rows", "cheat_bmm"):
            continue  # baselines of our own
        key = (row["kernel"], row["phase"], row["tokens"], row["adapters"], row["rank"], None if lora else row["case"])
        if key not in done:
            torch.cuda.empty_cache()
            done[key] = addon_times(c, row) if lora else kernel_times(c, row)
        where = f"{row['kernel']} {row['phase']} T={row['tokens']}"
        if lora:
            where += f" {row['adapters']} x r{row['rank']}"
        for name, seconds in done[key].items():
            yield where, row["case"], f"{row['us']:.1f} us", name, f"{1e6 * seconds:.1f} us", 1e6 * seconds / row["us"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="directory with config.json")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of the base; slower ways make fewer")
    parser.add_argument("--json", help="write the rows as JSON, too")
    parser.add_argument("reports", nargs="+", help="written by mlora bench generate or kernels --json")
    args = parser.parse_args()
    config = json.load(open(f"{args.model}/config.json", encoding="utf-8"))
    print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name()}")
    rows = []
    with torch.inference_mode():
        for path in args.reports:
            report = json.load(open(path, encoding="utf-8"))
            make = {"generate": lambda r: generate_rows(args.model, r, args.max_new_tokens), "kernels": lambda r: kernel_rows(config, r)}
            if report["bench"] not in make:
                parser.error(f"{path}: a report of {report['bench']}: generate or kernels is needed")
            for row in make[report["bench"]](report):
                rows.append(row)
                print(f"{row[0]:42} {row[1]:28} {row[2]:>14}   {row[3]:28} {row[4]:>14} {row[5]:7.2f} x", flush=True)
    geometric = math.exp(statistics.fmean(math.log(r[5]) for r in rows)) if rows else 0
    print(f"{len(rows)} rows, geometric mean {geometric:.2f} x")
    if args.json:
        keys = ("case", "ours", "our value", "torch", "torch value", "ratio")
        json.dump({"torch": torch.__version__, "rows": [dict(zip(keys, r)) for r in rows]}, open(args.json, "w", encoding="utf-8"), indent=1)


if __name__ == "__main__":
    main()
