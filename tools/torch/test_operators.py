"""What PyTorch does with the operators: checks their declarations, compiles them, records them."""
import unittest

import torch

import support
import test_lora
import test_metadata
import test_paged
from support import mlora_kernels  # noqa: F401, it defines them


def lora(device):
    return test_lora.Batch(test_lora.SHAPES[4], (torch.bfloat16, torch.bfloat16), device, 5)


def shrink(device):
    batch = lora(device)
    return batch.x, batch.a, batch.h, *batch.metadata, 0.5, "auto"


def expand(device):
    batch = lora(device)
    h = torch.randn(batch.h.shape, generator=torch.Generator().manual_seed(1)).to(device)
    return h, batch.b, batch.y, *batch.metadata, batch.offset, True, "auto"


def shrink_expand(device):
    batch = lora(device)
    return batch.x, batch.a, batch.h, batch.b, batch.y, *batch.metadata, 0.5, batch.offset, "auto"


def metadata(device):
    lens, kv_lens = (t.to(torch.int32).to(device) for t in test_metadata.random_lengths(40, 1))
    total, start, *out = (torch.full((n,), -7, dtype=torch.int32, device=device) for n in (1, 41, 300, 300))
    return lens, kv_lens, 2048, total, start, *out, "adaptive"


def paged(device):
    return test_paged.Batch(test_paged.SHAPES[2], torch.bfloat16, device, 3)


def kv_write(device):
    batch = paged(device)
    return *batch.arguments(), torch.full((batch.d // 2,), 0.1, device=device), 1.0


def attention(device):
    batch = paged(device)
    return *batch.arguments(), batch.d**-0.5, 33, 80, 0


# Each with arguments that are the same whenever they are made, those that it changes included.
CASES = {"lora_shrink": shrink, "lora_expand": expand, "lora_shrink_expand": shrink_expand,
         "extend_metadata": metadata, "kv_write": kv_write, "paged_attention": attention}


def tensors(values):
    """Those in it, in order, down through lists."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for value in values for t in tensors(value)] if isinstance(values, (list, tuple)) else []


class Operators(support.Case):
    def each_case(self):
        for device, kind in self.each_backend():
            for name, make in CASES.items():
                with self.subTest(operator=name):
                    yield device, getattr(torch.ops.mlora, name), make

    def expected(self, device, operator, make):
        """What it returns and what its arguments are then."""
        arguments = make(device)
        return tensors(operator(*arguments)), tensors(arguments)

    def test_all_are_here(self):
        defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mlora::")}
        self.assertEqual(defined, set(CASES))

    def test_declared_right(self):
        """Schema, autograd, shapes without data, traces with sizes left open."""
        for device, operator, make in self.each_case():
            results = torch.library.opcheck(operator.default, make(device))
            self.assertEqual(set(results.values()), {"SUCCESS"})

    def test_compiled(self):
        for device, operator, make in self.each_case():
            torch._dynamo.reset()
            want, after = self.expected(device, operator, make)
            compiled = torch.compile(lambda *arguments: operator(*arguments), fullgraph=True,
                                     backend="inductor" if device == "cuda" else "aot_eager")
            arguments = make(device)
            self.assertEqual([t.tolist() for t in tensors(compiled(*arguments))], [t.tolist() for t in want])
            self.assertEqual([t.tolist() for t in tensors(arguments)], [t.tolist() for t in after])

    def test_inference_mode(self):
        for device, operator, make in self.each_case():
            _, after = self.expected(device, operator, make)
            with torch.inference_mode():
                arguments = make(device)
                operator(*arguments)
            self.assertEqual([t.tolist() for t in tensors(arguments)], [t.tolist() for t in after])

    @unittest.skipUnless(torch.cuda.is_available(), "CUDA graphs are of a GPU")
    def test_recorded(self):
        for device, operator, make in self.each_case():
            if device == "cpu":
                continue
            want, after = self.expected(device, operator, make)
            arguments = make(device)
            operator(*arguments)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = tensors(operator(*arguments))
            for _ in range(2):
                for old, new in zip(tensors(arguments), tensors(make(device))):
                    old.copy_(new)
                for t in result:
                    t.zero_()
                graph.replay()
                self.assertEqual([t.tolist() for t in result], [t.tolist() for t in want])
                self.assertEqual([t.tolist() for t in tensors(arguments)], [t.tolist() for t in after])


if __name__ == "__main__":
    unittest.main()
