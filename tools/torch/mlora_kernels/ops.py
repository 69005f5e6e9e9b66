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


def expect(op, name, tensor, shape, device):
    """Refuse a tensor past whose end the library would read; None in a shape is any length."""
    found = list(tensor.shape)
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: {name} is {found}, must be [{wanted}]")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, must be on {device}")


def int32(tensor):
    return tensor.to(torch.int32).contiguous()


# ---- LoRA -------------------------------------------------------------------------------------


def is_recording(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table_of(weights, rank, scale):
    """The table [S, 1, LINEARS] of struct factors for stacked weights, made once for each place. It
    has them as A and as B: it serves shrink, or expand, alone."""
    device = weights[0].device
    key = tuple((w.data_ptr(), tuple(w.shape), w.stride(0), w.dtype) for w in weights), rank, scale, device
    table = state.tables.get(key)
    if table is not None:
        return table
    if is_recording(device):
        raise RuntimeError("mlora_kernels: these weights are used for the first time while a CUDA graph is "
                           "recorded: run the step once before")
    n_slots = weights[0].shape[0]
    entries = (abi.Factors * (n_slots * abi.LINEARS))()
    for i, weight in enumerate(weights):
        for slot in range(n_slots):
            entry = entries[slot * abi.LINEARS + i]
            entry.a = entry.b = weight.data_ptr() + slot * weight.stride(0) * weight.element_size()
            entry.rank, entry.dtype, entry.scale = rank, DTYPES[weight.dtype], scale
    table = torch.frombuffer(bytearray(bytes(entries)), dtype=torch.uint8).to(device)
    state.tables[key] = table
    return table


def stacked_weights(op, name, weights, shape, device):
    """Each as [S, *shape]."""
    if not weights:
        raise ValueError(f"{op}: {name} is empty")
    weights = [reference.stacked(w) for w in weights]
    for i, weight in enumerate(weights):
        expect(op, f"{name}[{i}]", weight, (weights[0].shape[0], *shape), device)
    return weights


def is_served(dtype, weights, rank, T):
    """Whether the library takes these: else PyTorch does."""
    return (dtype in ACTIVATIONS and 0 < rank <= 512 and T <= 65535 and
            all(w.dtype in DTYPES and w.dtype == weights[0].dtype and w.stride(2) == 1 and
                w.stride(1) == w.shape[2] for w in weights))


class Metadata:
    """What the host knows of vLLM's metadata, and the arrays, which are borrowed for the call."""

    def __init__(self, op, T, device, mapping, order, tokens, start, ids, n_active, mode):
        n = ids.shape[0]
        for name, tensor, length in (
                ("token_lora_mapping", mapping, T), ("token_indices_sorted_by_lora_ids", order, T),
                ("num_tokens_per_lora", tokens, n), ("lora_token_start_loc", start, n + 1),
                ("lora_ids", ids, n)):
            expect(op, name, tensor, (length,), device)
        if mode not in abi.MODES:
            raise ValueError(f"{op}: mode is {mode!r}, must be one of {', '.join(abi.MODES)}")
        self.T, self.mode = T, abi.MODES[mode]
        self.mapping, self.order, self.start, self.ids = map(int32, (mapping, order, start, ids))
        self.n_segments = n if n_active is None else max(0, min(int(n_active), n))

    def fill(self, lora):
        lora.T = lora.n_tokens = lora.max_segment = self.T
        lora.n_segments = self.n_segments
        lora.slot = self.mapping.data_ptr()
        lora.segment_slot = self.ids.data_ptr()
        lora.segment_start = self.start.data_ptr()
        lora.order = self.order.data_ptr()


def make_lora(table, metadata, K, N, offsets, widths, dtype, rank):
    lora = abi.Lora()
    metadata.fill(lora)
    lora.factors = table.data_ptr()
    lora.n_layers = 1
    lora.n_slices, lora.K, lora.N = len(widths), K, N
    for i, (offset, width) in enumerate(zip(offsets, widths)):
        lora.offset[i], lora.width[i] = offset, width
    lora.dtype = DTYPES[dtype]
    lora.mode = metadata.mode
    lora.max_rank = rank
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


def shrink(h, x, weights, metadata):
    """h[i, t, :] = A x[t, :]; rows of h without an adapter are left as they are, or become zeros."""
    R, K = weights[0].shape[1:]
    if x.dtype == torch.float16:
        x = x.float()
    handle = handle_of(x)
    if handle is None or not is_served(x.dtype, weights, R, metadata.T):
        reference.lora_shrink(x, weights, h, metadata.mapping, 1.0)
        return
    x = x.contiguous()
    for i, end in groups(len(weights)):
        n = end - i
        lora = make_lora(table_of(weights[i:end], R, 1.0), metadata, K, n, range(n), [1] * n, x.dtype, R)
        call_lora("lora_shrink", handle, lora, x, h[i].data_ptr(), x.data_ptr())


def expand(y, h, weights, metadata, offset, add_inputs, scaling):
    """Columns of slice i of y[t, :] (+)= scaling * B h[i, t, :]."""
    R = weights[0].shape[2]
    if y.dtype == torch.float16 or (y.dtype in ACTIVATIONS and y.shape[1] > 1 and y.stride(1) != 1):
        columns = y[:, offset:offset + sum(w.shape[1] for w in weights)]
        wide = columns.float().contiguous()
        expand(wide, h, weights, metadata, 0, add_inputs, scaling)
        columns.copy_(wide)
        return
    handle = handle_of(y)
    if handle is None or not is_served(y.dtype, weights, R, metadata.T):
        reference.lora_expand(h, weights, y, metadata.mapping, offset, add_inputs, scaling)
        return
    h = h.to(torch.float32).contiguous()
    if not add_inputs:
        columns = y[:, offset:offset + sum(w.shape[1] for w in weights)]
        columns.masked_fill_((metadata.mapping >= 0).unsqueeze(1), 0)
    pitch = y.stride(0) if metadata.T > 1 else y.shape[1]
    for i, end in groups(len(weights)):
        widths = [w.shape[1] for w in weights[i:end]]
        offsets = [offset + sum(widths[:j]) for j in range(len(widths))]
        offset += sum(widths)
        lora = make_lora(table_of(weights[i:end], R, scaling), metadata, 1, pitch, offsets, widths, y.dtype, R)
        call_lora("lora_expand", handle, lora, y, y.data_ptr(), h[i].data_ptr())


def expect_columns(op, output, T, offset, weights, device):
    expect(op, "output_tensor", output, (T, None), device)
    end = offset + sum(w.shape[1] for w in weights)
    if offset < 0 or end > output.shape[1]:
        raise ValueError(f"{op}: the slices are columns {offset} to {end - 1}, output_tensor has "
                         f"{output.shape[1]} columns")


def lora_shrink(inputs, lora_a_weights, output_tensor, token_lora_mapping,
                token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc,
                lora_ids, no_lora_flag_cpu, num_active_loras, scaling, mode):
    op, device = "lora_shrink", inputs.device
    expect(op, "inputs", inputs, (None, None), device)
    T, K = inputs.shape
    if T == 0 or no_lora_flag_cpu.item():
        return
    R = output_tensor.shape[-1]
    weights = stacked_weights(op, "lora_a_weights", lora_a_weights, (R, K), device)
    expect(op, "output_tensor", output_tensor, (len(weights), T, R), device)
    metadata = Metadata(op, T, device, token_lora_mapping, token_indices_sorted_by_lora_ids,
                        num_tokens_per_lora, lora_token_start_loc, lora_ids, num_active_loras,
                        mode)
    h = output_tensor
    if h.dtype != torch.float32 or not h.is_contiguous():
        h = torch.empty(h.shape, dtype=torch.float32, device=device)
    h.zero_()
    shrink(h, inputs, weights, metadata)
    if scaling != 1.0:
        h.mul_(scaling)
    if h is not output_tensor:
        output_tensor.copy_(h)


def lora_expand(inputs, lora_b_weights, output_tensor, token_lora_mapping,
                token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc,
                lora_ids, no_lora_flag_cpu, num_active_loras, offset_start, add_inputs, mode):
    op, device = "lora_expand", inputs.device
    expect(op, "inputs", inputs, (len(lora_b_weights), None, None), device)
    T, R = inputs.shape[1:]
    if T == 0 or no_lora_flag_cpu.item():
        return
    weights = stacked_weights(op, "lora_b_weights", lora_b_weights, (None, R), device)
    expect_columns(op, output_tensor, T, offset_start, weights, device)
    metadata = Metadata(op, T, device, token_lora_mapping, token_indices_sorted_by_lora_ids,
                        num_tokens_per_lora, lora_token_start_loc, lora_ids, num_active_loras,
                        mode)
    expand(output_tensor, inputs, weights, metadata, offset_start, add_inputs, 1.0)


def lora_shrink_expand(inputs, lora_a_weights, shrink_buffer, lora_b_weights, output_tensor,
                       token_lora_mapping, token_indices_sorted_by_lora_ids, num_tokens_per_lora,
                       lora_token_start_loc, lora_ids, no_lora_flag_cpu, num_active_loras, scaling,
                       offset_start, mode):
    op, device = "lora_shrink_expand", inputs.device
    expect(op, "inputs", inputs, (None, None), device)
    T, K = inputs.shape
    if T == 0 or no_lora_flag_cpu.item():
        return
    R = shrink_buffer.shape[-1]
    a = stacked_weights(op, "lora_a_weights", lora_a_weights, (R, K), device)
    b = stacked_weights(op, "lora_b_weights", lora_b_weights, (None, R), device)
    expect(op, "shrink_buffer", shrink_buffer, (len(a), T, R), device)
    if len(b) != len(a):
        raise ValueError(f"{op}: {len(a)} slices of lora_a_weights, {len(b)} of lora_b_weights")
    expect_columns(op, output_tensor, T, offset_start, b, device)
    metadata = Metadata(op, T, device, token_lora_mapping, token_indices_sorted_by_lora_ids,
                        num_tokens_per_lora, lora_token_start_loc, lora_ids, num_active_loras,
                        mode)
    h = shrink_buffer
    if h.dtype != torch.float32 or not h.is_contiguous():
        h = torch.empty(h.shape, dtype=torch.float32, device=device)
    shrink(h, inputs, a, metadata)
    expand(output_tensor, h, b, metadata, offset_start, True, scaling)


# ---- draft and extend -------------------------------------------------------------------------


def extend_metadata(extend_len, kv_len, topk, total, request_start, token_kv_len, clamped_kv_len,
                    search):
    op, device = "extend_metadata", total.device
    bs = extend_len.shape[0]
    for name, tensor, n in (("extend_seq_lens", extend_len, bs), ("seq_lens", kv_len, bs), ("total", total, 1),
                            ("request_start", request_start, bs + 1),
                            ("out_seqlens_expanded", token_kv_len, None),
                            ("out_nsa_cache_seqlens", clamped_kv_len, None)):
        expect(op, name, tensor, (n,), device)
    if search not in abi.SEARCHES:
        raise ValueError(f"{op}: search is {search!r}, must be one of {', '.join(abi.SEARCHES)}")
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
    extend.bs = bs
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


def make_paged(op, qkv, k, v, block_table, row_start, kv_len, position, row, H, G):
    """The struct, and what must live until the call is made; None where PyTorch does it."""
    T, Q = qkv.shape[0], kv_len.shape[0]
    expect(op, "k_cache", k, (None, G, None, None), qkv.device)
    for name, tensor, shape in (
            ("qkv", qkv, (T, (H + 2 * G) * k.shape[3])), ("v_cache", v, k.shape),
            ("block_table", block_table, (Q, None)), ("row_start", row_start, (Q + 1,)),
            ("kv_len", kv_len, (Q,)), ("position", position, (T,)), ("row", row, (T,))):
        expect(op, name, tensor, shape, qkv.device)
    tensors = [int32(t) for t in (block_table, row_start, kv_len, position, row)]
    if (qkv.dtype not in ACTIVATIONS or k.dtype not in ACTIVATIONS or v.dtype != k.dtype or
            not all(t.is_contiguous() for t in (qkv, k, v)) or k.shape[2] != 16 or
            k.shape[3] % 2 or k.shape[3] > 512 or H % G):
        return None, tensors
    paged = abi.Paged()
    paged.T, paged.Q = T, Q
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
    paged, _kept = make_paged("kv_write", qkv, k_cache, v_cache, block_table, row_start, kv_len, position,
                              row, num_heads, num_kv_heads)
    if frequency is not None:
        expect("kv_write", "frequency", frequency, (k_cache.shape[3] // 2,), qkv.device)
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
    paged, _kept = make_paged("paged_attention", qkv, k_cache, v_cache, block_table, row_start, kv_len,
                              position, row, num_heads, num_kv_heads)
    if handle is None or paged is None:
        reference.attention(y, qkv, k_cache, v_cache, block_table, position, row, num_heads,
                            num_kv_heads, scale, window, max_kv)
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


_OPERATORS = [  # an argument of the name `mode` is one of PyTorch's own when it compiles: `way`
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
