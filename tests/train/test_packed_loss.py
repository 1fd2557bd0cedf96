"""Which loss a configuration trains with, and what reaches it under FSDP."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from micota_fast.config.train import TrainSettings
from micota_fast.kernels import linear_cross_entropy
from micota_fast.model.safetensors_io import load_model
from micota_fast.train.packed_loss import PackedLoss, choose_loss
from micota_fast.train.parallel import parallelize
from micota_fast.train.world import join_world


def test_the_loss_leaves_out_the_rows_that_the_settings_say() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (6, 5))
    targets = (hidden @ weight.T).argmax(1)  # which the model gives a probability above 0.2, one of five
    loss = choose_loss(TrainSettings(row_filter=0.8))
    (filtered,) = torch.autograd.grad(loss(hidden, weight, targets, normalizer=6, n_supervised=6), hidden)
    (exact,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, normalizer=6), hidden)
    assert filtered.count_nonzero() == 0
    assert exact.count_nonzero() > 0


def test_weights_of_documents_stay_float32_where_the_model_computes_in_bfloat16(qwen2_checkpoint: Path) -> None:
    """0.3 is 0.30078 in bfloat16, which puts the loss off by as much."""
    seen: list[Tensor] = []

    def loss(*args: Tensor, **options: Any) -> Tensor:
        seen.append(options["token_weights"])
        return linear_cross_entropy(*args, **options)

    with join_world("cpu") as world:
        model = PackedLoss(load_model(qwen2_checkpoint, torch.float32), "sdpa", loss)
        parallelize(model, TrainSettings(dtype="bfloat16"), world)
        ids_T, targets_T = torch.arange(6), torch.arange(1, 7)
        cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
        whole = model(ids_T, torch.arange(6), targets_T, None, cu_seqlens, (6,), 6, 6.0)
        weighted = model(ids_T, torch.arange(6), targets_T, torch.full((6,), 0.3), cu_seqlens, (6,), 6, 6.0)
    assert seen[1].dtype == torch.float32
    torch.testing.assert_close(weighted, 0.3 * whole, rtol=1e-6, atol=0)
