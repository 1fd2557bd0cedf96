"""The decoder and its loss on one pack of documents: the one place where a loss is chosen."""

from typing import Any

import torch
from torch import Tensor, nn

from micota_fast.data.batches import IGNORE_INDEX, PackedBatch
from micota_fast.kernels import linear_cross_entropy
from micota_fast.model.attention import Backend, PackedAttention
from micota_fast.model.decoder import Decoder
from micota_fast.train.world import World


class PackedLoss(nn.Module):
    """The decoder and its loss as one module: under FSDP the output projection is gathered once for both."""

    def __init__(self, decoder: Decoder, backend: Backend, row_filter: float = 0.0) -> None:
        super().__init__()
        self.decoder, self.backend, self.row_filter = decoder, backend, row_filter

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        targets_T: Tensor,
        token_weights_T: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        n_supervised: int,
        normalizer: float,
    ) -> Tensor:
        """Sum of the losses of these tokens, of which `n_supervised` have one, over `normalizer`; a float32 scalar."""
        attend = PackedAttention(cu_seqlens, max_seqlen, self.backend, input_ids_T.device)
        hidden_TH = self.decoder(input_ids_T, position_ids_T, attend)
        return linear_cross_entropy(
            hidden_TH,
            self.decoder.lm_head_weight,
            targets_T,
            normalizer=normalizer,
            n_supervised=n_supervised,
            token_weights=token_weights_T,
            row_filter=self.row_filter,
        )


# For a rank that has run out of packs, as all must join in the collectives: tokens without a target, so a loss and
# gradients of zero. Two, as every document has at least: of one, torch.compile makes a graph of its own.
DUMMY_BATCH = PackedBatch(
    input_ids=torch.zeros(2, dtype=torch.int64),
    position_ids=torch.arange(2),
    cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
    max_seqlen=2,
    targets=torch.full((2,), IGNORE_INDEX),
    token_weights=None,
    n_supervised=0,
    doc_ids=(),
)


def on_device(pack: PackedBatch, model: PackedLoss, world: World) -> dict[str, Any]:
    """The arguments of `PackedLoss.forward` but the normalizer, on their way to the device."""

    def copied(tensor: Tensor) -> Tensor:
        # Only from pinned memory does a copy not wait for the device.
        return tensor.pin_memory().to(world.device, non_blocking=True) if world.device.type == "cuda" else tensor

    return {
        "input_ids_T": copied(pack.input_ids),
        "position_ids_T": copied(pack.position_ids),
        "targets_T": copied(pack.targets),
        "token_weights_T": None if pack.token_weights is None else copied(pack.token_weights),
        # SDPA takes documents apart on the host and wants their lengths there.
        "cu_seqlens": pack.cu_seqlens if model.backend == "sdpa" else copied(pack.cu_seqlens),
        "max_seqlen": pack.max_seqlen,
        "n_supervised": pack.n_supervised,
    }
