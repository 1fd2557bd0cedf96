"""The decoder and its loss on one pack of documents: the one place where a training loss is chosen."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from micota_fast.config.train import SoftConfig, TrainSettings
from micota_fast.data.batches import IGNORE_INDEX, PackedBatch
from micota_fast.kernels import ReverseTargets, SoftTargets, linear_cross_entropy
from micota_fast.model.attention import Backend, PackedAttention
from micota_fast.model.decoder import Decoder
from micota_fast.train.world import World

# Takes hidden states [T, H], the output projection [V, H] and targets [T], `SoftTargets` or `ReverseTargets`, and by
# name `normalizer`, `n_supervised` and `token_weights`, as `linear_cross_entropy` does; returns a float32 scalar.
Loss = Callable[..., Tensor]


def choose_loss(settings: TrainSettings) -> Loss:
    """Return the loss that `settings` ask for."""
    return partial(linear_cross_entropy, row_filter=settings.row_filter)


class PackedLoss(nn.Module):
    """The decoder and its loss as one module: under FSDP the output projection is gathered once for both."""

    def __init__(
        self, decoder: Decoder, backend: Backend, loss: Loss = linear_cross_entropy, soft: SoftConfig | None = None
    ) -> None:
        super().__init__()
        self.decoder, self.backend, self.loss, self.soft = decoder, backend, loss, soft

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        targets_T: Tensor,
        token_weights_T: Tensor | None,
        cu_seqlens: Tensor,
        lengths: Sequence[int],
        n_supervised: int,
        normalizer: float,
        top_ids_TK: Tensor | None = None,
        top_logprobs_TK: Tensor | None = None,
        token_logprobs_T: Tensor | None = None,
        reverse_estimate: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of these tokens' losses divided by `normalizer`, a float32 scalar.

        Args:
            input_ids_T, position_ids_T, targets_T, token_weights_T, cu_seqlens, lengths, n_supervised, top_ids_TK,
                top_logprobs_TK, token_logprobs_T: the fields of a `PackedBatch`, with tensors on the model's device.
            normalizer: divisor of the sum, the same on all ranks and in all micro-steps of a step.
            reverse_estimate: what `ReverseTargets.estimate` is, added to where `token_logprobs_T` are given.
        """
        attend = PackedAttention(cu_seqlens, lengths, self.backend, input_ids_T.device)
        hidden_TH = self.decoder(input_ids_T, position_ids_T, attend)
        return self.loss(
            hidden_TH,
            self.decoder.lm_head_weight,
            self._targets(targets_T, top_ids_TK, top_logprobs_TK, token_logprobs_T, reverse_estimate),
            normalizer=normalizer,
            n_supervised=n_supervised,
            token_weights=token_weights_T,
        )

    def _targets(
        self,
        targets_T: Tensor,
        top_ids_TK: Tensor | None,
        top_logprobs_TK: Tensor | None,
        token_logprobs_T: Tensor | None,
        reverse_estimate: Tensor | None,
    ) -> Tensor | SoftTargets | ReverseTargets:
        if self.soft is not None and token_logprobs_T is not None:
            return ReverseTargets(targets_T, token_logprobs_T, self.soft.alpha, reverse_estimate)
        if self.soft is None or top_ids_TK is None or top_logprobs_TK is None:
            return targets_T
        alpha, temperature, tail = self.soft.alpha, self.soft.temperature, self.soft.tail
        if temperature != 1:  # the teacher's softmax over the K tokens, at this temperature
            top_logprobs_TK = (top_logprobs_TK.float() / temperature).log_softmax(1)
        return SoftTargets(top_ids_TK.long(), top_logprobs_TK, targets_T, tail, temperature, alpha)


# For a rank that has run out of packs, as all must join in the collectives: tokens without a target, so a loss and
# gradients of zero. Two tokens, as every document has at least: torch.compile would make a graph of its own for one.
DUMMY_BATCH = PackedBatch(
    input_ids=torch.zeros(2, dtype=torch.int64),
    position_ids=torch.arange(2),
    cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
    lengths=(2,),
    targets=torch.full((2,), IGNORE_INDEX),
    token_weights=None,
    n_supervised=0,
    top_ids=None,
    top_logprobs=None,
    token_logprobs=None,
    doc_ids=(),
)


def on_device(pack: PackedBatch, world: World) -> dict[str, Any]:
    """Start copying a batch to the device; returns the arguments of `PackedLoss.forward` except the normalizer."""

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        # Only from pinned memory does a copy not wait for the device.
        return tensor.pin_memory().to(world.device, non_blocking=True) if world.device.type == "cuda" else tensor

    return {
        "input_ids_T": copied(pack.input_ids),
        "position_ids_T": copied(pack.position_ids),
        "targets_T": copied(pack.targets),
        "token_weights_T": copied(pack.token_weights),
        "cu_seqlens": copied(pack.cu_seqlens),
        "lengths": pack.lengths,
        "n_supervised": pack.n_supervised,
        "top_ids_TK": copied(pack.top_ids),
        "top_logprobs_TK": copied(pack.top_logprobs),
        "token_logprobs_T": copied(pack.token_logprobs),
    }
