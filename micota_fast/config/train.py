"""Options of training.

"MiCoTA" is arXiv 2507.01887 and its repository; "SMLG" is the Small-Model-Learnability-Gap repository, whose scripts
MiCoTA builds on; "ours" marks what both leave open.
"""

import math
from dataclasses import dataclass
from typing import Literal

from micota_fast.config.checks import at_least
from micota_fast.config.generation import ChatConfig
from micota_fast.config.loader import option
from micota_fast.errors import InputError


@dataclass(kw_only=True)
class MeshConfig:
    """How the processes of a training share the model: `replicate` copies, each sharded over `shard` processes."""

    replicate: int = option(
        1, doc="copies of the model; usually 1 or the number of nodes (hybrid sharding)", source="ours"
    )
    shard: int | None = option(None, doc="processes that share a copy; null: all processes / replicate")

    def __post_init__(self) -> None:
        at_least(self, replicate=1)
        if self.shard is not None:
            at_least(self, shard=1)


# Of a block's modules, all that are matrices.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), which are trained in place of the model's weights."""

    rank: int = option(
        16, doc="rank of an adapter, which adds the product of two thin matrices to a weight", source="ours"
    )
    alpha: float = option(32.0, doc="an adapter's product is multiplied by alpha / rank", source="Schulman et al. 2025")
    targets: list[str] = option(
        PROJECTIONS,
        doc="modules that get an adapter, by full name or by its last parts: [q_proj, layers.0.mlp.up_proj]",
        source="QLoRA, arXiv 2305.14314: all matrices of a block",
    )
    dropout: float = option(0.0, doc="share of an adapter's inputs that is set to zero in training", source="peft")
    merged: bool = option(False, doc="besides adapter/, write model/: the weights with the adapters added to them")

    def __post_init__(self) -> None:
        at_least(self, rank=1)
        if not 0 < self.alpha < math.inf:
            raise InputError(f"`alpha` must be above 0 and finite, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"`dropout` must be at least 0 and below 1, not {self.dropout}")
        if not self.targets:
            raise InputError("`targets` is empty: no module would get an adapter")


@dataclass(kw_only=True)
class SoftConfig:
    """Training on a teacher's distributions: alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross entropy.

    With `divergence: reverse` alpha * (an estimate of KL(student || teacher) on the text's own tokens, which must be
    the student's own samples) + (1 - alpha) * cross entropy; `micota_fast.kernels.ReverseTargets` has its gradient.

    Tokens that the teacher did not score, such as the end of a turn, have the cross entropy alone.
    """

    alpha: float = option(
        0.9,
        doc="weight of the KL divergence in the loss; the cross entropy of the text's own tokens has weight 1 - alpha",
        source="ours",
    )
    temperature: float = option(
        1.0,
        doc="temperature T of both distributions in the KL divergence; values other than 1 need `tail: ignore`",
        source="TRL's DistillationConfig",
    )
    tail: Literal["bucket", "ignore"] = option(
        "bucket",
        doc="treatment of the probability outside the teacher's K tokens. bucket: it counts as one event, any other "
        "token; ignore: it is dropped and the K tokens are renormalised",
        source="ours",
    )
    divergence: Literal["forward", "reverse"] = option(
        "forward",
        doc="forward: KL(teacher || student) over the K tokens, on any text; reverse: KL(student || teacher) as a "
        "policy gradient on the text's own tokens, for samples of the student itself",
        source="ours",
        newer=True,
    )

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(
                f"`alpha` must be above 0 and at most 1, not {self.alpha}; to train on the text's own tokens alone, "
                "leave `soft` out"
            )
        if not 0 < self.temperature < math.inf:
            raise InputError(f"`temperature` must be above 0 and finite, not {self.temperature}")
        if self.divergence == "reverse" and self.temperature != 1:
            raise InputError(
                f"`temperature: {self.temperature}` with `divergence: reverse`: the divergence is estimated from "
                "samples that the student wrote at temperature 1; leave `temperature` out"
            )
        if self.divergence == "reverse" and self.tail != "bucket":
            raise InputError(
                f"`tail: {self.tail}` with `divergence: reverse`, which reads the text's own tokens and not the K "
                "likeliest; leave `tail` out"
            )
        if self.temperature != 1 and self.tail == "bucket":
            raise InputError(
                f"`temperature: {self.temperature}` needs `tail: ignore`: the teacher's K log-probabilities are "
                "taken at temperature 1 and do not determine the probability of all other tokens at another "
                "temperature"
            )


@dataclass(kw_only=True)
class TrainSettings:
    """How a model is trained."""

    seed: int = option(0, doc="seed of the order of the documents, and of the weights if init is random")
    epochs: float = option(2.0, doc="passes over the documents", source="MiCoTA")
    max_steps: int | None = option(None, doc="stop after N optimizer steps; null: after `epochs`")
    lr: float = option(1e-5, doc="peak learning rate", source="MiCoTA")
    min_lr_ratio: float = option(0.0, doc="final learning rate as a share of the peak", source="MiCoTA: cosine to 0")
    warmup_ratio: float = option(0.1, doc="share of the steps with a rising learning rate", source="ours")
    weight_decay: float = option(0.0, doc="AdamW's decoupled decay; never on norms and biases", source="ours")
    betas: tuple[float, float] = option(
        (0.9, 0.95), doc="AdamW's decay rates of the first and second moment", source="ours"
    )
    eps: float = option(1e-8, doc="AdamW's epsilon", source="Loshchilov & Hutter 2019")
    optimizer_states: Literal["float32", "8bit", "4bit"] = option(
        "float32",
        doc="type of AdamW's moments; 8bit and 4bit: quantised in blocks by torchao (extra `lowbit`)",
        source="Dettmers et al. 2022, arXiv 2110.02861; Li et al. 2023, arXiv 2309.01507",
        newer=True,
    )
    max_grad_norm: float = option(
        1.0,
        doc="largest L2 norm of the gradients; larger gradients are scaled down to it",
        source="ours",
        infinite=True,
    )
    pack_tokens: int = option(16384, doc="tokens in a pack: the length of one forward pass", source="ours")
    packs_per_step: int = option(8, doc="packs in an optimizer step, over all ranks: the global batch", source="ours")
    max_doc_tokens: int | None = option(None, doc="longest document, in tokens; null: pack_tokens")
    over_length: Literal["drop", "truncate"] = option(
        "drop", doc="what happens to a document longer than `max_doc_tokens`", source="ours"
    )
    skip_bad_rows: bool = option(False, doc="set bad rows aside in a rejects file instead of stopping")
    chat: ChatConfig = option(ChatConfig(), doc="the model's prompt")
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", doc="compute type; weights, optimizer and gradient sums stay float32", source="MiCoTA"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", doc="auto: CUDA if there is a device")
    attention: Literal["auto", "flash", "varlen", "sdpa"] = option(
        "auto", doc="auto: FlashAttention 4, 3 or 2 if installed, else torch's varlen attention, else SDPA"
    )
    mesh: MeshConfig = option(MeshConfig(), doc="how processes share the model", operational=True)
    compile: bool = option(False, doc="torch.compile each block")
    row_filter: float = option(
        0.0,
        doc="leave tokens whose probability is at least 1 - row_filter out of the gradients; 0: exact gradients",
        source="ours",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = option(
        "none",
        doc="what the backward pass recomputes: gate and cheap operations (selective), or whole blocks (full)",
        operational=True,
    )
    offload: bool = option(
        False,
        doc="keep weights, gradients and AdamW's moments in the host's memory and run the optimizer step there; no "
        "effect on a CPU",
        source="FSDP2's CPUOffloadPolicy",
        operational=True,
    )
    freeze: list[str] = option(
        [], doc="parameters that are not trained, by patterns of their names: [model.embed_tokens.*, '*.layers.0.*']"
    )
    lora: LoraConfig | None = option(
        None, doc="train low-rank adapters and leave the weights unchanged; null: train the weights", newer=True
    )
    soft: SoftConfig | None = option(
        None, doc="train on the distributions of `top_logprobs`; null: on the text's own tokens", newer=True
    )
    validation_data: str | None = option(
        None, doc="JSONL of held-out rows whose loss is measured during training; null: no validation"
    )
    validate_every: int | None = option(None, doc="steps between validations; null: ten per run")
    early_stop: int | None = option(
        None,
        doc="stop after N validations without a new lowest loss, and keep the weights that had the lowest loss; "
        "null: never",
    )
    max_skipped_steps: int = option(
        5,
        doc="stop after N steps in a row whose loss or gradient is not finite; such steps do not change the weights",
        operational=True,
    )
    checkpoint_every: int | None = option(
        None, doc="steps between resume checkpoints; null: ten per run", operational=True
    )
    keep_checkpoints: int = option(
        2, doc="number of newest resume checkpoints that are kept, besides the best", source="ours", operational=True
    )
    log_every: int = option(
        10, doc="steps between progress lines; the host waits for the device at each line", operational=True
    )
    tensorboard: bool = option(False, doc="write TensorBoard events to OUT/tensorboard", operational=True)
    wandb: str | None = option(None, doc="Weights & Biases project to report to", operational=True)
    init: Literal["pretrained", "random"] = option("pretrained", doc="random: fresh weights of the model's shape")
    save_dtype: Literal["bfloat16", "float32"] | None = option(None, doc="type of the saved weights; null: as loaded")

    def __post_init__(self) -> None:
        # Each condition is put so that NaN fails it.
        for name in ("epochs", "lr", "max_grad_norm", "eps"):
            if not getattr(self, name) > 0:
                raise InputError(f"`{name}` must be above 0, not {getattr(self, name)}")
        for name in ("epochs", "lr", "eps", "weight_decay"):  # max_grad_norm: .inf switches clipping off
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"`{name}` must be finite and not negative, not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"`betas` must lie between 0 and 1, 1 excluded, not {list(self.betas)}")
        if self.seed < 0:
            raise InputError(f"`seed` must be at least 0, not {self.seed}")
        for name in (
            "pack_tokens",
            "packs_per_step",
            "log_every",
            "max_steps",
            "max_doc_tokens",
            "checkpoint_every",
            "keep_checkpoints",
            "validate_every",
            "early_stop",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be at least 1, not {value}")
        if not 0 <= self.row_filter < 1:
            raise InputError(f"`row_filter` must be at least 0 and below 1, not {self.row_filter}")
        if self.soft is not None and self.row_filter > 0:
            raise InputError(
                "`row_filter` with `soft`: the loss of a distribution does not bound its gradient; set `row_filter: 0`"
            )
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"`{name}` must lie between 0 and 1, not {getattr(self, name)}")
        if self.lora is not None and self.init == "random":
            raise InputError(
                "`lora` adapts the weights of a checkpoint, but `init: random` does not load them; leave one of them "
                "out"
            )
        if self.offload and self.mesh.replicate > 1:
            raise InputError(
                "`offload` shards one copy of the model, and `mesh.replicate` makes "
                f"{self.mesh.replicate}, whose gradients would wait on the GPU: leave one of them out"
            )
        if self.offload and self.optimizer_states != "float32":
            raise InputError(
                f"`optimizer_states: {self.optimizer_states}` with `offload`: AdamW would step on the host, where "
                "quantising takes many times as long as the step itself; leave one of them out"
            )
        if self.early_stop is not None and self.validation_data is None:
            raise InputError("`early_stop` needs `validation_data`, whose loss it watches")
        if self.max_doc_tokens is not None and self.max_doc_tokens > self.pack_tokens:
            raise InputError(f"`max_doc_tokens` {self.max_doc_tokens} exceeds `pack_tokens` {self.pack_tokens}")


@dataclass(kw_only=True)
class TrainConfig(TrainSettings):
    """`micota train`, also under torchrun: a checkpoint and a corpus in, a checkpoint out."""

    model: str = option(doc="checkpoint to start from (folder or hub name)")
    data: str = option(
        doc="corpus: JSONL, a JSON list (both also .gz or .zst), Parquet or hf://datasets/ORG/NAME[:SPLIT], with our "
        "rows, messages, prompt + completion, ShareGPT, Alpaca, problem + solution or problem + generations "
        "(docs/rows.md)"
    )
    columns: dict[str, str] = option(
        {},
        doc="our key -> the file's key, in `data` and `validation_data`: {problem: question, completion: output}",
        newer=True,
    )
    top_logprobs: str | None = option(
        None,
        doc="folder with a teacher's log-probabilities of every row of `data`, on which `soft` trains; a row is "
        "found by its `id` and `sample`",
        newer=True,
    )
    out: str = option(doc="folder: model/ (Hugging Face layout), metrics.jsonl, summary.json, resume checkpoints")
    push_to_hub: str | None = option(
        None,
        doc="upload the finished model to this hub repository (ORG/NAME), which is private if it is new; null: no "
        "upload",
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.soft is None) != (self.top_logprobs is None):
            raise InputError(
                "set both `soft` (how to train on distributions) and `top_logprobs` (the distributions), or neither"
            )
