"""What the tests share: the devices that are here, with the library and without, and random batches."""
import contextlib
import os
import sys
import unittest

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import mlora_kernels  # noqa: E402
from mlora_kernels import ops  # noqa: E402

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = [(device, kind) for device in DEVICES for kind in ("library", "torch")]


@contextlib.contextmanager
def backend(test, device, kind):
    """With the library, which must be there, or as if it were missing."""
    if kind == "library":
        info = mlora_kernels.kernel_info(device)
        test.assertEqual(info["backend"], device, info.get("why"))
        yield
        return
    library = ops.state.library
    handles, missing = library._handles, library.missing
    library._handles, library.missing = {}, "left out by the test"
    try:
        yield
    finally:
        library._handles, library.missing = handles, missing


class Case(unittest.TestCase):
    def each_backend(self):
        for device, kind in BACKENDS:
            with self.subTest(device=device, kind=kind), backend(self, device, kind):
                yield device, kind


def random_mapping(T, slots, generator):
    """Slots in no order: some unused, about a quarter of the tokens without."""
    used = torch.randperm(slots, generator=generator)[:max(1, slots * 2 // 3)]
    mapping = used[torch.randint(len(used), (T,), generator=generator)]
    mapping[torch.rand(T, generator=generator) < 0.25] = -1
    return mapping.to(torch.int32)
