"""AdamW, its learning rate at each step, and the clipping of gradients."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from micota_fast.recipe import TrainSettings


def make_optimizer(model: nn.Module, config: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; matrices decay, vectors (norms and biases) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, total: int, config: TrainSettings) -> float:
    """Learning rate of step 0 <= step < total.

    Rises linearly over the first ceil(warmup_ratio * total) steps, of which the last has the peak, then falls along a
    half cosine (Loshchilov & Hutter 2017), which starts from the peak and would reach min_lr_ratio * lr at `total`.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to an L2 norm of at most `max_norm`; returns the norm before that, a 0-d tensor.

    Nothing waits for the device. With sharded gradients the norm is that over all ranks.
    """
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm
