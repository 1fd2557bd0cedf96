"""An estimate from shapes of the memory that a rank needs, so that a run that cannot fit is known before it starts.

The formulas were found and are tested by counting the bytes of a step on fake CUDA ranks (tests/fake_cuda); no GPU has
confirmed them.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal, TypedDict, Unpack

import torch

from micota_fast.config.train import LoraConfig
from micota_fast.kernels.chunks import LOGITS_BYTES
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import parameter_shapes

Checkpointing = Literal["none", "selective", "full"]
OptimizerStates = Literal["float32", "8bit", "4bit"]

# torchao's: bits of a value, and values that share a float32 scale. Fewer than LEAST_QUANTISED stay float32.
BITS_AND_BLOCK = {"8bit": (8, 256), "4bit": (4, 128)}
LEAST_QUANTISED = 4096
# Bytes per value that the compiled step of a parameter holds: both moments in float32, and for 4 bits their codes in
# int64 before they are packed. Counted in the code that torch 2.13 makes for a CPU.
STEP_BYTES = {"8bit": 8, "4bit": 26}

SMALL = 0.01  # of the activations: token ids, statistics of norms, what the allocator rounds up


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at one moment of a step."""

    moment: str
    # This rank's share of weights, AdamW's moments and the gradients there are by now, float32 but for quantised
    # moments; and what the step holds besides.
    state: int
    gathered: int  # what FSDP holds whole: parameters, and gradients on their way to the shards
    activations: int  # kept from the forward pass, and those of the block that is being computed
    loss: int  # logits of a chunk, the output matrix's gradient, the hidden states and their gradient

    @property
    def total(self) -> int:
        return self.state + self.gathered + self.activations + self.loss


class Levers(TypedDict, total=False):
    """What of a training changes its memory, by name, as `estimate` describes it."""

    lora: LoraConfig | None
    top_k: int
    offload: bool
    freeze: Sequence[str]
    optimizer_states: OptimizerStates


def estimate(
    model: ModelConfig,
    tokens: int,
    shards: int,
    mode: Checkpointing,
    dtype: torch.dtype,
    device: str,
    **levers: Unpack[Levers],
) -> Memory:
    """Estimate the memory for packs of `tokens` tokens, without the allocator's gaps and the driver's own memory.

    Args:
        model: its shapes.
        tokens: in a pack, and so the longest document.
        shards: processes that share a copy of the model.
        mode: activation checkpointing.
        dtype: compute type.
        device: "cuda" or "cpu", on which the loss holds different numbers of logits.
        lora: adapters that are trained in place of the weights, which are then of the compute type.
        top_k: entries of a soft target; 0: targets are hard.
        offload: whether weights, gradients and moments are on the host (`host_memory`), and shards copied from there.
        freeze: patterns of names that are not trained. That blocks below all that is trained keep no activations is not
            counted.
        optimizer_states: type of AdamW's moments; only float32 goes with offload.

    Returns:
        That of the moment that needs most.
    """
    return max(moments(model, tokens, shards, mode, dtype, device, **levers), key=lambda memory: memory.total)


def moments(
    model: ModelConfig,
    tokens: int,
    shards: int,
    mode: Checkpointing,
    dtype: torch.dtype,
    device: str,
    *,
    lora: LoraConfig | None = None,
    top_k: int = 0,
    offload: bool = False,
    freeze: Sequence[str] = (),
    optimizer_states: OptimizerStates = "float32",
) -> list[Memory]:
    """Return the memory at each moment of a step that can need most; see `estimate`.

    Between the last block and the first, the backward pass frees kept activations and makes gradients, at equal pace.
    """
    total, block = _parameters(model)
    root = total - block * model.num_hidden_layers  # embedding, last norm and output matrix: whole all the time
    head = model.vocab_size * model.hidden_size
    low, layers = dtype.itemsize, model.num_hidden_layers
    stored = 4 if lora is None else low  # bytes of a value that has no adapter, before it is gathered
    sizes = trained_sizes(model, lora, freeze)
    trained, trained_block, trained_root = _by_place(sizes)
    if lora is None:
        frozen = stored * (total - trained)
    else:
        halves, modules = _adapters(model, lora)
        block += halves // layers
        frozen = stored * total + 4 * (halves - trained)
    if ("model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight") not in sizes:
        head = 0  # no gradient of the output matrix
    # Without gradients, and with all.
    moments = moment_bytes(model, shards, lora, optimizer_states, freeze)
    before, after = (frozen + 4 * trained) // shards + moments, (frozen + 8 * trained) // shards + moments
    copied_block = 0  # from the host, before it is gathered; one rank, which gathers nothing, has a copy less of it
    if offload:
        before = after = 0
        copied_block = 0 if shards == 1 else (stored * (block - trained_block) + 4 * trained_block) // shards
    whole = (
        shards == 1 and dtype == torch.float32 and not offload
    )  # then the model is not wrapped, and nothing is gathered
    kept_T, computed_T = (
        round(tokens * low * values * (1 + SMALL)) for values in (kept(model, mode), _computed(model, mode))
    )
    if lora is not None:  # the narrow products of the adapters' first halves
        narrow = math.ceil(tokens * low * lora.rank * modules / layers)
        kept_T, computed_T = (kept_T + narrow, computed_T) if mode == "none" else (kept_T, computed_T + narrow)
        if lora.dropout:  # each adapter's own input, and which of its values are left
            dropped = math.ceil(
                tokens * (low + (1 if device == "cuda" else low)) * _adapter_inputs(model, lora) / layers
            )
            kept_T, computed_T = (kept_T + dropped, computed_T) if mode == "none" else (kept_T, computed_T + dropped)
        # The gradient of the SwiGLU comes from the weight and from its adapter.
        computed_T += round(tokens * low * model.intermediate_size * (1 + SMALL))
    hidden_TH = tokens * low * model.hidden_size
    logits = min(LOGITS_BYTES[device], tokens * model.vocab_size * max(low, 4 if device == "cpu" else 0))

    def gathered(parameters: int, gradients: int = 0) -> int:
        """Of parameters in the compute type; of gradients also the float32 copy that is summed over the shards."""
        return 0 if whole else low * parameters + (low + 4) * gradients

    # The gradient of the output matrix is summed in float32, and in the end copied to the compute type.
    summed = 4 * head + max(logits, low * head if low < 4 else 0)
    passed_on = 0 if whole else low * head
    soft_TK = tokens * top_k * (4 + 2 + 8)  # ids as they came, log-probabilities, ids as the loss takes them
    summed_block = 0 if whole else 4 * trained_block
    if whole:
        entering = 0
    elif shards == 1:  # one matrix after the other is cast
        entering = low * root + stored * model.vocab_size * model.hidden_size
    else:  # and the first block; both are copied out of the piece that was gathered
        entering = low * (2 * (root + block) + root // shards)
    if not offload:
        last = gathered(root, trained_root)
    elif shards == 1:  # both sides of a sum over one rank
        last = gathered(root, trained_root) + 4 * trained_root + summed_block
    elif model.tie_word_embeddings:  # two gradients, of its rows and of the output matrix
        last = gathered(root, trained_root) + summed_block
    else:  # what was gathered is free by then
        last = max((low + 4) * trained_root, 4 * trained_root + 4 * trained_root // shards) + summed_block
    steps = []
    if optimizer_states != "float32":  # one parameter after the other
        held = STEP_BYTES[optimizer_states] * max(_trained_shards(model, shards, lora, freeze))
        steps.append(Memory("AdamW's step", after + held, 0, 0, 0))
    return [
        *steps,
        Memory("gathering the embedding", before, entering + copied_block, 0, 0),
        Memory(
            "the loss", before, gathered(root + block), layers * kept_T + hidden_TH, summed + 2 * hidden_TH + soft_TK
        ),
        Memory(
            "the backward pass of the last block",
            before,
            gathered(root + 2 * block) + copied_block,
            layers * kept_T + computed_T,
            low * head,
        ),
        Memory(  # while the gradients of the last one are summed over the shards, in float32
            "the backward pass of the last block but one",
            0 if offload else before + 4 * trained_block // shards,
            gathered(root + 2 * block) + summed_block + copied_block,
            (layers - 1) * kept_T + computed_T,
            low * head,
        ),
        Memory(
            "the backward pass of the first block",
            after,
            gathered(root + 2 * block, trained_block) + copied_block,
            kept_T + computed_T,
            passed_on,
        ),
        Memory("the embedding's gradient", after, last, hidden_TH, 0),
    ]


def moment_bytes(
    model: ModelConfig,
    shards: int,
    lora: LoraConfig | None = None,
    optimizer_states: OptimizerStates = "float32",
    freeze: Sequence[str] = (),
) -> int:
    """Return the bytes of AdamW's two moments on the rank that holds most."""
    if optimizer_states == "float32":
        return 8 * sum(trained_sizes(model, lora, freeze).values()) // shards
    bits, block = BITS_AND_BLOCK[optimizer_states]
    total = 0
    for size in _trained_shards(model, shards, lora, freeze):
        quantised = size >= LEAST_QUANTISED and size % block == 0
        total += 2 * (size * bits // 8 + 4 * (size // block) if quantised else 4 * size)
    return total


def _trained_shards(model: ModelConfig, shards: int, lora: LoraConfig | None, freeze: Sequence[str]) -> list[int]:
    """Return the number of values in the first shard of each parameter that is trained; FSDP shards by rows."""
    shapes = parameter_shapes(model)
    found = []
    for name, size in trained_sizes(model, lora, freeze).items():
        if lora is not None and ".lora_A." in name:
            rows = lora.rank
        else:
            rows = size // lora.rank if lora is not None and ".lora_B." in name else shapes[name][0]
        found.append(-(-rows // shards) * (size // rows))
    return found


def host_memory(
    model: ModelConfig, shards: int, dtype: torch.dtype, lora: LoraConfig | None = None, freeze: Sequence[str] = ()
) -> tuple[int, int]:
    """Return the bytes that `offload` takes of the host for each rank: page-locked, and others.

    Weights and gradients are page-locked, which is what copies that do not wait need, and AdamW's moments are not.
    torch page-locks each tensor by itself, in powers of two (`CachingHostAllocator`).
    """
    shares = {name: -(-size // shards) for name, size in trained_sizes(model, lora, freeze).items()}
    locked = sum(_power_of_two(width * -(-size // shards)) for size, width in _stored(model, dtype, lora))
    return locked + sum(_power_of_two(4 * share) for share in shares.values()), 8 * sum(shares.values())


def host_copies(
    model: ModelConfig, shards: int, dtype: torch.dtype, lora: LoraConfig | None = None, freeze: Sequence[str] = ()
) -> float:
    """Return the bytes that `offload` copies between each rank and its host for each pack.

    A block's shards are copied for the forward and for the backward pass, those of the embedding, the last norm and the
    output matrix once; the gradients come back in float32.
    """
    total, block = _parameters(model)
    twice = block * model.num_hidden_layers / total  # of the weights; adapters are all in blocks
    whole = [size * width for size, width in _stored(model, dtype, lora)]
    return (sum(whole) * (1 + twice) + 4 * sum(trained_sizes(model, lora, freeze).values())) / shards


def _stored(model: ModelConfig, dtype: torch.dtype, lora: LoraConfig | None) -> Iterator[tuple[int, int]]:
    """Yield the number of values of each parameter and the bytes of one where it is stored, adapters included."""
    for name, shape in parameter_shapes(model).items():
        yield shape.numel(), 4 if lora is None else dtype.itemsize
        if lora is not None:
            yield from ((half, 4) for half in _halves(name, shape, lora))


def trained_sizes(model: ModelConfig, lora: LoraConfig | None, freeze: Sequence[str]) -> dict[str, int]:
    """Return the number of values of each parameter that is trained, by the names that `freeze` matches."""
    sizes: dict[str, int] = {}
    for name, shape in parameter_shapes(model).items():
        if lora is None:
            sizes[name] = shape.numel()
            continue
        module = name.removesuffix(".weight")
        halves = (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
        sizes |= dict(zip(halves, reversed(_halves(name, shape, lora)), strict=False))
    return {name: size for name, size in sizes.items() if not any(fnmatchcase(name, pattern) for pattern in freeze)}


def _by_place(sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Return how many values there are, how many of them in the block that has most, and how many in none."""
    blocks: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith("model.layers."):
            blocks[name.split(".")[2]] += size
    in_all = sum(sizes.values())
    return in_all, max(blocks.values(), default=0), in_all - blocks.total()


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@lru_cache
def _parameters(model: ModelConfig) -> tuple[int, int]:
    """Return the number of parameters of the model, and of a block."""
    sizes = {name: shape.numel() for name, shape in parameter_shapes(model).items()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))


def _adapters(model: ModelConfig, lora: LoraConfig) -> tuple[int, int]:
    """Return the number of values in all adapters, and the number of modules that have one."""
    halves = [_halves(name, shape, lora) for name, shape in parameter_shapes(model).items()]
    return sum(map(sum, halves)), sum(map(bool, halves))


def _adapter_inputs(model: ModelConfig, lora: LoraConfig) -> int:
    """Return the number of values per token that enter the adapters of all blocks."""
    halves = [_halves(name, shape, lora) for name, shape in parameter_shapes(model).items()]
    return sum(second for _, second in filter(None, halves)) // lora.rank


def _halves(name: str, shape: torch.Size, lora: LoraConfig) -> list[int]:
    """Return the numbers of values in the two matrices of a weight's adapter; none if it has no adapter.

    As in `lora.add_adapters`, norms, embedding and head have none.
    """
    targets = tuple(f".{target}.weight" for target in lora.targets)
    adapted = name.startswith("model.layers.") and len(shape) == 2 and f".{name}".endswith(targets)
    return [lora.rank * size for size in shape] if adapted else []


def kept(model: ModelConfig, mode: Checkpointing) -> int:
    """Return the number of values per token that one block keeps for its backward pass."""
    H, intermediate, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    q, kv = heads * model.head_dim, 2 * model.num_key_value_heads * model.head_dim
    sums = 2 * heads  # of attention's softmax, one float32 per head
    if mode == "full":
        return H
    if mode == "selective":  # the block's input, q, k, v, attention, o, up
        return H + q + kv + q + sums + H + intermediate
    # Both norms' inputs and results; q, k and v after rotation, cos and sin; attention; gate, up, their product; and q
    # and k before rotation, if they have norms of their own. For kernels that keep no more than they must.
    rotated = q + kv + 2 * model.head_dim
    return 4 * H + rotated + q + sums + 3 * intermediate + (q + kv // 2 if model.qk_norm else 0)


def _computed(model: ModelConfig, mode: Checkpointing) -> int:
    """Return the number of values per token in a block's backward pass besides those that it kept."""
    q, kv = model.num_attention_heads * model.head_dim, 2 * model.num_key_value_heads * model.head_dim
    again = kept(model, "none") - kept(model, mode)
    if mode == "selective":
        again += q + kv // 2  # rotated q and k, beside the kept ones
    return again + model.hidden_size + model.intermediate_size  # gradients of the output and of the SwiGLU


def longest_pack(
    model: ModelConfig,
    capacity: float,
    shards: int,
    mode: Checkpointing,
    dtype: torch.dtype = torch.bfloat16,
    **levers: Unpack[Levers],
) -> int:
    """Return the most tokens in a pack, a multiple of 1024, that fit into `capacity` bytes of a GPU; 0: none fits."""

    def fits(thousands: int) -> bool:
        return estimate(model, 1024 * thousands, shards, mode, dtype, "cuda", **levers).total <= capacity

    most = 1
    while fits(most):
        most *= 2
    return 1024 * bisect_left(range(1, most), True, key=lambda thousands: not fits(thousands))
