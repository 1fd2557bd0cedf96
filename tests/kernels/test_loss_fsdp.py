"""The loss under FSDP2 on two gloo ranks: what is gathered and reduced, and the gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.ranks import run_ranks
from helpers.soft_cases import reverse_targets, soft_targets
from micota_fast.kernels import ReverseTargets, SoftTargets, chunks, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy
from micota_fast.train.world import World

V, H, N = 96, 8, 24
# Supervised rows of each rank: some on both, none on one, none at all.
SUPERVISED = ((20, 7), (0, 11), (0, 0))


class TinyLoss(nn.Module):
    """Embedding, one block, and the output weight with its loss in one module, as the trainer's is."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, H))
        self.block = nn.Linear(H, H)
        self.head = self.embedding if tied else nn.Parameter(torch.randn(V, H))

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | SoftTargets | ReverseTargets,
        n_supervised: int,
        normalizer: int,
        dense: bool = False,
    ) -> Tensor:
        hidden = self.block(F.embedding(ids, self.embedding)).tanh()
        if dense:
            return dense_linear_cross_entropy(hidden, self.head, targets, normalizer=normalizer)
        return linear_cross_entropy(hidden, self.head, targets, n_supervised=n_supervised, normalizer=normalizer)


def batch(rank: int, n_supervised: int, kind: str) -> tuple[Tensor, Tensor | SoftTargets | ReverseTargets]:
    generator = torch.Generator().manual_seed(rank)
    ids, targets = (torch.randint(0, V, (N,), generator=generator) for _ in range(2))
    targets[torch.randperm(N, generator=generator)[n_supervised:]] = -100
    if kind == "reverse":
        return ids, replace(reverse_targets(N, V, absent=0.3, seed=rank, alpha=0.7), tokens=targets)
    if kind == "soft":
        made = soft_targets(N, V, 8, hard=True, seed=rank, tail="bucket", alpha=0.5, temperature=2.0)
        return ids, replace(made, hard=targets)
    return ids, targets


class Collectives(TorchDispatchMode):
    """Elements that each all-gather gave and each reduce-scatter took."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.reduced: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith("_allgather_base_"):
            self.gathered.append(args[0].numel())
        elif func.__name__.startswith("_reduce_scatter_base_"):
            self.reduced.append(args[1].numel())
        return func(*args, **(kwargs or {}))


def gradients_equal_those_of_one_process(world: World, dtype: torch.dtype, tied: bool, kind: str) -> None:
    chunks.LOGITS_BYTES["cpu"] = 5 * V * 4  # rows of several chunks
    mesh = init_device_mesh("cpu", (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for supervised in SUPERVISED:
        alone, model = TinyLoss(tied), TinyLoss(tied)
        for module in (model.block, model):
            sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        normalizer = max(1, sum(supervised))
        with Collectives() as collectives:
            ids, targets = batch(world.rank, supervised[world.rank], kind)
            model(ids, targets, supervised[world.rank], normalizer).backward()

        root = (1 if tied else 2) * V * H
        block = H * H + H
        assert collectives.gathered == [root, block, block], "the root's weights are gathered once for both passes"
        assert sorted(collectives.reduced) == [block, root]

        for rank, count in enumerate(supervised):
            alone(*batch(rank, count, kind), count, normalizer, dense=True).backward()
        for (name, ours), (_, theirs) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            assert isinstance(ours.grad, DTensor)
            assert theirs.grad is not None
            got = ours.grad.full_tensor()
            assert got.dtype == torch.float32
            if sum(supervised) == 0:
                assert not got.any(), name
            elif dtype == torch.float32:
                torch.testing.assert_close(got, theirs.grad, rtol=1e-5, atol=1e-7)
            else:
                assert (got - theirs.grad).norm() < 0.02 * theirs.grad.norm(), name


def in_both_types(world: World, tied: bool, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gradients_equal_those_of_one_process(world, dtype, tied, kind)


@pytest.mark.parametrize(("tied", "kind"), [(False, "hard"), (True, "hard"), (True, "soft"), (False, "reverse")])
def test_the_output_weight_is_gathered_once_and_its_gradient_reduced_once(
    tied: bool, kind: str, tmp_path: Path
) -> None:
    run_ranks(2, in_both_types, tmp_path / "log", tied, kind)
