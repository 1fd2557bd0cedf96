"""The model sharded over the processes by FSDP2. One process runs the same code with one shard."""

import itertools

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from micota_fast.config.train import TrainSettings
from micota_fast.train.activation_checkpointing import checkpoint_activations
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.world import World


def parallelize(model: PackedLoss, config: TrainSettings, world: World) -> None:
    """Checkpoint, compile and shard `model` in place, as the configuration says.

    Parameters stay float32 and sharded over the processes that share a copy. Each block is gathered in the compute type
    for its forward and backward pass, while the block before it computes. Gradients are summed in float32, over the
    shards and then over the copies, if there are several. One process that computes in float32 needs no sharding.

    With offload the shards are on the host, page-locked. They are copied to the device before each gather, their
    gradients back after each sum, and the host waits for these before the optimizer's step, which is its own.
    """
    blocks = model.decoder.model.layers
    for block in blocks:
        if config.activation_checkpointing != "none":
            checkpoint_activations(block, config.activation_checkpointing)
        if config.compile:
            block.compile(dynamic=True)  # packs differ in length: one graph for all, not one for each
    embedding = model.decoder.model.embed_tokens
    if config.compile and not embedding.weight.requires_grad:
        # Else the first block's input alone would have no gradient, and the block a graph of its own.
        embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(torch.is_grad_enabled()))
    if world.size == 1 and config.dtype == "float32" and not world.offload:
        return
    if world.replicas == 1:
        mesh = init_device_mesh(world.device.type, (world.size,))
    else:
        shape = (world.replicas, world.size // world.replicas)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    # Inputs are not cast: the embedding gives the compute type, and documents' weights must stay float32.
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    where = CPUOffloadPolicy() if world.offload else OffloadPolicy()
    modules = [fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=where) for module in (*blocks, model)]
    for module in modules:
        # The loss is divided by the count over all ranks already, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for module, following in itertools.pairwise([modules[-1], *modules[:-1]]):  # the root runs first
        module.set_modules_to_forward_prefetch([following])


def last_micro_step(model: PackedLoss, last: bool) -> None:
    """Set whether the next backward pass is the last of a step: copies of the model exchange gradients only then."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def local_part(tensor: Tensor) -> Tensor:
    """Return the shard of `tensor` that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
