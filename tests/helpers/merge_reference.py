"""The merge methods from their formulas in plain torch, a whole tensor at a time: what the engine must compute."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Bits = np.ndarray


def merged(
    method: str,
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float] | None = None,
    *,
    normalize: bool = False,
    rescale: str = "none",
    lambda_: float = 1.0,
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """One tensor, float32. `weights`: of `tensors`; for slerp, t. `masks`: DARE's, True where an element stays."""
    if method == "linear":
        total = _fused(tensors, _f32(weights))
        return total / sum(_f32(weights)) if normalize else total
    if method == "slerp":
        return _slerp(base, tensors[0], weights[0])
    deltas = []
    for i, tensor in enumerate(tensors):
        delta = tensor - base
        density = 1.0 if densities is None else densities[i]
        if density < 1 and method != "task_arithmetic":
            mask = _largest(delta, density) if method == "ties" else masks[i]  # type: ignore[index]
            delta = _rescaled(delta, mask, density, rescale)
        deltas.append(delta * _f32([weights[i]])[0])
    total = sum(deltas, torch.zeros_like(base))
    if method in ("ties", "dare_ties"):
        sign = torch.where(total >= 0, 1.0, -1.0)
        agree = [delta.sign() == sign for delta in deltas]
        total = sum((delta * a for delta, a in zip(deltas, agree, strict=True)), torch.zeros_like(base))
        divisor = sum((w * a for w, a in zip(_f32(weights), agree, strict=True)), torch.zeros_like(base))
        divisor[divisor == 0] = 1
    else:
        divisor = sum(_f32(weights))
        divisor = torch.ones(()) if abs(divisor) < 1e-8 else divisor
    if normalize:
        total = total / divisor
    return base + total * _f32([lambda_])[0]


def mask(key: tuple[int, int], n: int, density: float) -> Tensor:
    """Which of n elements DARE keeps."""
    words = np.concatenate(philox(np.arange(-(-n // 4), dtype=np.uint64), key)[..., None], axis=1).reshape(-1)[:n]
    return torch.from_numpy(words < min(round(density * 2**32), 2**32 - 1))


def philox(counters: Bits, key: tuple[int, int], high: tuple[int, int] = (0, 0)) -> Bits:
    """Philox 4x32-10, [4, counters] uint32: Salmon et al. 2011, figure 2. `high`: the counter's upper two words."""
    low32 = np.uint64(0xFFFFFFFF)
    c = [counters & low32, counters >> np.uint64(32), *(np.full_like(counters, word) for word in high)]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(right >> np.uint64(32)) ^ c[1] ^ k[0], right & low32, (left >> np.uint64(32)) ^ c[3] ^ k[1], left & low32]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low32, (k[1] + np.uint64(0xBB67AE85)) & low32]
    return np.stack(c).astype(np.uint32)


def _f32(values: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float32) for value in values]


def _largest(delta: Tensor, density: float) -> Tensor:
    count = max(1, int(density * delta.numel())) if density > 0 else 0
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(delta.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view_as(delta)


def _rescaled(delta: Tensor, chosen: Tensor, density: float, rescale: str) -> Tensor:
    kept = delta * chosen
    if rescale == "density" and density > 0:
        return kept * _f32([1 / density])[0]
    if rescale == "l1":
        before, after = float(delta.double().abs().sum()), float(kept.double().abs().sum())
        if before >= 1e-7 and after >= 1e-7:
            return kept * _f32([before / after])[0]
    return kept


def _slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.double().flatten(), b.double().flatten()
    norms = [float(v.norm()) if v.norm() > 1e-8 else 1.0 for v in (x, y)]
    cosine = min(1.0, max(-1.0, float(x @ y) / norms[0] / norms[1]))
    if abs(cosine) > 0.9995:
        pair = (1 - t, t)
    else:
        angle = math.acos(cosine)
        pair = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    return _fused([a, b], _f32(pair))


def _fused(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Weighted sum, each product added before it is rounded."""
    total = torch.zeros_like(tensors[0])
    for weight, tensor in zip(weights, tensors, strict=True):
        total = (total.double() + weight.double() * tensor.double()).float()
    return total
