"""Which loss a configuration trains with."""

import torch

from micota_fast.config.train import TrainSettings
from micota_fast.kernels import linear_cross_entropy
from micota_fast.train.packed_loss import choose_loss


def test_the_loss_leaves_out_the_rows_that_the_settings_say() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (6, 5))
    targets = (hidden @ weight.T).argmax(1)  # which the model gives a probability above 0.2, one of five
    loss = choose_loss(TrainSettings(row_filter=0.8))
    (filtered,) = torch.autograd.grad(loss(hidden, weight, targets, normalizer=6, n_supervised=6), hidden)
    (exact,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, normalizer=6), hidden)
    assert filtered.count_nonzero() == 0
    assert exact.count_nonzero() > 0
