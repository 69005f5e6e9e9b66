"""LoRA on PyTorch tensors against products in float32, gathered for each token."""
import re
import unittest
from unittest import mock

import torch

import support
from support import mlora_kernels, ops
from mlora_kernels import reference

# T, slots, rank, K, widths of the slices
SHAPES = [
    (1, 1, 1, 32, [16]), (1, 3, 16, 64, [48, 16, 16]), (2, 2, 3, 40, [7]), (5, 4, 8, 96, [64, 64]),
    (7, 9, 17, 33, [5, 3, 9]), (16, 2, 32, 128, [72]), (17, 5, 64, 256, [128, 32, 32]),
    (64, 7, 16, 512, [256]), (64, 64, 16, 128, [64, 64]), (130, 3, 100, 64, [40]),
    (33, 4, 256, 96, [24, 40]), (70, 3, 512, 160, [56]), (200, 6, 8, 64, [32, 16, 16, 8]),
]
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16),
         (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)]


class Batch:
    """Random inputs of norm about 1 and what the products are in float32."""

    def __init__(self, shape, types, device, seed, four_dims=True):
        T, slots, R, K, self.widths = shape
        dtype, weight_dtype = types
        g = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=g)

        one = (1,) if four_dims else ()
        self.x = normal(T, K).to(dtype).to(device)
        self.a = [(normal(slots, *one, R, K) / K**0.5).to(weight_dtype).to(device) for _ in self.widths]
        self.b = [(normal(slots, *one, n, R) / R**0.5).to(weight_dtype).to(device) for n in self.widths]
        self.offset = 3
        self.y = normal(T, self.offset + sum(self.widths) + 2).to(dtype).to(device)
        self.mapping = support.random_mapping(T, slots, g).to(device)
        self.slots, self.R = slots, R
        self.h = torch.full((len(self.widths), T, R), 7.0, device=device)
        self.metadata = mlora_kernels.lora_metadata(self.mapping, slots)

    def shrunk(self, scaling):
        own = (self.mapping >= 0).float().view(1, -1, 1)
        at = self.mapping.clamp(min=0).long()
        out = [torch.einsum("tk,trk->tr", self.x.double(), a.flatten(0, -3)[at].double()) for a in self.a]
        return scaling * own * torch.stack(out).float()

    def expanded(self, h, add_inputs, scaling=1.0):
        y = self.y.double().clone()
        at = self.mapping.clamp(min=0).long()
        first = self.offset
        for i, b in enumerate(self.b):
            delta = scaling * torch.einsum("tr,tnr->tn", h[i].double(), b.flatten(0, -3)[at].double())
            old = y[:, first:first + b.shape[-2]]
            new = old + delta if add_inputs else delta
            y[:, first:first + b.shape[-2]] = torch.where((self.mapping >= 0).unsqueeze(1), new, old)
            first += b.shape[-2]
        return y.to(self.y.dtype)


def close(got, want):
    """bf16 has 8 bits: half a unit of rounding, which a sum that is a hair off may take to the other
    side. In f32 up to 512 terms were summed."""
    rtol, atol = {torch.bfloat16: (2**-7, 1e-3), torch.float16: (2**-10, 1e-3)}.get(want.dtype, (2e-5, 5e-5))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def modes(device, kind):
    """The CPU and PyTorch have one way."""
    return ["auto", "loop", "gbmm", "bgmv", "sgmv", "fused"] if (device, kind) == ("cuda", "library") else ["auto"]


class Lora(support.Case):
    def test_shrink(self):
        for device, kind in self.each_backend():
            for seed, shape in enumerate(SHAPES):
                for types in TYPES:
                    for mode in modes(device, kind):
                        with self.subTest(shape=shape, types=types, mode=mode):
                            batch = Batch(shape, types, device, seed)
                            scaling = 0.5 if seed % 2 else 1.0
                            mlora_kernels.lora_shrink(batch.x, batch.a, batch.h, *batch.metadata, scaling,
                                                      mode=mode)
                            close(batch.h, batch.shrunk(scaling))

    def test_expand(self):
        for device, kind in self.each_backend():
            for seed, shape in enumerate(SHAPES):
                for types in TYPES:
                    for mode in modes(device, kind):
                        with self.subTest(shape=shape, types=types, mode=mode):
                            batch = Batch(shape, types, device, seed)
                            h = torch.randn(batch.h.shape, device=device)
                            want = batch.expanded(h, seed % 3 > 0)
                            mlora_kernels.lora_expand(h, batch.b, batch.y, *batch.metadata,
                                                      offset_start=batch.offset, add_inputs=seed % 3 > 0,
                                                      mode=mode)
                            close(batch.y, want)

    def test_shrink_expand(self):
        for device, kind in self.each_backend():
            for seed, shape in enumerate(SHAPES):
                for types in TYPES:
                    with self.subTest(shape=shape, types=types):
                        batch = Batch(shape, types, device, seed, four_dims=False)
                        want = batch.expanded(batch.shrunk(1.0), True, 0.25)
                        mlora_kernels.lora_shrink_expand(batch.x, batch.a, batch.h, batch.b, batch.y,
                                                         *batch.metadata, 0.25, batch.offset)
                        close(batch.y, want)

    def test_neighbours_do_not_matter(self):
        """A token alone gets what it gets among others: the same bits on the CPU."""
        for _ in self.each_backend_of("cpu", "library"):
            batch = Batch(SHAPES[6], TYPES[1], "cpu", 1)
            mlora_kernels.lora_shrink(batch.x, batch.a, batch.h, *batch.metadata, 1.0)
            for t in range(batch.x.shape[0]):
                h = torch.zeros(len(batch.widths), 1, batch.R)
                metadata = mlora_kernels.lora_metadata(batch.mapping[t:t + 1], batch.slots)
                mlora_kernels.lora_shrink(batch.x[t:t + 1], batch.a, h, *metadata, 1.0)
                self.assertTrue(torch.equal(h[:, 0], batch.h[:, t]))

    def each_backend_of(self, device, kind):
        with support.backend(self, device, kind):
            yield

    def test_older_arguments(self):
        """vLLM before num_active_loras: the scaling stands in its place."""
        for device, _ in self.each_backend():
            batch = Batch(SHAPES[3], TYPES[0], device, 5)
            mlora_kernels.lora_shrink(batch.x, batch.a, batch.h, *batch.metadata[:6], 2.0)
            close(batch.h, batch.shrunk(2.0))

    def test_all_active_count(self):
        """Without a count of active adapters all entries are looked at, the empty ones, too."""
        for device, _ in self.each_backend():
            batch = Batch(SHAPES[6], TYPES[1], device, 5)
            mlora_kernels.lora_shrink(batch.x, batch.a, batch.h, *batch.metadata[:6], None, 1.0)
            close(batch.h, batch.shrunk(1.0))

    def test_nobody_has_an_adapter(self):
        for device, _ in self.each_backend():
            batch = Batch(SHAPES[3], TYPES[1], device, 5)
            metadata = mlora_kernels.lora_metadata(torch.full_like(batch.mapping, -1), batch.slots)
            self.assertTrue(metadata[5].item())
            before = batch.y.clone()
            mlora_kernels.lora_shrink_expand(batch.x, batch.a, batch.h, batch.b, batch.y, *metadata, 1.0)
            self.assertTrue(torch.equal(batch.y, before))
            metadata[5].fill_(False)  # a recorded step does not know
            mlora_kernels.lora_shrink_expand(batch.x, batch.a, batch.h, batch.b, batch.y, *metadata, 1.0)
            self.assertTrue(torch.equal(batch.y, before))

    def test_positions_of_older_arguments(self):
        """vLLM before num_active_loras: offset_start and add_inputs follow the flag."""
        for device, _ in self.each_backend():
            batch = Batch(SHAPES[3], TYPES[0], device, 5)
            h = torch.randn(batch.h.shape, device=device)
            want = batch.expanded(h, True)
            mlora_kernels.lora_expand(h, batch.b, batch.y, *batch.metadata[:6], batch.offset, True)
            close(batch.y, want)

    def test_float16_is_served(self):
        """By the library, not by PyTorch in its place; also where output is strided."""
        for device in support.DEVICES:
            with support.backend(self, device, "library"), mock.patch.object(ops, "reference", None):
                ops.reference = mock.Mock(stacked=reference.stacked, lora_shrink=None, lora_expand=None)
                batch = Batch(SHAPES[2], (torch.float16, torch.float16), device, 5)
                want = batch.expanded(batch.shrunk(1.0), True, 0.5)
                y = batch.y.t().contiguous().t()
                mlora_kernels.lora_shrink_expand(batch.x, batch.a, batch.h, batch.b, y, *batch.metadata, 0.5,
                                                 batch.offset)
                close(y, want)

    def test_what_does_not_fit_is_refused(self):
        """Before anything past the end of a tensor is read or written."""
        for device, _ in self.each_backend():
            def change(**changed):
                """lora_shrink_expand of a batch in which some arguments are others."""
                batch = Batch(SHAPES[4], TYPES[1], device, 5)  # 7 tokens, 9 slots, rank 17, K 33, 5 + 3 + 9
                names = ("inputs", "a", "h", "b", "y", "mapping", "order", "tokens", "start", "ids", "flag",
                         "active")
                arguments = dict(zip(names, (batch.x, batch.a, batch.h, batch.b, batch.y, *batch.metadata)))
                arguments.update({name: value(arguments[name]) for name, value in changed.items()})
                mlora_kernels.lora_shrink_expand(*arguments.values(), 1.0, batch.offset)

            change()
            for text, changed in (
                    ("inputs is [33], must be [any, any]", {"inputs": lambda t: t[0]}),
                    ("lora_a_weights is empty", {"a": lambda t: []}),
                    ("lora_a_weights[0] is [9, 17, 33], must be [9, 17, 32]", {"inputs": lambda t: t[:, 1:]}),
                    ("lora_a_weights[2] is [9, 16, 33], must be [9, 17, 33]",
                     {"a": lambda t: [*t[:2], t[2][:, :, :16]]}),
                    ("lora_a_weights[1] is [8, 17, 33], must be [9, 17, 33]",
                     {"a": lambda t: [t[0], t[1][:8], t[2]]}),
                    ("shrink_buffer is [3, 6, 17], must be [3, 7, 17]", {"h": lambda t: t[:, :6]}),
                    ("lora_b_weights[0] is [9, 5, 16], must be [9, any, 17]",
                     {"b": lambda t: [w[..., :16] for w in t]}),
                    ("3 slices of lora_a_weights, 2 of lora_b_weights", {"b": lambda t: t[:2]}),
                    ("output_tensor is [6, 22], must be [7, any]", {"y": lambda t: t[:6]}),
                    ("the slices are columns 3 to 19, output_tensor has 19 columns", {"y": lambda t: t[:, :19]}),
                    ("token_lora_mapping is [6], must be [7]", {"mapping": lambda t: t[:6]}),
                    ("token_indices_sorted_by_lora_ids is [3], must be [7]", {"order": lambda t: t[:3]}),
                    ("num_tokens_per_lora is [9], must be [10]", {"tokens": lambda t: t[:9]}),
                    ("lora_token_start_loc is [10], must be [11]", {"start": lambda t: t[:10]}),
                    ("lora_ids is on cpu, must be on cuda:0", {"ids": lambda t: t.cpu()})):
                if device == "cpu" and "cuda" in text:
                    continue
                with self.subTest(text=text):
                    with self.assertRaisesRegex(ValueError, re.escape("lora_shrink_expand: " + text)):
                        change(**changed)
            batch = Batch(SHAPES[4], TYPES[1], device, 5)
            with self.assertRaisesRegex(ValueError, "lora_shrink: mode is 'fast', must be one of auto, loop"):
                mlora_kernels.lora_shrink(batch.x, batch.a, batch.h, *batch.metadata, 1.0, mode="fast")
            with self.assertRaisesRegex(ValueError, r"lora_shrink: output_tensor is \[2, 7, 17\], must be \[3, 7, "):
                mlora_kernels.lora_shrink(batch.x, batch.a, batch.h[:2], *batch.metadata, 1.0)
            with self.assertRaisesRegex(ValueError, r"lora_expand: inputs is \[2, 7, 17\], must be \[3, any, any\]"):
                mlora_kernels.lora_expand(batch.h[:2], batch.b, batch.y, *batch.metadata)
            with self.assertRaisesRegex(ValueError, "lora_expand: the slices are columns -1 to 15, output_tensor "):
                mlora_kernels.lora_expand(batch.h, batch.b, batch.y, *batch.metadata, offset_start=-1)

    def test_compiled(self):
        for device, kind in self.each_backend():
            def step(x, y, h, a, b, *metadata):
                x = x * 2
                mlora_kernels.lora_shrink_expand(x, a, h, b, y, *metadata, 0.5, 3)
                return y + 1

            batch = Batch(SHAPES[6], TYPES[1], device, 5)
            arguments = batch.x, batch.y, batch.h, batch.a, batch.b, *batch.metadata
            want = step(batch.x, batch.y.clone(), *arguments[2:])
            compiled = torch.compile(step, fullgraph=True,
                                     backend="inductor" if device == "cuda" else "aot_eager")
            close(compiled(batch.x, batch.y.clone(), *arguments[2:]), want)

    @unittest.skipUnless(torch.cuda.is_available(), "CUDA graphs are of a GPU")
    def test_recorded(self):
        """A graph reads the metadata of its replay, not those of its recording."""
        for kind in "library", "torch":
            for mode in modes("cuda", kind):
                with self.subTest(kind=kind, mode=mode), support.backend(self, "cuda", kind):
                    batch = Batch(SHAPES[6], TYPES[1], "cuda", 5)
                    y = batch.y.clone()
                    # room for any number of segments
                    metadata = [*batch.metadata[:6], torch.tensor([batch.slots + 1])]

                    def step():
                        mlora_kernels.lora_shrink_expand(batch.x, batch.a, batch.h, batch.b, y, *metadata, 0.5,
                                                         batch.offset, mode=mode)

                    side = torch.cuda.Stream()
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        step()
                    torch.cuda.current_stream().wait_stream(side)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        step()
                    for seed in range(3):
                        batch.mapping = support.random_mapping(
                            len(batch.x), batch.slots, torch.Generator().manual_seed(seed)).cuda()
                        for old, new in zip(metadata[:5], mlora_kernels.lora_metadata(batch.mapping, batch.slots)):
                            old.copy_(new)
                        y.copy_(batch.y)
                        graph.replay()
                        close(y, batch.expanded(batch.shrunk(1.0), True, 0.5))


if __name__ == "__main__":
    unittest.main()
