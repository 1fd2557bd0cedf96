"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): thin matrices train in place of the weights beside them.

Modules and parameters are named as in peft, whose equal the arithmetic is.
"""

import fnmatch
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from micota_fast.config.train import LoraConfig
from micota_fast.errors import InputError
from micota_fast.model.decoder import Decoder
from micota_fast.model.safetensors_io import set_parameter


class LoraLinear(nn.Module):
    """A linear module whose weight W is frozen, with an adapter: x -> x W^T + bias + alpha / rank * (x A^T) B^T.

    Args:
        base: the module that it replaces and whose parameters it takes over. Its type may be narrower than float32, in
            which the adapter always is.
        config: of all adapters.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device, dtype=torch.float32)

    @property
    def adapter_parameters(self) -> int:
        """Number of values that are trained."""
        return self.lora_A.weight.numel() + self.lora_B.weight.numel()

    def forward(self, x_TH: Tensor) -> Tensor:
        out_TO = F.linear(x_TH, self.weight, self.bias)
        if self.dropout and torch.is_grad_enabled():  # not when held-out rows are measured
            x_TH = F.dropout(x_TH, self.dropout)
        # One product adds to the other: a sum of its own would read and write [T, O] once more.
        return torch.addmm(out_TO, F.linear(x_TH, self.lora_A.weight), self.lora_B.weight.t(), alpha=self.scale)


def add_adapters(decoder: Decoder, config: LoraConfig) -> int:
    """Freeze `decoder` and give each module that `config.targets` name an adapter without initial weights.

    Args:
        decoder: on the meta device.

    Returns:
        The number of adapters.

    Raises:
        InputError: a target names no module, or the rank is no smaller than what it would stand for.
    """
    modules = {name: m for name, m in decoder.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    chosen: dict[str, nn.Linear] = {}
    for target in config.targets:
        named = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        if not named:
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            raise InputError(
                f"`lora.targets`: {target!r} names no module that can have an adapter; there are {kinds}, and each of "
                f"them alone, from {next(iter(modules))} to {next(reversed(modules))}"
            )
        chosen |= named
    decoder.requires_grad_(False)
    for name in (name for name in modules if name in chosen):
        module = chosen[name]
        if config.rank > min(module.in_features, module.out_features):
            raise InputError(
                f"`lora.rank` {config.rank} exceeds the smaller dimension of {name}, which is {module.out_features} x "
                f"{module.in_features}"
            )
        decoder.set_submodule(name, LoraLinear(module, config))
    return len(chosen)


def adapted_modules(decoder: Decoder) -> dict[str, LoraLinear]:
    """Return the modules that have an adapter by name, in the model's order."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, LoraLinear)}


def check_frozen_adapters(decoder: Decoder, patterns: list[str]) -> None:
    """Check that what the patterns of `freeze` match stays as it is, adapters considered.

    Raises:
        InputError: a pattern matches a weight and not its adapter, which changes it, or the half of an adapter without
            which the other has no gradient.
    """
    for name, module in adapted_modules(decoder).items():
        for pattern in patterns:
            if fnmatch.fnmatchcase(f"{name}.weight", pattern) and module.lora_B.weight.requires_grad:
                raise InputError(
                    f"`freeze`: {pattern!r} matches {name}.weight, which an adapter of `lora.targets` changes; freeze "
                    f"{name}.* or leave it out of the targets"
                )
        if module.lora_A.weight.requires_grad and not module.lora_B.weight.requires_grad:
            raise InputError(
                f"`freeze` leaves {name}.lora_A to train without its lora_B, which begins with zeros and stays so: the "
                f"adapter would do nothing; freeze both, or lora_A alone"
            )


def draw_adapters(decoder: Decoder, seed: int) -> None:
    """Draw initial adapters as peft does: A from Kaiming's uniform distribution (a = sqrt(5)), B zero; fixed by `seed`.

    Every dtype, device and way of sharding gets the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in adapted_modules(decoder).values():
        A, B = module.lora_A.weight, module.lora_B.weight
        bound = 1 / math.sqrt(A.shape[1])
        set_parameter(A, torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
        set_parameter(B, torch.zeros(B.shape))


def flops_per_token(decoder: Decoder, seqlen: float) -> float:
    """Count the FLOPs for one token, as `Decoder.flops_per_token`, without gradients of what is frozen.

    Gradients of inputs are counted for all blocks, though those below all that is trained have none.
    """
    embedding = decoder.model.embed_tokens.weight
    looked_up = None if decoder.config.tie_word_embeddings else embedding  # in no product
    frozen = sum(p.numel() for p in decoder.parameters() if not p.requires_grad and p is not looked_up)
    return decoder.flops_per_token(seqlen) - 2.0 * frozen
