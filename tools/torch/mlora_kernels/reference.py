"""The same results in plain PyTorch, in f32, on any device: what runs where the library or a GPU is
missing, and what the tests compare with. Shapes are static but where said, so CUDA graphs take it."""
import torch

COPIED = 2**24  # elements of the keys that attention has side by side


def stacked(weight):
    """[S, 1, R, K] or [S, R, K] as the latter."""
    return weight.squeeze(1) if weight.dim() == 4 else weight


def lora_shrink(inputs, weights, output, mapping, scaling):
    """output[i, t, :] = scaling * A[mapping[t]] x[t, :] of slice i; zeros without an adapter."""
    x = inputs.float()
    for i, weight in enumerate(weights):
        weight = stacked(weight)
        total = torch.zeros(output.shape[1:], dtype=torch.float32, device=output.device)
        for slot in range(weight.shape[0]):
            own = (mapping == slot).unsqueeze(1)
            total = torch.where(own, x @ weight[slot].float().t(), total)
        output[i].copy_(total * scaling)


def lora_expand(inputs, weights, output, mapping, offset, add_inputs, scaling=1.0):
    """output[t, columns of slice i] (+)= scaling * B[mapping[t]] inputs[i, t, :]."""
    for i, weight in enumerate(weights):
        weight = stacked(weight)
        columns = output[:, offset:offset + weight.shape[1]]
        offset += weight.shape[1]
        h = inputs[i].float()
        old = columns.float()
        new = old
        for slot in range(weight.shape[0]):
            own = (mapping == slot).unsqueeze(1)
            delta = scaling * (h @ weight[slot].float().t())
            new = torch.where(own, old + delta if add_inputs else delta, new)
        columns.copy_(new)


def extend_metadata(extend_len, kv_len, topk, total, request_start, token_kv_len, clamped_kv_len):
    """The formulas of kernels/mlora_kernels.h; entries past the total are left as they are."""
    extend_len, kv_len = extend_len.long(), kv_len.long()
    ends = torch.cumsum(extend_len, 0)
    request_start[:1].zero_()
    request_start[1:].copy_(ends)
    total.copy_(request_start[-1:])
    t = torch.arange(token_kv_len.shape[0], device=token_kv_len.device)
    if extend_len.numel() == 0:
        return
    b = torch.searchsorted(ends, t, right=True).clamp(max=extend_len.numel() - 1)
    value = kv_len[b] - ends[b] + 1 + t
    own = t < ends[-1]
    token_kv_len.copy_(torch.where(own, value, token_kv_len.long()))
    clamped_kv_len.copy_(torch.where(own, value.clamp(max=topk), clamped_kv_len.long()))


def _heads(qkv, H, G):
    return qkv.view(qkv.shape[0], H + 2 * G, -1)


def kv_write(qkv, k, v, block_table, position, row, H, G, frequency, amplitude):
    heads = _heads(qkv, H, G)
    position = position.long()
    if frequency is not None:
        half = heads.shape[2] // 2
        angle = position.unsqueeze(1).float() * frequency.unsqueeze(0)
        c, s = (angle.cos() * amplitude).unsqueeze(1), (angle.sin() * amplitude).unsqueeze(1)
        turned = heads[:, :H + G].float()
        a, b = turned[..., :half], turned[..., half:]
        heads[:, :H + G].copy_(torch.cat((a * c - b * s, b * c + a * s), 2))
    block_size = k.shape[2]
    block = block_table[row.long(), position // block_size].long()
    at = position % block_size
    k[block, :, at] = heads[:, H:H + G].to(k.dtype)
    v[block, :, at] = heads[:, H + G:].to(v.dtype)


def attention(y, qkv, k, v, block_table, position, row, H, G, scale, window, max_kv):
    """Some tokens at a time, each with a copy of its sequence."""
    heads = _heads(qkv, H, G)
    block_size, width = k.shape[2:]
    if y.device.type == "cpu":  # nothing is recorded there: no need to look at all that there is room for
        max_kv = int(position.max()) + 1
    P = min(max_kv, block_table.shape[1] * block_size)
    p = torch.arange(P, device=y.device)
    out = y.view(y.shape[0], H, -1)
    step = max(1, COPIED // (P * G * width))
    for t in range(0, y.shape[0], step):
        at = position[t:t + step].long().unsqueeze(1)
        seen = p <= at
        if window > 0:
            seen = seen & (p > at - window)
        block = block_table[row[t:t + step].long()].long()[:, p // block_size]
        block = torch.where(seen, block, 0)  # what the table holds past a sequence's end is no block
        seen = seen.view(-1, 1, 1, P)
        keys, values = (cache[block, :, p % block_size].float() for cache in (k, v))  # [t, P, G, d]
        values = torch.where(seen.view(-1, P, 1, 1), values, 0)
        query = heads[t:t + step, :H].float().view(-1, G, H // G, width)
        score = torch.einsum("tghd,tpgd->tghp", query, keys) * scale
        weight = torch.softmax(score.masked_fill(~seen, float("-inf")), 3)
        out[t:t + step].copy_(torch.einsum("tghp,tpgd->tghd", weight, values).reshape(-1, H, width))
