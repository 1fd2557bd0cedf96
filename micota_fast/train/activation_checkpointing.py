"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again there."""

from collections.abc import Container
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from micota_fast.train.lora import LoraLinear

# Attention is always kept: its cost grows with the square of a document's length, its result with the length.
ATTENTION = (
    "aten::_scaled_dot_product",
    "flash_attn",
    "torch_attn::",
    "micota::cpu_attention",
    "micota::flash_attention_4",
)
PRODUCTS = ("aten::mm", "aten::addmm")
# Of a block's products. Gate, as large as up, is computed again. Down is the block's last operation, whose result its
# backward pass never needs.
KEPT_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")


def checkpoint_activations(block: nn.Module, mode: Literal["selective", "full"]) -> None:
    """Wrap the `forward` of a block so that it keeps less for its backward pass.

    - full: only its input is kept, and the backward pass runs all of it again (Chen et al., arXiv 1604.06174). For
      Qwen2.5-7B that is 7 KB per token and layer in bfloat16.
    - selective: attention and five of the seven products are kept, so that the backward pass runs one product again,
      29% of the forward pass's products, and what lies between products. For Qwen2.5-7B: 69 KB per token and layer.
      The thin products of LoRA's adapters are run again.
    """
    forward, random = block.forward, False
    kept, number = set(), 0
    for name, module in block.named_modules():  # in the order in which `decoder.Block` runs them
        if isinstance(module, nn.Linear | LoraLinear):
            if name.rpartition(".")[2] in KEPT_PRODUCTS:
                kept.add(number)
            number += 1
        if isinstance(module, LoraLinear):
            random = random or module.dropout > 0
    chosen: dict[str, Any] = {"context_fn": partial(_contexts, frozenset(kept))} if mode == "selective" else {}

    def run(*args: Any) -> Any:  # not a `functools.partial`, on which torch.compile silently gives up
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **chosen)

    block.forward = run  # type: ignore[method-assign]


def _contexts(kept: Container[int]) -> Any:
    """Make the policy for one pass through one block: it counts products from 0."""
    return create_selective_checkpoint_contexts(_Policy(kept))


class _Policy:
    def __init__(self, kept: Container[int]) -> None:
        self._kept = kept
        self._products = {False: 0, True: 0}  # seen in the forward pass, and when it is run again

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operation._schema.name
        keep = name.startswith(ATTENTION)
        if name in PRODUCTS:
            keep = self._products[context.is_recompute] in self._kept
            self._products[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
