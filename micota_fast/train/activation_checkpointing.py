"""Activation checkpointing: what of a block is kept for its backward pass, and what is computed a second time there."""

from collections.abc import Callable
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# The cost of attention grows with the square of a document's length, its result with the length: always kept.
ATTENTION = (
    "aten::_scaled_dot_product",
    "flash_attn",
    "torch_attn::",
    "micota::cpu_attention",
    "micota::flash_attention_4",
)
PRODUCTS = ("aten::mm", "aten::addmm")
# Of a block's products, in the order of `decoder.Block`: q, k, v, o, and up. Gate is as large as up and computed again,
# down is the block's last operation, whose result its backward pass never needs.
KEPT_PRODUCTS = (0, 1, 2, 3, 5)


def checkpoint_activations(forward: Callable[..., Any], mode: Literal["selective", "full"]) -> Callable[..., Any]:
    """Wrap the `forward` of a block so that it keeps less for its backward pass.

    - full: its input alone is kept, and the backward pass runs all of it again (Chen et al., arXiv 1604.06174). Of
      Qwen2.5-7B: 7 KB a token and layer in bfloat16.
    - selective: attention and five of the seven products are kept, so that the backward pass runs one product again,
      29% of the forward pass's products, and what lies between them. Of Qwen2.5-7B: 69 KB a token and layer.
    """
    chosen: dict[str, Any] = {"context_fn": _contexts} if mode == "selective" else {}

    def run(*args: Any) -> Any:  # not a `functools.partial`, over which torch.compile gives up, and says nothing
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **chosen)

    return run


def _contexts() -> Any:
    """For one pass through one block: a policy that counts from 0."""
    return create_selective_checkpoint_contexts(_Policy())


class _Policy:
    def __init__(self) -> None:
        self._products = {False: 0, True: 0}  # seen in the forward pass, and when it is run again

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operation._schema.name
        keep = name.startswith(ATTENTION)
        if name in PRODUCTS:
            keep = self._products[context.is_recompute] in KEPT_PRODUCTS
            self._products[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
