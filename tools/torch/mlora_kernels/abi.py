"""libmlora_kernels.so through ctypes: the structs of kernels/mlora_kernels.h and one handle for each
device. Nothing here knows PyTorch; addresses are plain integers."""
import ctypes
import os
from ctypes import c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p

VERSION = 1
CPU, CUDA = 1, 2
F32, F16, BF16 = 0, 1, 2
LINEARS, SLICES = 7, 3
MODES = {"auto": 0, "loop": 1, "gbmm": 2, "bgmv": 3, "sgmv": 4, "fused": 5}
SEARCHES = {"adaptive": 0, "linear": 1, "binary": 2, "by_request": 3}


class Facts(ctypes.Structure):
    _fields_ = [(name, c_int) for name in (
        "version", "backend", "capability", "n_multiprocessors", "max_rank", "max_slices",
        "max_tokens", "kv_block", "extend_linear_max", "extend_block")] + [
        ("description", c_char * 96), ("architectures", c_char * 64)]


class Run(ctypes.Structure):
    _fields_ = [("stream", c_void_p), ("workspace", c_void_p), ("workspace_bytes", c_size_t)]


class Factors(ctypes.Structure):
    _fields_ = [("a", c_void_p), ("b", c_void_p), ("rank", c_int32), ("dtype", c_int32),
                ("scale", c_float), ("g", c_void_p), ("b_bias", c_void_p), ("bias_delta", c_void_p)]


class Lora(ctypes.Structure):
    _fields_ = [("factors", c_void_p), ("n_layers", c_int), ("layer", c_int), ("linear", c_int),
                ("n_slices", c_int), ("T", c_int), ("K", c_int), ("N", c_int),
                ("offset", c_int * SLICES), ("width", c_int * SLICES), ("dtype", c_int),
                ("mode", c_int), ("max_rank", c_int), ("h_by_slice", c_int),
                ("expands_more", c_int), ("bias", c_void_p), ("n_segments", c_int),
                ("n_tokens", c_int), ("max_segment", c_int), ("slot", c_void_p),
                ("segment_slot", c_void_p), ("segment_start", c_void_p), ("order", c_void_p)]


class Paged(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("T", "Q", "H", "G", "d", "max_row", "max_kv", "window")] + [
        ("scale", c_float), ("dtype", c_int), ("kv_dtype", c_int), ("k", c_void_p),
        ("v", c_void_p), ("max_blocks", c_int), ("block_table", c_void_p),
        ("row_start", c_void_p), ("kv_len", c_void_p), ("position", c_void_p), ("row", c_void_p),
        ("frequency", c_void_p), ("amplitude", c_float)]


class Extend(ctypes.Structure):
    _fields_ = [(name, c_int) for name in (
        "bs", "capacity", "topk", "search", "has_int64_lengths", "fills_tail")] + [
        ("tail", c_int32)] + [(name, c_void_p) for name in (
            "extend_len", "kv_len", "adapter", "total", "request_start", "token_kv_len",
            "clamped_kv_len", "token_position", "token_request", "token_adapter")]


class Failure(RuntimeError):
    """What the library refused, in its words."""


_SIGNATURES = {  # without "mlora_kernels_"
    "error": (c_char_p, []),
    "version": (c_int, []),
    "open": (c_int, [ctypes.POINTER(c_void_p), c_int, c_int, c_int]),
    "close": (None, [c_void_p]),
    "info": (c_int, [c_void_p, ctypes.POINTER(Facts)]),
    "lora_workspace": (c_int, [c_void_p, ctypes.POINTER(Lora), ctypes.POINTER(c_size_t)]),
    "lora_shrink": (c_int, [c_void_p, c_void_p, c_void_p, ctypes.POINTER(Lora), ctypes.POINTER(Run)]),
    "lora_expand": (c_int, [c_void_p, c_void_p, c_void_p, ctypes.POINTER(Lora), ctypes.POINTER(Run)]),
    "lora_add": (c_int, [c_void_p, c_void_p, c_void_p, ctypes.POINTER(Lora), ctypes.POINTER(Run)]),
    "lora_expand_silu_mul": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p, ctypes.POINTER(Lora),
                                     ctypes.POINTER(Run)]),
    "kv_write": (c_int, [c_void_p, c_void_p, ctypes.POINTER(Paged), ctypes.POINTER(Run)]),
    "attention_workspace": (c_int, [c_void_p, ctypes.POINTER(Paged), ctypes.POINTER(c_size_t)]),
    "attention": (c_int, [c_void_p, c_void_p, c_void_p, ctypes.POINTER(Paged), ctypes.POINTER(Run)]),
    "extend_metadata": (c_int, [c_void_p, ctypes.POINTER(Extend), ctypes.POINTER(Run)]),
}


def library_paths():
    """Where the library is looked for, first one first."""
    named = os.environ.get("MLORA_KERNELS_LIBRARY")
    if named is not None:
        return [named]
    root = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
    return [os.path.join(root, "build", "libmlora_kernels.so"), "libmlora_kernels.so.1"]


class Library:
    """The shared object and a handle for each device that was asked for. `missing` says why there
    is none."""

    def __init__(self):
        self.path, self.missing, self._calls = None, None, {}
        self._handles, self._refusals = {}, {}
        reasons = []
        for path in library_paths():
            try:
                self._load(path)
                return
            except (OSError, AttributeError, Failure) as why:
                reasons.append(str(why))
        self.missing = "; ".join(reasons)

    def _load(self, path):
        library = ctypes.CDLL(path)
        calls = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, "mlora_kernels_" + name)
            function.restype, function.argtypes = result, arguments
            calls[name] = function
        if calls["version"]() != VERSION:
            raise Failure(f"{path}: version {calls['version']()}, this module is for {VERSION}")
        self._calls, self.path = calls, path

    def call(self, name, *arguments):
        """Raises Failure with the library's text where it refuses."""
        if self._calls[name](*arguments) != 0:
            raise Failure(self._calls["error"]().decode())

    def handle(self, backend, ordinal):
        """A handle, or None where that backend cannot be had: refusal() says why."""
        key = backend, ordinal
        if key in self._handles or key in self._refusals or self.missing:
            return self._handles.get(key)
        out = c_void_p()
        try:
            self.call("open", ctypes.byref(out), VERSION, backend, ordinal)
            self._handles[key] = out
        except Failure as why:
            self._refusals[key] = str(why)
        return self._handles.get(key)

    def refusal(self, backend, ordinal):
        return self.missing or self._refusals.get((backend, ordinal))

    def facts(self, handle):
        facts = Facts()
        self.call("info", handle, ctypes.byref(facts))
        return facts
