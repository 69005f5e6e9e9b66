"""The kernels of mlora on PyTorch tensors: many LoRA adapters in one batch, the metadata of draft and
extend steps, attention over a paged cache.

Importing it needs PyTorch alone. libmlora_kernels.so (make, in the root of mlora) is looked for at
$MLORA_KERNELS_LIBRARY, else in build/, else where the loader looks. Where it is missing, or a GPU is,
or a type is not served (float16 in the cache, say), the same comes from PyTorch; kernel_info() says
which. Shapes that do not fit one another are a ValueError, what the library refuses a Failure.

Every function is an operator of the namespace `mlora`, so torch.compile takes it as it is. For a CUDA
graph run the step once before it is recorded. Work on one device belongs on one stream at a time
(but for the LoRA functions on Hopper and later, in every mode but gbmm)."""
import torch

from . import abi, ops, reference
from .abi import Failure

__all__ = ["lora_shrink", "lora_expand", "lora_shrink_expand", "lora_metadata",
           "fill_draft_extend_metadata", "extend_metadata", "kv_write", "paged_attention",
           "kernel_info", "Failure"]


def _count(num_active_loras):
    """A CPU tensor [1], an int or None as the first or the last."""
    if num_active_loras is None or isinstance(num_active_loras, torch.Tensor):
        return num_active_loras
    return torch.tensor([num_active_loras], dtype=torch.int32)


def lora_shrink(inputs, lora_a_weights, output_tensor, token_lora_mapping,
                token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc, lora_ids,
                no_lora_flag_cpu, num_active_loras=None, scaling=None, mode="auto"):
    """output[i, t, :] = scaling * A x[t, :], with A of slice i and t's adapter; zeros without one.

    With the arguments of vLLM's lora_shrink, of its versions with num_active_loras and of those
    before it. inputs [T, K]; lora_a_weights of each slice [S, (1,) R, K]; output [slices, T, R]
    float32. Nothing is done where no_lora_flag_cpu (a CPU tensor [1]) is true. `mode`: how it is
    computed, one of auto, loop, gbmm, bgmv, sgmv, fused."""
    if scaling is None:
        num_active_loras, scaling = None, 1.0 if num_active_loras is None else num_active_loras
    torch.ops.mlora.lora_shrink(inputs, list(lora_a_weights), output_tensor, token_lora_mapping,
                                token_indices_sorted_by_lora_ids, num_tokens_per_lora,
                                lora_token_start_loc, lora_ids, no_lora_flag_cpu,
                                _count(num_active_loras), float(scaling), mode)


def lora_expand(inputs, lora_b_weights, output_tensor, token_lora_mapping,
                token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc, lora_ids,
                no_lora_flag_cpu, num_active_loras=None, offset_start=0, add_inputs=False, mode="auto"):
    """Columns of slice i of output[t, :] (+)= B inputs[i, t, :], for tokens with an adapter.

    With the arguments of vLLM's lora_expand, also of its versions before num_active_loras. inputs [slices, T, R]; lora_b_weights of each slice
    [S, (1,) N_i, R]; output [T, N], whose slices begin at column offset_start. add_inputs: add to
    output, rounding once; else replace it."""
    if isinstance(offset_start, bool):
        num_active_loras, offset_start, add_inputs = None, num_active_loras, offset_start
    torch.ops.mlora.lora_expand(inputs, list(lora_b_weights), output_tensor, token_lora_mapping,
                                token_indices_sorted_by_lora_ids, num_tokens_per_lora,
                                lora_token_start_loc, lora_ids, no_lora_flag_cpu,
                                _count(num_active_loras), offset_start, add_inputs, mode)


def lora_shrink_expand(inputs, lora_a_weights, shrink_buffer, lora_b_weights, output_tensor,
                       token_lora_mapping, token_indices_sorted_by_lora_ids, num_tokens_per_lora,
                       lora_token_start_loc, lora_ids, no_lora_flag_cpu, num_active_loras=None,
                       scaling=1.0, offset_start=0, mode="auto"):
    """Both, added to output: two launches, and what shrink_buffer [slices, T, R] float32 holds
    before is not read."""
    torch.ops.mlora.lora_shrink_expand(inputs, list(lora_a_weights), shrink_buffer,
                                       list(lora_b_weights), output_tensor, token_lora_mapping,
                                       token_indices_sorted_by_lora_ids, num_tokens_per_lora,
                                       lora_token_start_loc, lora_ids, no_lora_flag_cpu,
                                       _count(num_active_loras), float(scaling), offset_start, mode)


def lora_metadata(token_lora_mapping, max_loras):
    """What the functions above take after the output, for callers that have no such metadata: from
    the slot of each token (-1: none). Waits for the device."""
    mapping = token_lora_mapping.to(torch.int32)
    device = mapping.device
    order = torch.sort(mapping, stable=True).indices.to(torch.int32)
    found, counts = torch.unique(mapping, sorted=True, return_counts=True)
    ids = torch.full((max_loras + 1,), -1, dtype=torch.int32, device=device)
    tokens = torch.zeros(max_loras + 1, dtype=torch.int32, device=device)
    start = torch.zeros(max_loras + 2, dtype=torch.int32, device=device)
    n = found.shape[0]
    ids[:n], tokens[:n] = found, counts.to(torch.int32)
    start[1:1 + n] = torch.cumsum(counts, 0)
    none = torch.tensor([not bool((mapping >= 0).any())])
    return mapping, order, tokens, start, ids, none, torch.tensor([n], dtype=torch.int32)


def extend_metadata(extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
                    out_nsa_cache_seqlens, total=None, request_start=None, search="adaptive"):
    """For request b and j < extend_seq_lens[b], at t = sum of the lengths before b, + j:
    out_seqlens_expanded[t] = seq_lens[b] - extend_seq_lens[b] + 1 + j, and the other one the
    smaller of that and nsa_index_topk. Entries from the total on are left as they are.

    Lengths int32 or int64, outputs int32. Returns the total, a tensor [1] of the device: nothing
    waits, a CUDA graph takes it. search: adaptive, linear, binary or by_request."""
    bs = extend_seq_lens.shape[0]
    if total is None:
        total = out_seqlens_expanded.new_empty(1, dtype=torch.int32)
    if request_start is None:
        request_start = out_seqlens_expanded.new_empty(bs + 1, dtype=torch.int32)
    torch.ops.mlora.extend_metadata(extend_seq_lens, seq_lens, nsa_index_topk, total, request_start,
                                    out_seqlens_expanded, out_nsa_cache_seqlens, search)
    return total


def fill_draft_extend_metadata(extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
                               out_nsa_cache_seqlens, use_adaptive=True, use_optimized=True):
    """The same with the arguments of SGLang's fill_draft_extend_metadata (in its CUDA and its Triton
    version). Returns the total as an int, for which it waits. ValueError where the outputs have no
    room for it; they then hold as much as fits. The sums are always made in the one launch."""
    total = extend_metadata(extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
                            out_nsa_cache_seqlens,
                            search="adaptive" if use_adaptive or use_optimized else "binary")
    count = int(total.item())
    room = min(out_seqlens_expanded.shape[0], out_nsa_cache_seqlens.shape[0])
    if count > room:
        raise ValueError(f"fill_draft_extend_metadata: {count} tokens, the outputs have room for {room}")
    return count


def kv_write(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row, num_heads,
             num_kv_heads, frequency=None, amplitude=1.0):
    """Write the keys and values in qkv [T, (H + 2 G) d] to the caches [blocks, G, 16, d]; with
    frequency [d / 2], queries and keys are turned first, in place. row_start [Q + 1], kv_len [Q],
    position and row [T] as kernels/mlora_kernels.h says."""
    torch.ops.mlora.kv_write(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row,
                             num_heads, num_kv_heads, frequency, float(amplitude))


def paged_attention(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row, num_heads,
                    num_kv_heads, scale, max_row=None, max_kv=None, window=0):
    """Causal attention over the caches, which hold the step's own keys and values. Returns [T, H d].
    max_row, max_kv: at least the longest row and the largest kv_len; left out, what the tensors
    have room for."""
    room = block_table.shape[1] * k_cache.shape[2]
    return torch.ops.mlora.paged_attention(
        qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row, num_heads, num_kv_heads,
        float(scale), min(qkv.shape[0], room) if max_row is None else max_row,
        room if max_kv is None else max_kv, window)


def _no_kernels(device):
    """Why the library does nothing there; None where it does, or may."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for devices of type {device.type}"
    return None


def kernel_info(device=None):
    """What computes on a device, by default the current GPU, or the CPU where there is none.

    `backend` is "cuda", "cpu" or "torch", the last with the reason in `why` and None or nothing in
    what describes the kernels. `adaptive`: the metadata's search is chosen by the number of
    requests, linear up to `linear_binary_threshold`."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    info = {"backend": "torch", "device": str(device), "library": ops.state.library.path,
            "why": _no_kernels(device), "version": None, "description": f"PyTorch {torch.__version__}",
            "capability": None, "n_multiprocessors": None, "architectures": [], "modes": [],
            "adaptive": False, "linear_binary_threshold": None, "extend_block_size": None,
            "kv_block_size": None, "max_rank": None, "max_slices": None, "max_tokens": None,
            "activations": [], "weights": []}
    if info["why"]:
        return info
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
        info["device"] = str(device)
    key = (abi.CUDA, device.index) if device.type == "cuda" else (abi.CPU, 0)
    with ops.state.lock:
        handle = ops.state.library.handle(*key)
        if handle is None:
            return {**info, "why": ops.state.library.refusal(*key)}
        facts = ops.state.library.facts(handle)
    architectures = facts.architectures.decode()
    return {
        **info,
        "backend": "cuda" if facts.backend == abi.CUDA else "cpu",
        "version": facts.version,
        "description": facts.description.decode(),
        "capability": facts.capability,
        "n_multiprocessors": facts.n_multiprocessors,
        "architectures": [f"sm_{int(a) // 10}" for a in architectures.split(",") if a],
        "modes": list(abi.MODES),
        "adaptive": True,
        "linear_binary_threshold": facts.extend_linear_max,
        "extend_block_size": facts.extend_block,
        "kv_block_size": facts.kv_block,
        "max_rank": facts.max_rank,
        "max_slices": facts.max_slices,
        "max_tokens": facts.max_tokens,
        "activations": ["float32", "bfloat16", "float16 (LoRA, as float32)"],
        "weights": ["float32", "float16", "bfloat16"],
    }
