"""Rotary position embedding (RoFormer, arXiv 2104.09864) with linear, llama3 and yarn scaling."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from micota_fast.model.rope_config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Compute the rotation per position of each pair of channels.

    Returns `inv_freq[head_dim/2]` (fp32, CPU, radians per token) and the factor on cos and sin (1.0 but for yarn).
    """
    # The device is named so that a model built under `torch.device("meta")` still gets real frequencies.
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / rope.rope_theta ** (channel / head_dim)
    if rope.rope_type == "linear":  # position interpolation, arXiv 2306.15595
        return inv_freq / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, inv_freq, head_dim), _yarn_attention_factor(rope)
    return inv_freq, 1.0


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1's scaling: slow channels are slowed by `factor`, fast ones kept, those between blended linearly.

    Slow and fast are judged by the turns a channel makes over the original context.
    """
    turns = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return inv_freq * (keep + (1.0 - keep) / rope.factor)


def _yarn(rope: RopeConfig, inv_freq: Tensor, head_dim: int) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2), the ramp being linear in the channel's index."""

    def channel_of(turns: float) -> float:
        """Index of the pair that makes `turns` turns over the original context."""
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    low, high = channel_of(rope.beta_fast), channel_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    interpolate = ((index - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq * (1.0 - interpolate) + inv_freq / rope.factor * interpolate


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature (section 3.3: sqrt(1/t) = 0.1 ln(s) + 1), or DeepSeek's form of it with two `mscale`s."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


class RotaryEmbedding(nn.Module):
    """cos and sin of the rotation of each position. Has no parameters, and nothing of it is saved."""

    inv_freq: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self._frequencies, self.attention_factor = rope_frequencies(rope, head_dim)
        self.register_buffer("inv_freq", self._frequencies, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model to a device, never to a dtype (bf16 angles are useless); survive `to_empty`."""
        super()._apply(fn, recurse)
        self.inv_freq = self._frequencies.to(self.inv_freq.device)
        return self

    def forward(self, position_ids_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cos and sin `[T, 1, head_dim/2]` in `dtype`; angles and functions in fp32 as in transformers."""
        angle_TR = position_ids_T.float()[:, None] * self.inv_freq
        cos_TR, sin_TR = angle_TR.cos() * self.attention_factor, angle_TR.sin() * self.attention_factor
        return cos_TR.to(dtype)[:, None], sin_TR.to(dtype)[:, None]


def rotate(x_TNd: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Rotate channel i together with channel i + d/2, as Hugging Face checkpoints have them. Shape in = shape out."""
    x1, x2 = x_TNd.chunk(2, dim=-1)
    return torch.cat((x1 * cos_T1R - x2 * sin_T1R, x2 * cos_T1R + x1 * sin_T1R), dim=-1)
