"""An estimate from shapes of the memory that a rank needs, so that a run that cannot fit is known before it starts."""

from dataclasses import dataclass
from typing import Literal

import torch

from micota_fast.kernels.chunks import LOGITS_BYTES
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import parameter_shapes

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the peak, which is taken to be the start of the first block's backward pass."""

    state: int  # weights, gradients and both of AdamW's moments, float32, this rank's share
    gathered: int  # what FSDP holds whole: embedding and output matrix, two blocks, one block's gradient
    activations: int  # kept from the forward pass, plus those of the block that is being computed
    loss: int  # logits of a chunk, the float32 gradient of the output matrix, the hidden states and their gradient

    @property
    def total(self) -> int:
        return self.state + self.gathered + self.activations + self.loss


def estimate(
    model: ModelConfig, tokens: int, shards: int, mode: Checkpointing, dtype: torch.dtype, device: str
) -> Memory:
    """Estimate the memory for packs of `tokens` tokens, without the allocator's gaps and the driver's own memory.

    Args:
        model: its shapes.
        tokens: in a pack, and so the longest document.
        shards: processes that share a copy of the model.
        mode: activation checkpointing.
        dtype: compute type.
        device: "cuda" or "cpu", on which the loss holds different numbers of logits.
    """
    sizes = {name: shape.numel() for name, shape in parameter_shapes(model).items()}
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    total = sum(sizes.values())
    root = total - block * model.num_hidden_layers
    head = model.vocab_size * model.hidden_size
    low = dtype.itemsize
    whole = shards == 1 and dtype == torch.float32  # then the model is not wrapped, and nothing is gathered
    return Memory(
        state=16 * total // shards,
        gathered=0 if whole else low * (root + 3 * block),
        activations=tokens * low * (model.num_hidden_layers * kept(model, mode) + kept(model, "none")),
        loss=LOGITS_BYTES[device] + 4 * head + 2 * tokens * model.hidden_size * low,
    )


def kept(model: ModelConfig, mode: Checkpointing) -> int:
    """Return the number of values per token that one block keeps for its backward pass."""
    H, intermediate = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, 2 * model.num_key_value_heads * model.head_dim
    if mode == "full":
        return H
    if mode == "selective":  # the block's input, q, k, v, attention, o, up
        return H + q + kv + q + H + intermediate
    # Both norms' inputs and results; q, k and v after rotation; attention; gate, up, their product; and q and k before
    # rotation, if they have norms of their own. This holds for kernels that keep no more than they must.
    return 4 * H + q + kv + q + 3 * intermediate + (q + kv // 2 if model.qk_norm else 0)


def longest_pack(
    model: ModelConfig, capacity: float, shards: int, mode: Checkpointing, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Return the most tokens in a pack, a multiple of 1024, that fit into `capacity` bytes of a GPU; 0: none fits."""
    fixed = estimate(model, 0, shards, mode, dtype, "cuda").total
    each = estimate(model, 1, shards, mode, dtype, "cuda").total - fixed
    return max(0, int((capacity - fixed) / each) // 1024 * 1024)
