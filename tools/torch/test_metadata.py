"""The metadata of draft and extend steps against lists."""
import os
import re
import unittest
from unittest import mock

import torch

import support
from support import mlora_kernels
from mlora_kernels import abi


def expected(lens, kv_lens, topk):
    expanded = [kv - n + 1 + j for n, kv in zip(lens, kv_lens) for j in range(n)]
    return expanded, [min(value, topk) for value in expanded]


def random_lengths(bs, seed, most=6):
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(0, most, (bs,), generator=g)
    return lens, lens + torch.randint(0, 5000, (bs,), generator=g)


class Metadata(support.Case):
    def test_all_sizes(self):
        for device, _ in self.each_backend():
            for bs in 0, 1, 2, 16, 17, 128, 300, 1024, 1500, 5000:
                for dtype in torch.int32, torch.int64:
                    for search in "adaptive", "linear", "binary", "by_request":
                        with self.subTest(bs=bs, dtype=dtype, search=search):
                            lens, kv_lens = random_lengths(bs, bs)
                            want = expected(lens.tolist(), kv_lens.tolist(), 2048)
                            total = len(want[0])
                            out = [torch.full((total + 5,), -7, dtype=torch.int32, device=device) for _ in "ab"]
                            got = mlora_kernels.extend_metadata(
                                lens.to(dtype).to(device), kv_lens.to(dtype).to(device), 2048, *out, search=search)
                            self.assertEqual(got.tolist(), [total])
                            for tensor, values in zip(out, want):
                                self.assertEqual(tensor.tolist(), values + [-7] * 5)

    def test_total(self):
        for device, _ in self.each_backend():
            lens = torch.tensor([2, 0, 3], dtype=torch.int32, device=device)
            kv_lens = torch.tensor([5, 9, 2], dtype=torch.int32, device=device)
            out = [torch.zeros(5, dtype=torch.int32, device=device) for _ in "ab"]
            for flags in {}, {"use_adaptive": False}, {"use_adaptive": False, "use_optimized": False}:
                total = mlora_kernels.fill_draft_extend_metadata(lens, kv_lens, 4, *out, **flags)
                self.assertEqual(total, 5)
                self.assertEqual(out[0].tolist(), [4, 5, 0, 1, 2])
                self.assertEqual(out[1].tolist(), [4, 4, 0, 1, 2])
            short = [torch.zeros(4, dtype=torch.int32, device=device) for _ in "ab"]
            with self.assertRaisesRegex(ValueError, "5 tokens, the outputs have room for 4"):
                mlora_kernels.fill_draft_extend_metadata(lens, kv_lens, 4, *short)

    @unittest.skipUnless(torch.cuda.is_available(), "CUDA graphs are of a GPU")
    def test_recorded(self):
        for kind in "library", "torch":
            with self.subTest(kind=kind), support.backend(self, "cuda", kind):
                lens, kv_lens = (t.to(torch.int32).cuda() for t in random_lengths(64, 0))
                out = [torch.zeros(400, dtype=torch.int32, device="cuda") for _ in "ab"]
                mlora_kernels.extend_metadata(lens, kv_lens, 2048, *out)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    total = mlora_kernels.extend_metadata(lens, kv_lens, 2048, *out)
                for seed in range(1, 4):
                    new = random_lengths(64, seed)
                    lens.copy_(new[0]), kv_lens.copy_(new[1])
                    graph.replay()
                    want = expected(new[0].tolist(), new[1].tolist(), 2048)
                    n = int(total)
                    self.assertEqual(n, len(want[0]))
                    self.assertEqual([o[:n].tolist() for o in out], list(want))

    def test_what_does_not_fit_is_refused(self):
        for device, _ in self.each_backend():
            lens, out = torch.ones(3, dtype=torch.int32, device=device), torch.zeros(5, dtype=torch.int32, device=device)
            for text, arguments, more in (
                    ("seq_lens is [2], must be [3]", (lens, lens[:2], 4, out, out.clone()), {}),
                    ("request_start is [3], must be [4]", (lens, lens, 4, out, out.clone()), {"request_start": lens}),
                    ("total is [3], must be [1]", (lens, lens, 4, out, out.clone()), {"total": lens}),
                    ("seq_lens is on cpu, must be on cuda:0", (lens, lens.cpu(), 4, out, out.clone()), {}),
                    ("search is 'fast', must be one of adaptive, linear, binary, by_request",
                     (lens, lens, 4, out, out.clone()), {"search": "fast"})):
                if device == "cpu" and "cuda" in text:
                    continue
                with self.assertRaisesRegex(ValueError, re.escape("extend_metadata: " + text)):
                    mlora_kernels.extend_metadata(*arguments, **more)

    def test_what_it_says_of_itself(self):
        keys = set(mlora_kernels.kernel_info("cpu"))
        for device, kind in self.each_backend():
            info = mlora_kernels.kernel_info(device)
            self.assertEqual(set(info), keys)
            self.assertEqual(info["backend"], device if kind == "library" else "torch")
            self.assertEqual(info["adaptive"], kind == "library")
            if kind == "torch":
                self.assertEqual(info["why"], "left out by the test")
                continue
            self.assertIsNone(info["why"])
            self.assertEqual((info["linear_binary_threshold"], info["kv_block_size"]), (16, 16))
            self.assertEqual(info["extend_block_size"] % 32, 0)
            self.assertEqual((info["max_rank"], info["modes"][0]), (512, "auto"))
            self.assertTrue(device == "cpu" or any(a.startswith("sm_") for a in info["architectures"]))
        self.assertEqual(mlora_kernels.kernel_info("meta")["why"], "there are no kernels for devices of type meta")
        if not torch.cuda.is_available():
            self.assertEqual(mlora_kernels.kernel_info("cuda")["why"], "PyTorch sees no CUDA GPU")

    def test_a_library_that_is_not_one(self):
        for path, text in (("/no/such.so", "/no/such.so: cannot open shared object file: No such file or directory"),
                           (__file__, __file__ + ": "), ("libc.so.6", "undefined symbol: mlora_kernels_error")):
            with mock.patch.dict(os.environ, {"MLORA_KERNELS_LIBRARY": path}):
                library = abi.Library()
            self.assertIsNone(library.path)
            self.assertIn(text, library.missing)
            self.assertIsNone(library.handle(abi.CPU, 0))
            self.assertEqual(library.refusal(abi.CPU, 0), library.missing)
        with mock.patch.object(abi, "VERSION", 2):
            self.assertRegex(abi.Library().missing, r"\.so: version 1, this module is for 2")


if __name__ == "__main__":
    unittest.main()
