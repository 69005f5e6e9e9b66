"""PyTorch tensors to the structs of abi.py, and the operators of the namespace `mlora`. An operator
asks for a handle of its tensors' device; where there is none, or a type or shape is not served, it
computes the same in PyTorch (reference.py)."""
import ctypes
import threading

import torch

from . import abi, reference

DTYPES = {torch.float32: abi.F32, torch.float16: abi.F16, torch.bfloat16: abi.BF16}
ACTIVATIONS = {torch.float32, torch.bfloat16}
INT_MAX = 2**31 - 1


class State:
    """The library, and the tables of factors that are on a device. A table holds addresses only, so
    it stays right for other weights at the same place; it is never freed, since a recorded graph
    may read it."""

    def __init__(self):
        self.library = abi.Library()
        self.tables = {}
        self.lock = threading.Lock()  # a handle is one thread's at a time, and ctypes lets others in


state = State()


def handle_of(tensor):
    """The handle for the tensor's device, or None: PyTorch does it."""
    if tensor.device.type == "cuda":
        key = abi.CUDA, tensor.device.index
    elif tensor.device.type == "cpu":
        key = abi.CPU, 0
    else:
        return None
    with state.lock:
        return state.library.handle(*key)


def call(name, handle, *arguments):
    with state.lock:
        state.library.call(name, handle, *arguments)


def run_on(tensor, workspace_bytes=0):
    """Where the call works, and its workspace, which the caller keeps until the call is made: what
    PyTorch's allocator gives out again, it gives to later work of the same stream."""
    workspace = None
    run = abi.Run()
    if tensor.is_cuda:
        run.stream = torch.cuda.current_stream(tensor.device).cuda_stream
    if workspace_bytes:
        workspace = torch.empty(workspace_bytes + 256, dtype=torch.uint8, device=tensor.device)
        run.workspace = (workspace.data_ptr() + 255) // 256 * 256
        run.workspace_bytes = workspace_bytes
    return run, workspace


def int32(tensor):
    return tensor.to(torch.int32).contiguous()


# ---- LoRA -------------------------------------------------------------------------------------


def is_recording(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table_of(a_weights, b_weights, scale, device):
    """The table [S, 1, LINEARS] of struct factors for stacked weights, made once for each place.
    One of the lists may be None: the table serves shrink, or expand, alone."""
    def key_of(weights):
        return weights and tuple((w.data_ptr(), tuple(w.shape), w.stride(0), w.dtype) for w in weights)

    key = key_of(a_weights), key_of(b_weights), scale, device
    table = state.tables.get(key)
    if table is not None:
        return table
    if is_recording(device):
        raise RuntimeError("mlora_kernels: these weights are used for the first time while a CUDA graph is "
                           "recorded: run the step once before")
    first = (a_weights or b_weights)[0]
    entries = (abi.Factors * (first.shape[0] * abi.LINEARS))()
    for i in range(len(a_weights or b_weights)):
        a, b = (a_weights or b_weights)[i], (b_weights or a_weights)[i]
        for slot in range(first.shape[0]):
            entry = entries[slot * abi.LINEARS + i]
            entry.a = a.data_ptr() + slot * a.stride(0) * a.element_size()
            entry.b = b.data_ptr() + slot * b.stride(0) * b.element_size()
            entry.rank = a.shape[1] if a_weights else b.shape[2]
            entry.dtype = DTYPES[a.dtype]
            entry.scale = scale
    table = torch.frombuffer(bytearray(bytes(entries)), dtype=torch.uint8).to(device)
    state.tables[key] = table
    return table


def is_served(x, weights, max_rank):
    """Whether the library takes these: else PyTorch does."""
    return (x.dtype in ACTIVATIONS and 0 < max_rank <= 512 and x.shape[0] <= 65535 and
            all(w.dtype in DTYPES and w.dtype == weights[0].dtype and w.dim() == 3 and
                w.shape[0] == weights[0].shape[0] and w.stride(2) == 1 and
                w.stride(1) == w.shape[2] and w.device == x.device for w in weights))


class Metadata:
    """What the host knows of vLLM's metadata, and the arrays, which are borrowed for the call."""

    def __init__(self, mapping, order, start, ids, n_active):
        self.mapping, self.order, self.start, self.ids = map(int32, (mapping, order, start, ids))
        self.n_segments = ids.shape[0] if n_active is None else min(int(n_active), ids.shape[0])

    def fill(self, lora):
        T = self.mapping.shape[0]
        lora.T = lora.n_tokens = lora.max_segment = T
        lora.n_segments = self.n_segments
        lora.slot = self.mapping.data_ptr()
        lora.segment_slot = self.ids.data_ptr()
        lora.segment_start = self.start.data_ptr()
        lora.order = self.order.data_ptr()


def make_lora(table, metadata, n_slices, K, N, offsets, widths, dtype, max_rank, mode):
    lora = abi.Lora()
    metadata.fill(lora)
    lora.factors = table.data_ptr()
    lora.n_layers = 1
    lora.n_slices, lora.K, lora.N = n_slices, K, N
    for i in range(n_slices):
        lora.offset[i], lora.width[i] = offsets[i], widths[i]
    lora.dtype = DTYPES[dtype]
    lora.mode = abi.MODES[mode]
    lora.max_rank = max_rank
    lora.h_by_slice = 1
    return lora


def call_lora(name, handle, lora, tensor, *arguments):
    needed = ctypes.c_size_t()
    call("lora_workspace", handle, ctypes.byref(lora), ctypes.byref(needed))
    scratch = needed.value - (lora.T * lora.n_slices * lora.max_rank * 4 + 255) // 256 * 256
    run, _workspace = run_on(tensor, scratch)
    call(name, handle, *arguments, ctypes.byref(lora), ctypes.byref(run))


def groups(n):
    """Slices as many at a time as a call takes."""
    return [(i, min(n, i + abi.SLICES)) for i in range(0, n, abi.SLICES)]


def lora_shrink(inputs, lora_a_weights, output_tensor, token_lora_mapping,
                token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc,
                lora_ids, no_lora_flag_cpu, num_active_loras, scaling, mode):
    if inputs.shape[0] == 0 or no_lora_flag_cpu.item():
        return
    weights = [reference.stacked(w) for w in lora_a_weights]
    R, K = weights[0].shape[1:]
    handle = handle_of(inputs)
    out = output_tensor
    if handle is None or not is_served(inputs, weights, R) or not out.is_contiguous():
        reference.lora_shrink(inputs, weights, out, token_lora_mapping, scaling)
        return
    h = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    h.zero_()
    x = inputs.contiguous()
    metadata = Metadata(token_lora_mapping, token_indices_sorted_by_lora_ids, lora_token_start_loc,
                        lora_ids, num_active_loras)
    for i, end in groups(len(weights)):
        table = table_of(weights[i:end], None, 1.0, x.device)
        lora = make_lora(table, metadata, end - i, K, end - i, range(end - i), [1] * (end - i), x.dtype, R,
                         mode)
        call_lora("lora_shrink", handle, lora, x, h[i].data_ptr(), x.data_ptr())
    if scaling != 1.0:
        h.mul_(scaling)
    if h is not out:
        out.copy_(h)


def lora_expand(inputs, lora_b_weights, output_tensor, token_lora_mapping,
                token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc,
                lora_ids, no_lora_flag_cpu, num_active_loras, offset_start, add_inputs, mode):
    if output_tensor.shape[0] == 0 or no_lora_flag_cpu.item():
        return
    weights = [reference.stacked(w) for w in lora_b_weights]
    metadata = Metadata(token_lora_mapping, token_indices_sorted_by_lora_ids, lora_token_start_loc,
                        lora_ids, num_active_loras)
    expand(inputs, weights, output_tensor, metadata, offset_start, add_inputs, 1.0, mode)


def expand(inputs, weights, output, metadata, offset, add_inputs, scaling, mode):
    R = weights[0].shape[2]
    handle = handle_of(output)
    if handle is None or not is_served(output, weights, R) or output.stride(1) != 1:
        reference.lora_expand(inputs, weights, output, metadata.mapping, offset, add_inputs, scaling)
        return
    h = inputs.to(torch.float32).contiguous()
    if not add_inputs:
        columns = output[:, offset:offset + sum(w.shape[1] for w in weights)]
        columns.masked_fill_((metadata.mapping >= 0).unsqueeze(1), 0)
    for i, end in groups(len(weights)):
        widths = [w.shape[1] for w in weights[i:end]]
        offsets = [offset + sum(widths[:j]) for j in range(len(widths))]
        offset += sum(widths)
        table = table_of(None, weights[i:end], scaling, output.device)
        lora = make_lora(table, metadata, end - i, 1, output.stride(0), offsets, widths, output.dtype, R,
                         mode)
        call_lora("lora_expand", handle, lora, output, output.data_ptr(), h[i].data_ptr())


def lora_shrink_expand(inputs, lora_a_weights, shrink_buffer, lora_b_weights, output_tensor,
                       token_lora_mapping, token_indices_sorted_by_lora_ids, num_tokens_per_lora,
                       lora_token_start_loc, lora_ids, no_lora_flag_cpu, num_active_loras, scaling,
                       offset_start, mode):
    if inputs.shape[0] == 0 or no_lora_flag_cpu.item():
        return
    a = [reference.stacked(w) for w in lora_a_weights]
    b = [reference.stacked(w) for w in lora_b_weights]
    R, K = a[0].shape[1:]
    handle = handle_of(inputs)
    out = output_tensor
    h = shrink_buffer
    if (handle is None or not is_served(inputs, a + b, R) or out.dtype != inputs.dtype or
            h.dtype != torch.float32 or not h.is_contiguous() or out.stride(1) != 1):
        reference.lora_shrink(inputs, a, h, token_lora_mapping, 1.0)
        reference.lora_expand(h, b, out, token_lora_mapping, offset_start, True, scaling)
        return
    x = inputs.contiguous()
    metadata = Metadata(token_lora_mapping, token_indices_sorted_by_lora_ids, lora_token_start_loc,
                        lora_ids, num_active_loras)
    offset = offset_start
    for i, end in groups(len(a)):
        widths = [w.shape[1] for w in b[i:end]]
        offsets = [offset + sum(widths[:j]) for j in range(len(widths))]
        offset += sum(widths)
        table = table_of(a[i:end], b[i:end], scaling, x.device)
        lora = make_lora(table, metadata, end - i, K, out.stride(0), offsets, widths, x.dtype, R, mode)
        call_lora("lora_shrink", handle, lora, x, h[i].data_ptr(), x.data_ptr())
        call_lora("lora_expand", handle, lora, x, out.data_ptr(), h[i].data_ptr())


# ---- draft and extend -------------------------------------------------------------------------


def extend_metadata(extend_len, kv_len, topk, total, request_start, token_kv_len, clamped_kv_len,
                    search):
    handle = handle_of(total)
    same = extend_len.dtype == kv_len.dtype and extend_len.dtype in (torch.int32, torch.int64)
    outputs = total, request_start, token_kv_len, clamped_kv_len
    if handle is None or not same or any(
            o.dtype != torch.int32 or not o.is_contiguous() for o in outputs):
        n = min(token_kv_len.shape[0], clamped_kv_len.shape[0])
        reference.extend_metadata(extend_len, kv_len, topk, total, request_start, token_kv_len[:n],
                                  clamped_kv_len[:n])
        return
    extend_len, kv_len = extend_len.contiguous(), kv_len.contiguous()
    extend = abi.Extend()
    extend.bs = extend_len.shape[0]
    extend.capacity = min(token_kv_len.shape[0], clamped_kv_len.shape[0])
    extend.topk = min(topk, INT_MAX)
    extend.search = abi.SEARCHES[search]
    extend.has_int64_lengths = extend_len.dtype == torch.int64
    extend.extend_len, extend.kv_len = extend_len.data_ptr(), kv_len.data_ptr()
    extend.total, extend.request_start = total.data_ptr(), request_start.data_ptr()
    extend.token_kv_len = token_kv_len.data_ptr()
    extend.clamped_kv_len = clamped_kv_len.data_ptr()
    run, _ = run_on(total)
    call("extend_metadata", handle, ctypes.byref(extend), ctypes.byref(run))


# ---- the paged cache --------------------------------------------------------------------------


def make_paged(qkv, k, v, block_table, row_start, kv_len, position, row, H, G):
    """The struct, and what must live until the call is made; None where PyTorch does it."""
    tensors = [int32(t) for t in (block_table, row_start, kv_len, position, row)]
    if (qkv.dtype not in ACTIVATIONS or k.dtype not in ACTIVATIONS or v.dtype != k.dtype or
            not all(t.is_contiguous() for t in (qkv, k, v)) or k.shape[2] != 16 or
            k.shape[3] % 2 or k.shape[3] > 512 or H % G):
        return None, tensors
    paged = abi.Paged()
    paged.T, paged.Q = qkv.shape[0], row_start.shape[0] - 1
    paged.H, paged.G, paged.d = H, G, k.shape[3]
    paged.max_kv = block_table.shape[1] * 16
    paged.max_row = min(paged.T, paged.max_kv)
    paged.dtype, paged.kv_dtype = DTYPES[qkv.dtype], DTYPES[k.dtype]
    paged.k, paged.v = k.data_ptr(), v.data_ptr()
    paged.max_blocks = block_table.shape[1]
    (paged.block_table, paged.row_start, paged.kv_len, paged.position,
     paged.row) = [t.data_ptr() for t in tensors]
    paged.amplitude = 1.0
    return paged, tensors


def kv_write(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row, num_heads,
             num_kv_heads, frequency, amplitude):
    if qkv.shape[0] == 0:
        return
    handle = handle_of(qkv)
    paged, _kept = make_paged(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row,
                              num_heads, num_kv_heads)
    if handle is None or paged is None:
        reference.kv_write(qkv, k_cache, v_cache, block_table, position, row, num_heads, num_kv_heads,
                           frequency, amplitude)
        return
    if frequency is not None:
        frequency = frequency.to(torch.float32).contiguous()
        paged.frequency = frequency.data_ptr()
    paged.amplitude = amplitude
    run, _ = run_on(qkv)
    call("kv_write", handle, qkv.data_ptr(), ctypes.byref(paged), ctypes.byref(run))


def paged_attention(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row, num_heads,
                    num_kv_heads, scale, max_row, max_kv, window):
    y = qkv.new_empty(qkv.shape[0], num_heads * k_cache.shape[3])
    if qkv.shape[0] == 0:
        return y
    handle = handle_of(qkv)
    paged, _kept = make_paged(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row,
                              num_heads, num_kv_heads)
    if handle is None or paged is None:
        reference.attention(y, qkv, k_cache, v_cache, block_table, position, row, num_heads,
                            num_kv_heads, scale, window)
        return y
    paged.scale, paged.window = scale, window
    paged.max_row, paged.max_kv = max_row, max_kv
    needed = ctypes.c_size_t()
    call("attention_workspace", handle, ctypes.byref(paged), ctypes.byref(needed))
    run, _workspace = run_on(qkv, needed.value)
    call("attention", handle, y.data_ptr(), qkv.data_ptr(), ctypes.byref(paged), ctypes.byref(run))
    return y


# ---- the operators ----------------------------------------------------------------------------

_METADATA = ("Tensor token_lora_mapping, Tensor token_indices_sorted_by_lora_ids, "
             "Tensor num_tokens_per_lora, Tensor lora_token_start_loc, Tensor lora_ids, "
             "Tensor no_lora_flag_cpu, Tensor? num_active_loras")
_PAGED = ("Tensor block_table, Tensor row_start, Tensor kv_len, Tensor position, Tensor row, "
          "int num_heads, int num_kv_heads")


def _nothing(*_arguments):
    return None


def _fake_attention(qkv, k_cache, v_cache, block_table, row_start, kv_len, position, row, num_heads,
                    num_kv_heads, scale, max_row, max_kv, window):
    return qkv.new_empty(qkv.shape[0], num_heads * k_cache.shape[3])


_OPERATORS = [
    (lora_shrink, f"(Tensor inputs, Tensor[] lora_a_weights, Tensor(a!) output_tensor, {_METADATA}, "
                  "float scaling, str way) -> ()", _nothing),
    (lora_expand, f"(Tensor inputs, Tensor[] lora_b_weights, Tensor(a!) output_tensor, {_METADATA}, "
                  "int offset_start, bool add_inputs, str way) -> ()", _nothing),
    (lora_shrink_expand, "(Tensor inputs, Tensor[] lora_a_weights, Tensor(a!) shrink_buffer, "
                         f"Tensor[] lora_b_weights, Tensor(b!) output_tensor, {_METADATA}, "
                         "float scaling, int offset_start, str way) -> ()", _nothing),
    (extend_metadata, "(Tensor extend_len, Tensor kv_len, int topk, Tensor(a!) total, "
                      "Tensor(b!) request_start, Tensor(c!) token_kv_len, "
                      "Tensor(d!) clamped_kv_len, str search) -> ()", _nothing),
    (kv_write, f"(Tensor(a!) qkv, Tensor(b!) k_cache, Tensor(c!) v_cache, {_PAGED}, "
               "Tensor? frequency, float amplitude) -> ()", _nothing),
    (paged_attention, f"(Tensor qkv, Tensor k_cache, Tensor v_cache, {_PAGED}, float scale, "
                      "int max_row, int max_kv, int window) -> Tensor", _fake_attention),
]

library = torch.library.Library("mlora", "DEF")
for _function, _schema, _fake in _OPERATORS:
    library.define(_function.__name__ + _schema)
    for _key in ("CPU", "CUDA"):
        library.impl(_function.__name__, _function, _key)
    torch.library.register_fake("mlora::" + _function.__name__, _fake, lib=library)
