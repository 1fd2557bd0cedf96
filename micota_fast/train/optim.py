"""AdamW: which parameters it trains, its learning rate, and steps that never wait and that survive a bad gradient."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from micota_fast.config.train import TrainSettings
from micota_fast.train.low_bit_adamw import LowBitAdamW

AdamW = torch.optim.AdamW | LowBitAdamW


def make_optimizer(model: nn.Module, config: TrainSettings) -> AdamW:
    """Make AdamW (Loshchilov & Hutter 2019), fused or of few bits; matrices decay, norms and biases do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer_states != "float32":
        return LowBitAdamW(groups, config, compiled=config.compile or params[0].device.type == "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, total: int, config: TrainSettings) -> float:
    """Return the learning rate of step 0 <= step < total.

    Rises linearly over the first ceil(warmup_ratio * total) steps, of which the last has the peak, then falls along a
    half cosine (Loshchilov & Hutter 2017), which starts from the peak and would reach min_lr_ratio * lr at `total`.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to an L2 norm of at most `max_norm`; return the norm before that, a 0-d tensor.

    Never waits for the device. If gradients are sharded, the norm is that over all ranks.
    """
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def step_if_finite(optimizer: AdamW, loss: Tensor, grad_norm: Tensor) -> None:
    """Make one step of the optimizer; leave weights and moments as they were if loss or norm is not finite.

    The fused kernel itself reads on the device whether to do anything, from the attribute that `torch.amp.GradScaler`
    sets for it, so the host never waits; with offload, when the step is the host's, it waits for the loss. torchao's
    step reads no such thing, so the host waits and decides. Both figures must be equal on all ranks.
    """
    if isinstance(optimizer, LowBitAdamW):
        if (loss.to(grad_norm.device) + grad_norm).isfinite().item():
            optimizer.step()
        return
    optimizer.found_inf = 1.0 - (loss.to(grad_norm.device) + grad_norm).isfinite().float()  # type: ignore[attr-defined]
    optimizer.step()
