"""Times, as replays of a CUDA graph, beside what PyTorch alone does: python3 bench.py

Llama-3.1-8B's q, k and v projections (K 4096, N 4096 + 1024 + 1024), bf16, weights of 16 copies in
turn so that no cache serves them; and the metadata of a draft and extend step."""
import sys

import torch

import mlora_kernels
from mlora_kernels import reference

COPIES, K, WIDTHS = 16, 4096, (4096, 1024, 1024)


def microseconds(step, n):
    """Of one of the n things that step does, in a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(20):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / (20 * n)


def gathered(x, a, b, y, mapping):
    """Factors gathered for each token, then batched products: what PyTorch offers without a loop."""
    at, first = mapping.long(), 0
    for a_slice, b_slice in zip(a, b):
        h = torch.bmm(a_slice[at], x.unsqueeze(2))
        n = b_slice.shape[1]
        y[:, first:first + n] += torch.bmm(b_slice[at], h).squeeze(2)
        first += n


def lora_row(T, adapters, R):
    def normal(*size):
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    a = [[normal(adapters, R, K) for _ in WIDTHS] for _ in range(COPIES)]
    b = [[normal(adapters, n, R) for n in WIDTHS] for _ in range(COPIES)]
    x, y = normal(T, K), normal(T, sum(WIDTHS))
    h = torch.zeros(len(WIDTHS), T, R, device="cuda")
    mapping = (torch.arange(T, device="cuda") % adapters).to(torch.int32)
    metadata = mlora_kernels.lora_metadata(mapping, adapters)

    def ours(mode):
        for i in range(COPIES):
            mlora_kernels.lora_shrink_expand(x, a[i], h, b[i], y, *metadata, mode=mode)

    def loop():
        for i in range(COPIES):
            reference.lora_shrink(x, a[i], h, mapping, 1.0)
            reference.lora_expand(h, b[i], y, mapping, 0, True)

    def gather():
        for i in range(COPIES):
            gathered(x, a[i], b[i], y, mapping)

    times = [microseconds(lambda: ours(mode), COPIES) for mode in ("auto", "bgmv", "sgmv")]
    times.append(microseconds(gather, COPIES) if T * R * K < 2**31 else float("nan"))
    times.append(microseconds(loop, COPIES) if adapters < 64 else float("nan"))
    bytes_read = 2 * adapters * R * (len(WIDTHS) * K + sum(WIDTHS))
    print(f"{T:5}/{adapters:<3} {R:4} " + " ".join(f"{t:9.1f}" for t in times) + f" {bytes_read / 4.3e6:9.1f}")


def metadata_row(bs):
    lens = torch.randint(1, 5, (bs,), dtype=torch.int32, device="cuda")
    kv_lens = lens + 1000
    out = [torch.zeros(bs * 5, dtype=torch.int32, device="cuda") for _ in "ab"]
    total = torch.zeros(1, dtype=torch.int32, device="cuda")
    start = torch.zeros(bs + 1, dtype=torch.int32, device="cuda")

    def ours():
        for _ in range(COPIES):
            mlora_kernels.extend_metadata(lens, kv_lens, 2048, *out, total, start)

    def theirs():
        for _ in range(COPIES):
            reference.extend_metadata(lens, kv_lens, 2048, total, start, *out)

    print(f"{bs:5} {microseconds(ours, COPIES):9.1f} {microseconds(theirs, COPIES):9.1f}")


def main():
    info = mlora_kernels.kernel_info("cuda")
    if info["why"]:
        sys.exit(f"bench.py: needs the kernels on a GPU: {info['why']}")
    print({key: info[key] for key in ("backend", "description", "architectures") if key in info})
    print("us of shrink and expand of q, k and v; `read`: the factors at 4.3 TB/s")
    print("tokens/adapters, rank   auto      bgmv      sgmv  torch bmm torch loop     read")
    for row in (1, 1, 16), (64, 1, 16), (64, 7, 16), (64, 64, 16), (64, 7, 64), (512, 7, 16), (4096, 7, 16):
        lora_row(*row)
    print("us of extend_metadata: requests, mlora, torch")
    for bs in 32, 128, 1024:
        metadata_row(bs)


if __name__ == "__main__":
    main()
