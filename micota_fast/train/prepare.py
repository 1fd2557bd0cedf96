"""What a training run needs before its first step: lock, documents, identity, model; and what it says about them."""

import hashlib
import math
import platform
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from micota_fast import __version__
from micota_fast.chat.encoding import Chat
from micota_fast.chat.template import chat_identity
from micota_fast.common.fingerprint import of_file
from micota_fast.common.lock import locked
from micota_fast.config import loader
from micota_fast.config.train import TrainConfig
from micota_fast.data import tokenise
from micota_fast.data.batches import PackedSteps
from micota_fast.data.load_balancing import attention_parity
from micota_fast.data.scores import Scores
from micota_fast.data.tokenise import Documents
from micota_fast.errors import InputError
from micota_fast.model import safetensors_io
from micota_fast.model.attention import choose_backend
from micota_fast.model.checks import checked_config
from micota_fast.model.config import ModelConfig
from micota_fast.model.folder import ADAPTER, COPIED_FILES, tensor_files
from micota_fast.model.pointwise import choose_pointwise
from micota_fast.sources.top_logprobs import TopLogprobs
from micota_fast.train.checkpoint import describe_differences, read_identity
from micota_fast.train.lora import adapted_modules, draw_adapters, flops_per_token
from micota_fast.train.memory import Levers, estimate, host_memory, longest_pack
from micota_fast.train.packed_loss import PackedLoss, choose_loss
from micota_fast.train.trainable import trainable_decoder
from micota_fast.train.world import World

FEW_STEPS = 20  # optimizer steps; a run of fewer is mostly a batch that is too large for its data
TRAINER_ENDS_S = 10.0  # a trainer that was killed a moment ago may still be there


def lock(out: Path, stack: ExitStack) -> None:
    """Keep other trainers away from `out` until `stack` is closed. Call it on rank 0, for all ranks.

    Raises:
        InputError: another trainer is using it, or it cannot be written.
    """
    stack.enter_context(locked(out / ".lock", "trainer", TRAINER_ENDS_S))


def check_trained_parameters(config: TrainConfig, source: Path) -> None:
    """Check the names and sizes that `lora` and `freeze` give against the model's, before anything is loaded.

    Raises:
        InputError: naming the option: it does not fit the model.
    """
    if config.lora is not None or config.freeze:
        trainable_decoder(config, ModelConfig.from_checkpoint(source))


def load_documents(config: TrainConfig, source: Path, out: Path, world: World) -> tuple[Documents, Documents | None]:
    """Load the documents to train on, and those held out for validation (None if there are none).

    Raises:
        InputError: see `data.tokenise.load_documents`; on all ranks if the store of `top_logprobs` is damaged.
    """
    chat = Chat.from_checkpoint(source, config.chat)
    limit = config.max_doc_tokens or config.pack_tokens
    options = (chat, limit, config.over_length, config.skip_bad_rows)
    scores = None
    if config.top_logprobs is not None and config.soft is not None:
        store = _verified_store(config.top_logprobs, world)
        scores = Scores(store, chat.vocab_size, own_tokens=config.soft.divergence == "reverse")
    documents = tokenise.load_documents(config.data, *options, out / "bad_rows.jsonl", config.columns, scores)
    if config.validation_data is None:
        return documents, None
    aside = out / "bad_validation_rows.jsonl"
    return documents, tokenise.load_documents(config.validation_data, *options, aside, config.columns)


def _verified_store(folder: str, world: World) -> TopLogprobs:
    """Open a store on all ranks; one rank of each machine reads all of it, as a machine may have a copy of its own."""
    opened = []

    def open_store() -> None:
        opened.append(TopLogprobs(folder))
        if world.local_rank == 0:
            opened[0].verify()

    world.on_all(open_store)
    return opened[0]


def run_identity(
    config: TrainConfig, source: Path, documents: Documents, held_out: Documents | None, world: World
) -> dict[str, Any]:
    """Return everything that the result depends on: the options, and the contents (not the paths) of what they name.

    Raises:
        InputError: on all ranks: they do not read the same documents.
    """
    read: list[Any] = [None] * world.size
    dist.all_gather_object(read, documents.fingerprint, group=world.hosts)
    if other := [rank for rank, fingerprint in enumerate(read) if fingerprint != read[0]]:
        raise InputError(
            f"rank {other[0]} reads other documents than rank 0: {config.data}, or the tokenizer of {config.model}, is "
            f"not the same on its machine"
        )

    def identity() -> dict[str, Any]:
        files = {path.name: path for name in ("config.json", *COPIED_FILES) if (path := source / name).exists()}
        if config.init == "pretrained":
            files |= {path.name: path for path in tensor_files(source).values()}
        listing = "".join(f"{name} {of_file(path)}\n" for name, path in sorted(files.items()))
        places = ("model", "data", "columns", "top_logprobs", "out", "validation_data")
        options = {k: v for k, v in loader.identity(config).items() if k not in places}
        options["chat"] = chat_identity(config.chat)
        model = hashlib.sha256(listing.encode()).hexdigest()
        found = {"model": model, "documents": documents.fingerprint, "options": options}
        found |= {} if documents.scores is None else {"top_logprobs": documents.scores.store.fingerprint}
        return found if held_out is None else found | {"held_out": held_out.fingerprint}

    return world.on_main(identity)


def is_finished(out: Path, identity: dict[str, Any], world: World) -> bool:
    """Return whether `out` contains this run's result, as rank 0 sees it.

    Raises:
        InputError: on all ranks: it contains another run's result, or summary.json is damaged.
    """

    def look() -> bool:
        path = out / "summary.json"
        try:
            theirs = read_identity(path)
        except FileNotFoundError:
            return False
        except InputError as error:
            raise InputError(f"{error}; delete {out} to start over") from None
        if differing := describe_differences(theirs, identity):
            raise InputError(
                f"{out} holds the result of another run ({differing}); "
                f"choose another `out`, or delete {out} to replace it"
            )
        lora = identity["options"].get("lora")
        files = [out / "adapter" / ADAPTER] if lora else []
        files += [out / "model" / "config.json"] if not lora or lora["merged"] else []
        return all(file.is_file() for file in files)

    if not world.on_main(look):
        return False
    world.say(f"{out} already contains the finished result of this run")
    if world.is_main:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # killed between writing summary.json and their removal
    return True


def build_model(config: TrainConfig, source: Path, world: World) -> PackedLoss:
    """Build the decoder, what is trained in float32, with its loss and choose its kernels; it has no weights yet.

    Raises:
        InputError: the checkpoint cannot be honoured, or what comes of it could not be saved.
    """
    shape = ModelConfig.from_checkpoint(source) if config.init == "random" else checked_config(source)
    safetensors_io.check_savable(shape, source, config.save_dtype)
    backend, reason = choose_backend(config.attention, world.device, getattr(torch, config.dtype), shape.head_dim)
    decoder, untrained = trainable_decoder(config, shape)
    pointwise, whose = choose_pointwise(world.device, config.compile)
    decoder.use(pointwise)
    world.say(f"attention: {backend} ({reason}); norms, rotation and SwiGLU: {whose}")
    if untrained is not None:
        world.say(untrained)
    return PackedLoss(decoder, backend, choose_loss(config), config.soft)


def load_initial_weights(model: PackedLoss, config: TrainConfig, source: Path, world: World) -> None:
    """Give the model, sharded or not, memory and the weights that training starts from.

    The memory is on this rank's device; with offload that of parameters is on the host. A device never holds more than
    this rank's shards, and its host never more than one tensor besides: what is too large for one device can be trained
    on several.

    Raises:
        InputError: on all ranks, if one of them cannot read its weights.
    """
    model.to_empty(device="cpu" if world.offload else world.device)
    if world.offload:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(world.device))

    def load() -> None:
        if config.init == "random":
            safetensors_io.draw_weights(model.decoder, config.seed)
        else:
            safetensors_io.read_weights(model.decoder, source)
        draw_adapters(model.decoder, config.seed)

    world.on_all(load)


def plan_steps(config: TrainConfig, documents: Documents, model: PackedLoss, world: World) -> PackedSteps:
    """Plan the optimizer steps, with packs assigned to ranks by what they cost this model."""
    parity = attention_parity(partial(flops_per_token, model.decoder))
    return PackedSteps(
        documents, config.pack_tokens, config.packs_per_step, world.rank, world.size, config.seed, parity
    )


def mean_context(documents: Documents) -> float:
    """Return the length of a token's document, averaged over tokens: the cost of attention is linear in it."""
    lengths = documents.lengths.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def run_facts(model: PackedLoss, documents: Documents, steps: PackedSteps, total: int, world: World) -> dict[str, Any]:
    """Return what summary.json says besides results; equal in every run of one identity, except for versions."""
    in_adapters = sum(module.adapter_parameters for module in adapted_modules(model.decoder).values())
    return {
        "parameters": model.decoder.num_params() - in_adapters,
        **({"adapter_parameters": in_adapters} if in_adapters else {}),
        "attention": model.backend,
        "processes": world.size,
        "steps": total,
        "data": {
            "rows": documents.rows,
            "documents": len(documents),
            "dropped": documents.dropped,
            "truncated": documents.truncated,
            "rejected": documents.rejected,
            "tokens": int(documents.lengths.sum()),
            "supervised": int(documents.n_targets.sum()),
            "packs": steps.n_packs,
            "steps_per_epoch": steps.steps_per_epoch,
            "efficiency": round(steps.efficiency, 6),
            "idle_share": round(steps.idle_share, 6),
        },
        "versions": {"micota_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def introduce(
    config: TrainConfig, facts: dict[str, Any], model: ModelConfig, documents: Documents, world: World
) -> None:
    """Print what is trained on what, and what looks wrong about it."""
    data, pack_tokens = facts["data"], min(config.pack_tokens, facts["data"]["tokens"])
    start = "fresh weights" if config.init == "random" else "pre-trained"
    copies = f", {world.replicas} copies of the model" if world.replicas > 1 else ""
    world.say(
        f"model: {config.model} ({facts['parameters']:,} parameters, {start}); compute {config.dtype} on "
        f"{world.size} x {world.device.type}{copies}, {torch.get_num_threads()} threads each\n"
        f"data: {config.data}: {data['documents']:,} documents of {data['rows']:,} rows ({data['dropped']} dropped and "
        f"{data['truncated']} truncated for length, {data['rejected']} bad), {data['tokens']:,} tokens, "
        f"{data['supervised']:,} supervised\n"
        f"packs: {data['packs']:,} of {pack_tokens:,} tokens, {data['efficiency']:.1%} filled; "
        f"{data['steps_per_epoch']:,} steps per epoch, {facts['steps']:,} in all"
    )
    world.say("\n".join(documents.about))
    if world.size > 1:
        world.say(
            f"ranks: {data['idle_share']:.1%} of their time is spent waiting for the slowest, by the model's FLOPs"
        )
    if config.soft is not None and config.soft.divergence == "reverse":
        world.say(
            "WARNING: `soft.divergence: reverse` is only right on answers that this student has sampled itself, at "
            "temperature 1 from all tokens (`top_p` 1, no `top_k`); the rows do not show who wrote them"
        )
    if (warning := few_steps(config, facts["steps"], data["packs"])) is not None:
        world.say(warning)
    if config.offload and not world.offload:
        world.say("offload: nothing to do, as the model is trained on the CPU")
    if world.device.type == "cuda":
        top_k = 0 if documents.scores is None else documents.scores.top_k
        world.say(_memory(config, model, pack_tokens, top_k, world))
    positions = model.max_position_embeddings
    over = int((documents.lengths > positions).sum())
    if over:
        world.say(
            f"WARNING: {over:,} documents (longest: {int(documents.lengths.max()):,} tokens) go past the model's "
            f"max_position_embeddings of {positions:,}: it was not made for them, and a server ends an answer there. "
            f"Raise that (and RoPE's scaling) in the config.json of {config.model}, or set max_doc_tokens"
        )


def few_steps(config: TrainConfig, steps: int, packs: int) -> str | None:
    """Return a warning that a run ends before it has learned, with what makes it longer; None if it is long enough.

    Args:
        config: of the run.
        steps: in all.
        packs: in an epoch.
    """
    if steps >= FEW_STEPS:
        return None
    text = f"WARNING: {steps} optimizer step{'s' * (steps > 1)} will hardly change the model; "
    if config.max_steps is not None and config.max_steps <= steps:
        return text + "raise `max_steps`"
    if (fewer := math.floor(packs * config.epochs / FEW_STEPS)) >= 1:
        return text + f"`packs_per_step: {fewer}` (now {config.packs_per_step}) makes at least {FEW_STEPS}"
    epochs = math.ceil(FEW_STEPS / packs)
    return text + (
        f"`packs_per_step: 1` and `epochs: {epochs}` make {packs * epochs}, and so does a smaller `pack_tokens` (now "
        f"{config.pack_tokens:,}) with fewer epochs"
    )


def _memory(config: TrainConfig, model: ModelConfig, pack_tokens: int, top_k: int, world: World) -> str:
    """Compare what this rank's GPU will hold, according to the model's shapes, with what it has."""
    dtype, shards = getattr(torch, config.dtype), world.size // world.replicas
    how, states = config.activation_checkpointing, config.optimizer_states
    levers = Levers(lora=config.lora, top_k=top_k, offload=world.offload, freeze=config.freeze, optimizer_states=states)
    need = estimate(model, pack_tokens, shards, how, dtype, "cuda", **levers)
    there = torch.cuda.get_device_properties(world.device).total_memory
    text = (
        f"memory: {need.total / 1e9:.1f} GB of {there / 1e9:.1f} by an estimate from shapes, most at {need.moment}: "
        f"weights, gradients and moments {need.state / 1e9:.1f}, gathered {need.gathered / 1e9:.1f}, activations "
        f"{need.activations / 1e9:.1f}, loss {need.loss / 1e9:.1f}"
    )
    if world.offload:
        locked, moments = (size / 1e9 for size in host_memory(model, shards, dtype, config.lora, config.freeze))
        text += (
            f"; offload: {locked + moments:.1f} GB of the host for each process, {locked:.1f} of them page-locked, and "
            f"a copy while a checkpoint is written"
        )
    if need.total > 0.95 * there:
        fits = longest_pack(model, 0.9 * there, shards, how, dtype, **levers)
        remedies = [f"`pack_tokens` of {fits:,}"] if fits > 0 else []
        if how != "full":
            remedies.append("`activation_checkpointing: full`")
        if not world.offload and states == "float32":
            remedies.append("`optimizer_states: 8bit`")
        if not world.offload and states == "float32" and world.replicas == 1:
            remedies.append("`offload: true`")
        text += f"\nWARNING: that may not fit. What takes less: {', '.join([*remedies, 'more processes'])}"
    return text
