"""Cache writes and attention over a paged cache against PyTorch's own attention on the sequences."""
import re
import unittest

import torch

import support
from support import mlora_kernels

# lengths of the rows and of their sequences, H, G, d
SHAPES = [
    ([1], [1], 1, 1, 32), ([1, 1, 1], [1, 17, 300], 8, 2, 64), ([5, 1, 33], [5, 40, 70], 4, 4, 128),
    ([64], [64], 8, 1, 80), ([1] * 20, list(range(500, 2500, 100)), 32, 8, 128), ([3, 2], [30, 20], 6, 3, 20),
]


class Batch:
    def __init__(self, shape, dtype, device, seed):
        n_new, lens, self.H, self.G, self.d = shape
        g = torch.Generator().manual_seed(seed)
        T, Q = sum(n_new), len(n_new)
        blocks = [-(-n // 16) for n in lens]
        ids = torch.randperm(sum(blocks) + 3, generator=g).tolist()
        table = torch.zeros(Q, max(blocks), dtype=torch.int32)
        for q, n in enumerate(blocks):
            table[q, :n] = torch.tensor([ids.pop() for _ in range(n)])
        self.qkv = torch.randn(T, (self.H + 2 * self.G) * self.d, generator=g).to(dtype).to(device)
        shape = sum(blocks) + 3, self.G, 16, self.d
        self.k, self.v = (torch.randn(shape, generator=g).to(dtype).to(device) for _ in "kv")
        start = torch.tensor([0] + n_new).cumsum(0)
        position = torch.cat([torch.arange(n - m, n) for m, n in zip(n_new, lens)])
        row = torch.cat([torch.full((m,), q) for q, m in enumerate(n_new)])
        self.n_new, self.lens = n_new, lens
        self.paged = [t.to(torch.int32).to(device) for t in (table, start, torch.tensor(lens), position, row)]

    def arguments(self):
        return self.qkv, self.k, self.v, *self.paged, self.H, self.G

    def sequence(self, cache, q):
        """[n, G, d] of row q, from the cache."""
        blocks = cache[self.paged[0][q].long()]  # [blocks, G, 16, d]
        return blocks.transpose(1, 2).flatten(0, 1)[:self.lens[q]]

    def attention(self, scale, window):
        out, first = [], 0
        for q, n in enumerate(self.n_new):
            heads = self.qkv[first:first + n].view(n, self.H + 2 * self.G, self.d)[:, :self.H]
            k, v = (self.sequence(c, q).float().repeat_interleave(self.H // self.G, 1) for c in (self.k, self.v))
            at = torch.arange(self.lens[q], device=k.device)
            new = at[-n:].unsqueeze(1)
            mask = (at <= new) & ((window == 0) | (at > new - window))
            out.append(torch.nn.functional.scaled_dot_product_attention(
                heads.float().transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask,
                scale=scale).transpose(0, 1).flatten(1))
            first += n
        return torch.cat(out)


class Paged(support.Case):
    def test_attention(self):
        for device, kind in self.each_backend():
            for seed, shape in enumerate(SHAPES):
                for dtype in torch.float32, torch.bfloat16:
                    for window in 0, 20:
                        with self.subTest(shape=shape, dtype=dtype, window=window):
                            batch = Batch(shape, dtype, device, seed)
                            got = mlora_kernels.paged_attention(*batch.arguments(), batch.d**-0.5, window=window)
                            # bf16: 8 bits of the result, and of the weights of the positions
                            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
                            torch.testing.assert_close(got.float(), batch.attention(batch.d**-0.5, window),
                                                       rtol=tolerance, atol=tolerance)

    def test_kv_write(self):
        for device, _ in self.each_backend():
            for seed, shape in enumerate(SHAPES):
                for dtype in torch.float32, torch.bfloat16:
                    with self.subTest(shape=shape, dtype=dtype):
                        batch = Batch(shape, dtype, device, seed)
                        qkv, k, v = batch.qkv.clone(), batch.k.clone(), batch.v.clone()
                        mlora_kernels.kv_write(*batch.arguments())
                        self.assertTrue(torch.equal(qkv, batch.qkv))
                        heads = qkv.view(len(qkv), batch.H + 2 * batch.G, batch.d)
                        table, _, _, position, row = batch.paged
                        for t in range(len(qkv)):
                            p = int(position[t])
                            block = int(table[int(row[t]), p // 16])
                            k[block, :, p % 16] = heads[t, batch.H:batch.H + batch.G]
                            v[block, :, p % 16] = heads[t, batch.H + batch.G:]
                        self.assertTrue(torch.equal(batch.k, k) and torch.equal(batch.v, v))

    def test_rotary(self):
        for device, _ in self.each_backend():
            batch = Batch(SHAPES[2], torch.float32, device, 3)
            frequency = (10000.0 ** (-torch.arange(0, batch.d, 2) / batch.d)).to(device)
            heads = batch.qkv.view(len(batch.qkv), -1, batch.d).double().clone()
            turn = torch.polar(torch.ones(1, dtype=torch.float64, device=device),
                               batch.paged[3].double().unsqueeze(1) * frequency.double()).unsqueeze(1)
            n = batch.H + batch.G
            pairs = torch.complex(heads[:, :n, :batch.d // 2], heads[:, :n, batch.d // 2:]) * turn
            heads[:, :n] = torch.cat((pairs.real, pairs.imag), 2)
            mlora_kernels.kv_write(*batch.arguments(), frequency)
            torch.testing.assert_close(batch.qkv.view_as(heads).double(), heads, rtol=1e-4, atol=1e-4)

    def test_refused(self):
        """What the library refuses it says in its words."""
        with support.backend(self, "cpu", "library"):
            batch = Batch(SHAPES[1], torch.float32, "cpu", 3)
            with self.assertRaisesRegex(mlora_kernels.Failure, "attention_workspace: max_row is 9, must be 1 to 3"):
                mlora_kernels.paged_attention(*batch.arguments(), 1.0, max_row=9)

    def test_what_does_not_fit_is_refused(self):
        """Before anything past the end of a tensor is read or written."""
        for device, _ in self.each_backend():
            batch = Batch(SHAPES[1], torch.float32, device, 3)  # 3 rows of one token, 8 heads, 2 for keys, 64 wide
            good = batch.arguments()
            for at, wrong, text in (
                    (0, good[0][:, 1:], "qkv is [3, 767], must be [3, 768]"),
                    (1, good[1][:, :1], "k_cache is [25, 1, 16, 64], must be [any, 2, any, any]"),
                    (2, good[2][:4], "v_cache is [4, 2, 16, 64], must be [25, 2, 16, 64]"),
                    (3, good[3][:2], "block_table is [2, 19], must be [3, any]"),
                    (4, good[4][:3], "row_start is [3], must be [4]"),
                    (6, good[6][:2], "position is [2], must be [3]"),
                    (7, good[7].cpu(), "row is on cpu, must be on cuda:0")):
                if device == "cpu" and "cuda" in text:
                    continue
                arguments = [*good[:at], wrong, *good[at + 1:]]
                with self.subTest(text=text):
                    with self.assertRaisesRegex(ValueError, re.escape("paged_attention: " + text)):
                        mlora_kernels.paged_attention(*arguments, 1.0)
                    with self.assertRaisesRegex(ValueError, re.escape("kv_write: " + text)):
                        mlora_kernels.kv_write(*arguments)
            with self.assertRaisesRegex(ValueError, r"kv_write: frequency is \[64\], must be \[32\]"):
                mlora_kernels.kv_write(*good, torch.ones(64, device=device))


if __name__ == "__main__":
    unittest.main()
