"""The arithmetic of merging, on one tensor of each model (float32 arrays of one shape).

Sources: task arithmetic: Ilharco et al. 2023 (arXiv 2212.04089); TIES: Yadav et al. 2023 (arXiv 2306.01708); DARE:
Yu et al. 2024 (arXiv 2311.03099). Where implementations differ, the order of operations is mergekit 0.1.5's:
sparsify -> rescale -> weight -> sign consensus -> sum -> normalize -> lambda -> add to the base.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from micota_fast.merge.mergekit import MergePlan

Array = NDArray[np.float32]
KeepMask = Callable[[int, int, float], NDArray[np.bool_]]
"""(index of the input, number of elements, density) -> which elements stay."""

_L1_FLOOR = 1e-7  # mergekit leaves a task vector alone whose sum of magnitudes is below this, before or after masking


def merge_tensors(plan: MergePlan, base: Array, tensors: Sequence[Array], keep: KeepMask) -> Array:
    """Merge one tensor by the plan's method.

    Args:
        base: the base model's tensor (not read by linear).
        tensors: one of each of `plan.inputs`, in that order and of one shape.
        keep: DARE's mask; called only where a density below 1 asks for it.
    """
    weights = [np.float32(entry.weight) for entry in plan.inputs]
    if plan.method == "linear":
        merged = _weighted_sum(tensors, weights)
        if plan.normalize:
            merged /= _sum(weights)
        return merged
    deltas: list[Array] = []
    for index, (entry, tensor) in enumerate(zip(plan.inputs, tensors, strict=True)):
        delta = tensor - base
        if entry.density < 1 and plan.method != "task_arithmetic":
            if plan.method == "ties":
                mask = largest(delta, entry.density)
            else:
                mask = keep(index, delta.size, entry.density).reshape(delta.shape)
            delta = _drop(delta, mask, plan, entry.density)
        deltas.append(delta * weights[index])
    if plan.method in ("ties", "dare_ties"):
        mixed, kept_weight = _with_sign_consensus(deltas, weights)
        if plan.normalize:
            mixed /= np.where(kept_weight == 0, np.float32(1), kept_weight)
    else:
        mixed = _weighted_sum(deltas, [np.float32(1)] * len(deltas))
        if plan.normalize and abs(_sum(weights)) >= 1e-8:
            mixed /= _sum(weights)
    mixed *= np.float32(plan.lambda_)
    mixed += base
    return mixed


def largest(delta: Array, density: float) -> NDArray[np.bool_]:
    """TIES' trim: the int(density n) elements of largest magnitude; of equal ones the first in memory order."""
    count = int(density * delta.size)
    magnitude = np.abs(delta).ravel()
    if count == 0:
        return np.zeros(delta.shape, dtype=bool)
    threshold = np.partition(magnitude, delta.size - count)[delta.size - count]
    mask = magnitude > threshold
    level = np.flatnonzero(magnitude == threshold)
    mask[level[: count - int(mask.sum())]] = True
    return mask.reshape(delta.shape)


def counter_mask(seed: int, tensor_name: str) -> KeepMask:
    """DARE's random mask as a function of (seed, tensor name, input, element index) and of nothing else.

    Element i is kept where the i-th 32-bit word of a Philox stream (Salmon et al. 2011, a counter-based generator) is
    below density * 2^32. The stream's key is a SHA-256 digest of seed, name and the input's place in the file, so the
    mask does not depend on the order of tensors, on threads, or on how the checkpoints are sharded; two inputs of one
    merge have independent masks.
    """

    def keep(index: int, size: int, density: float) -> NDArray[np.bool_]:
        digest = hashlib.sha256(f"{seed}\0{tensor_name}\0{index}".encode()).digest()
        generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
        words = generator.random_raw((size + 1) // 2).astype("<u8", copy=False).view("<u4")[:size]
        mask: NDArray[np.bool_] = words < round(density * 2**32)
        return mask

    return keep


def _drop(delta: Array, mask: NDArray[np.bool_], plan: MergePlan, density: float) -> Array:
    """Zero what the mask drops and scale up the rest as `plan.rescale` says."""
    kept: Array = np.where(mask, delta, np.float32(0))
    if plan.rescale == "density" and density > 0:
        kept /= np.float32(density)
    if plan.rescale == "l1":
        # Summed in float64: a float32 sum over 10^8 elements would depend on how it is split up.
        before = float(np.abs(delta).sum(dtype=np.float64))
        after = float(np.abs(kept).sum(dtype=np.float64))
        if before >= _L1_FLOOR and after >= _L1_FLOOR:
            kept *= np.float32(before / after)
    return kept


def _sum(weights: Sequence[np.float32]) -> np.float32:
    return np.float32(sum(float(weight) for weight in weights))


def _weighted_sum(tensors: Sequence[Array], weights: Sequence[np.float32]) -> Array:
    total: Array = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def _with_sign_consensus(deltas: Sequence[Array], weights: Sequence[np.float32]) -> tuple[Array, Array]:
    """(sum of the weighted deltas that have the sign of their sum, sum of those inputs' weights), per element.

    The elected sign is + where the sum is 0 or more; a dropped element has no sign and never counts.
    """
    elected = np.where(_weighted_sum(deltas, [np.float32(1)] * len(deltas)) >= 0, np.float32(1), np.float32(-1))
    mixed, kept_weight = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = np.sign(delta) == elected
        mixed += np.where(agrees, delta, np.float32(0))
        kept_weight += np.where(agrees, weight, np.float32(0))
    return mixed, kept_weight
