"""What can be asked for: every stage's options and the recipe of a whole run, each documented with unit and source.

"MiCoTA" is arXiv 2507.01887 and its repository; "SMLG" is the Small-Model-Learnability-Gap repository, whose scripts
MiCoTA builds on; "ours" marks what both leave open.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from micota_fast.config import option
from micota_fast.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")  # names become folders
MOST_SAMPLES = (1 << 16) - 1  # a sample's number takes 16 bits in the journal of a run
TEACHER_PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


def check_names(where: str, names: Iterable[str]) -> None:
    """Refuse names that would not do as a folder's.

    Raises:
        InputError: naming the first one.
    """
    for name in names:
        if not NAME.fullmatch(name):
            raise InputError(f"`{where}`: {name!r} is no name; letters, digits and . _ + - will do")


def at_least(options: object, **lows: float) -> None:
    """Check that each named option is a number (no NaN or infinity) of at least the given value.

    Raises:
        InputError: one is not.
    """
    for name, low in lows.items():
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= low):
            raise InputError(f"`{name}` must be at least {low}, not {value}")


@dataclass(kw_only=True)
class ChatConfig:
    """How a problem becomes the text that a model sees, in generation and in training alike."""

    system: str | None = option(
        "You are a helpful assistant.", doc="system message; null: none is sent", source="MiCoTA"
    )
    prompt: str = option(TEACHER_PROMPT, doc="user message; `{problem}` is replaced by the problem", source="MiCoTA")
    use_template: bool = option(
        True, doc="render through the checkpoint's chat template; false sends the prompt as bare text", source="ours"
    )

    def __post_init__(self) -> None:
        if "{problem}" not in self.prompt:
            raise InputError("`prompt` must contain {problem}, where the problem's text goes")


@dataclass(kw_only=True)
class ServeConfig:
    """The engine that answers /generate for a checkpoint."""

    engine: Literal["embedded", "sglang"] = option("embedded", doc="our own decoder, or a real SGLang server")
    host: str = option(
        "127.0.0.1", doc="address to bind; anything but loopback opens the server to the network", operational=True
    )
    port: int = option(0, doc="TCP port, of further servers the next ones; 0: free ones", operational=True)
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = option(
        "auto", doc="compute type; auto: the checkpoint's. float64 makes greedy text independent of the batch"
    )
    max_running: int = option(128, doc="sequences decoded at once (embedded engine)", operational=True)
    context_length: int | None = option(None, doc="tokens of prompt and answer together; null: the checkpoint's")
    device: Literal["auto", "cpu", "cuda"] = option("auto", doc="where it runs; auto: CUDA where there is one")
    replicas: int = option(
        1,
        doc="servers started for the model, which share the visible GPUs evenly; requests go to all",
        operational=True,
    )
    tp: int = option(1, doc="GPUs over which SGLang splits the model (tensor parallel)", operational=True)
    dp: int = option(
        1, doc="copies of the model in one SGLang server (data parallel), of tp GPUs each", operational=True
    )
    python: str | None = option(
        None,
        doc="interpreter that has sglang; null: $SGLANG_PYTHON, else this one if sglang imports here",
        operational=True,
    )
    args: list[str] = option([], doc="further arguments for sglang.launch_server, e.g. [--mem-fraction-static, '0.85']")
    startup_timeout_s: float = option(600.0, doc="seconds until /health_generate must answer", operational=True)

    def __post_init__(self) -> None:
        at_least(self, max_running=1, startup_timeout_s=0, replicas=1, tp=1, dp=1)
        if not 0 <= self.port <= 65536 - self.replicas:
            raise InputError(f"`port` must lie between 0 and {65536 - self.replicas}, not {self.port}")
        if self.context_length is not None:
            at_least(self, context_length=2)


@dataclass(kw_only=True)
class SamplingSettings:
    """Sampling, and how the requests are sent."""

    samples: int = option(1, doc="answers per problem", source="MiCoTA: one, greedy")
    temperature: float = option(0.0, doc="0: greedy", source="MiCoTA")
    top_p: float = option(1.0, doc="nucleus; used when temperature > 0")
    top_k: int = option(-1, doc="-1: all tokens; used when temperature > 0")
    max_new_tokens: int = option(16384, doc="longest answer, tokens", source="MiCoTA")
    stop: list[str] = option([], doc="strings that end an answer")
    seed: int = option(0, doc="seed of sampled answers; each (problem, sample) derives its own")
    thinking_budget: int | None = option(
        None,
        doc="tokens after which an answer that has not ended its thought is made to: `thinking_end` is put there, and "
        "the model goes on from it; null: no budget",
        source="budget forcing: s1, arXiv 2501.19393, section 3.1",
    )
    thinking_end: str = option("\n</think>\n\n", doc="what ends a thought; its text without white space is looked for")
    top_logprobs: int = option(
        0, doc="log-probabilities of so many likeliest tokens at each place, kept with the token ids (to distil from)"
    )
    concurrency: int = option(
        1024, doc="most requests in flight a server; fewer while they only queue there", source="ours", operational=True
    )
    request_timeout_s: float = option(
        4 * 3600.0, doc="seconds one try of a request may take, its time in the queue included", operational=True
    )
    url: str | list[str] | None = option(
        None,
        doc="SGLang-compatible servers that already run, one or a list; null: started for the model (see serve)",
        operational=True,
    )
    chat: ChatConfig = option(ChatConfig(), doc="the prompt")
    serve: ServeConfig = option(
        ServeConfig(), doc="the server that answers: started where url is null, described where one runs already"
    )

    def __post_init__(self) -> None:
        at_least(self, samples=1, max_new_tokens=1, concurrency=1, temperature=0, top_logprobs=0, request_timeout_s=0.1)
        if self.thinking_budget is not None:
            at_least(self, thinking_budget=1)
            if not self.thinking_end.strip():
                raise InputError("`thinking_end` must hold the text that ends a thought")
        if not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` must lie above 0 and at most at 1, not {self.top_p}")
        if self.top_k != -1:
            at_least(self, top_k=1)
        if self.samples > MOST_SAMPLES:
            raise InputError(f"`samples` must be at most {MOST_SAMPLES}, not {self.samples}")
        if "" in self.stop:
            raise InputError("`stop` holds an empty string, which would end every answer at once")
        if self.samples > 1 and self.temperature == 0:
            raise InputError("`samples` > 1 needs `temperature` > 0: greedy answers would all be the same")
        if self.url == []:
            raise InputError("`url` is an empty list; null: a server is started for the model")


@dataclass(kw_only=True)
class GenerateSettings(SamplingSettings):
    """How a corpus is sampled."""

    enough: int | None = option(
        None,
        doc="ask for no further answers to a problem once so many are accepted; `samples` is then the most that are "
        "tried; null: always `samples`",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enough is not None:
            at_least(self, enough=1)
            if self.enough > self.samples:
                raise InputError(f"`enough` {self.enough} exceeds `samples` {self.samples}, the most that are tried")


@dataclass(kw_only=True)
class FilterSettings:
    """Which completions enter a corpus."""

    max_tokens: int = option(16000, doc="an answer must be shorter than this, tokens", source="MiCoTA")
    require_correct: bool = option(True, doc="the final answer must equal the problem's", source="MiCoTA")
    require_boxed: bool = option(True, doc="a final \\boxed{} must be there", source="MiCoTA")
    max_foreign: float | None = option(
        None,
        doc="share of an answer's letters that may belong to scripts which its problem does not use; null: any",
        source="ours; MiCoTA has no such rule",
    )
    max_repeated: float | None = option(
        None,
        doc="share of an answer's words that may lie in runs of 16 words which have occurred in it before; null: any",
        source="ours, after Gopher's repetition filters (arXiv 2112.11446, table A1); MiCoTA has no such rule",
    )
    timeout_s: float = option(10.0, doc="limit on comparing one pair of answers, seconds", source="ours")
    workers: int = option(2, doc="grading processes", operational=True)

    def __post_init__(self) -> None:
        at_least(self, max_tokens=1, timeout_s=0.1, workers=1)
        for name in ("max_foreign", "max_repeated"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise InputError(f"`{name}` must be at least 0 and below 1, not {share}")


@dataclass(kw_only=True)
class GenerateConfig(GenerateSettings):
    """`micota generate`: problems in, completions out."""

    model: str = option(doc="checkpoint (folder or hub name): its tokenizer and template, and what is served")
    problems: str = option(doc="JSONL of problems: id, problem, answer")
    out: str = option(doc="JSONL of completions; an interrupted run leaves OUT.parts, from which the next one goes on")
    limit: int | None = option(None, doc="only the first so many problems; null: all")
    accept: FilterSettings | None = option(
        None,
        doc="rules by which answers are judged as they come: the accepted share is shown, and `enough` counts by it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            at_least(self, limit=1)
        if self.enough is not None and self.accept is None:
            raise InputError("`enough` needs `accept`, the rules that say which answers count")

    @property
    def operational(self) -> frozenset[str]:
        """Judged for show alone where nothing is sampled by the verdicts."""
        return frozenset() if self.enough is not None else frozenset({"accept"})


@dataclass(kw_only=True)
class FilterConfig(FilterSettings):
    """`micota filter`: completions in; corpus, rejects and counts out."""

    completions: str = option(doc="JSONL of completions")
    out: str = option(doc="JSONL of accepted rows; OUT.rejects.jsonl and OUT.counts.json are written beside it")


@dataclass(kw_only=True)
class MixConfig:
    """`micota mix`: one corpus of several, in a stated ratio, at most one row a problem."""

    parts: dict[str, int] = option(doc="corpus file -> its share, e.g. {long.jsonl: 1, short.jsonl: 4}")
    out: str = option(doc="JSONL of the mixed corpus")
    seed: int = option(0, doc="which problem is taken from which part")


@dataclass(kw_only=True)
class MeshConfig:
    """How the processes of a training share the model: `replicate` copies, each sharded over `shard` processes."""

    replicate: int = option(1, doc="copies; above 1 as a rule the number of nodes (hybrid sharding)", source="ours")
    shard: int | None = option(None, doc="processes that share a copy; null: all there are / replicate")

    def __post_init__(self) -> None:
        at_least(self, replicate=1)
        if self.shard is not None:
            at_least(self, shard=1)


@dataclass(kw_only=True)
class TrainSettings:
    """How a model is trained."""

    seed: int = option(0, doc="order of the documents, and the weights where init is random")
    epochs: float = option(2.0, doc="passes over the documents", source="MiCoTA")
    max_steps: int | None = option(None, doc="stop after so many optimizer steps; null: as epochs say")
    lr: float = option(1e-5, doc="peak learning rate", source="MiCoTA")
    min_lr_ratio: float = option(0.0, doc="final learning rate as a share of the peak", source="MiCoTA: cosine to 0")
    warmup_ratio: float = option(0.1, doc="share of the steps with a rising learning rate", source="ours")
    weight_decay: float = option(0.0, doc="AdamW's decoupled decay; never on norms and biases", source="ours")
    betas: tuple[float, float] = option((0.9, 0.95), doc="AdamW's averaging", source="ours")
    eps: float = option(1e-8, doc="AdamW's epsilon", source="Loshchilov & Hutter 2019")
    max_grad_norm: float = option(1.0, doc="gradients are scaled down to this L2 norm", source="ours")
    pack_tokens: int = option(16384, doc="tokens in a pack: the length of one forward pass", source="ours")
    packs_per_step: int = option(8, doc="packs in an optimizer step, over all ranks: the global batch", source="ours")
    max_doc_tokens: int | None = option(None, doc="longest document, tokens; null: pack_tokens")
    over_length: Literal["drop", "truncate"] = option("drop", doc="what happens to a longer document", source="ours")
    skip_bad_rows: bool = option(False, doc="set bad rows aside in a rejects file instead of stopping")
    chat: ChatConfig = option(ChatConfig(), doc="how problems are put to the model")
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16", doc="compute type; weights, optimizer and gradient sums stay float32", source="MiCoTA"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", doc="auto: CUDA where there is one")
    attention: Literal["auto", "flash", "varlen", "sdpa"] = option(
        "auto", doc="auto: flash-attn 3 or 2, torch varlen, SDPA"
    )
    mesh: MeshConfig = option(MeshConfig(), doc="how processes share the model", operational=True)
    compile: bool = option(False, doc="torch.compile each block")
    row_filter: float = option(
        0.0, doc="leave tokens of at least 1 - this probability out of the loss's gradients; 0: exact", source="ours"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = option(
        "none",
        doc="what the backward pass computes again: gate and what is cheap (selective), or whole blocks (full)",
        operational=True,
    )
    freeze: list[str] = option(
        [], doc="parameters that stay as they are, by pattern of their names: [model.embed_tokens.*, '*.layers.0.*']"
    )
    validation_data: str | None = option(
        None, doc="JSONL of held-out rows, whose loss is measured during training; null: none is"
    )
    validate_every: int | None = option(None, doc="steps between validations; null: ten a run")
    early_stop: int | None = option(
        None, doc="end after so many validations without a new lowest loss, and keep the weights that had it; null: no"
    )
    max_skipped_steps: int = option(
        5,
        doc="stop after so many steps in a row whose loss or gradient is not finite (they change nothing)",
        operational=True,
    )
    checkpoint_every: int | None = option(
        None, doc="steps between resume checkpoints; null: ten a run", operational=True
    )
    keep_checkpoints: int = option(
        2, doc="newest resume checkpoints that stay, beside the best", source="ours", operational=True
    )
    log_every: int = option(10, doc="steps between progress lines, at which the host waits", operational=True)
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
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"`{name}` must lie between 0 and 1, not {getattr(self, name)}")
        if self.early_stop is not None and self.validation_data is None:
            raise InputError("`early_stop` needs `validation_data`, whose loss it watches")
        if self.max_doc_tokens is not None and self.max_doc_tokens > self.pack_tokens:
            raise InputError(f"`max_doc_tokens` {self.max_doc_tokens} exceeds `pack_tokens` {self.pack_tokens}")


@dataclass(kw_only=True)
class TrainConfig(TrainSettings):
    """`python -m micota_fast.train` (or under torchrun): a checkpoint and a corpus in, a checkpoint out."""

    model: str = option(doc="checkpoint to start from (folder or hub name)")
    data: str = option(doc="JSONL corpus: our rows, OpenAI messages, ShareGPT, Alpaca, or problem + solution")
    out: str = option(doc="folder: model/ (Hugging Face layout), metrics.jsonl, summary.json, resume checkpoints")


def shipped_benchmarks() -> dict[str, dict[str, Any]]:
    """The definitions of benchmarks.yaml, by name."""
    known: dict[str, dict[str, Any]] = yaml.safe_load(
        (Path(__file__).parent / "benchmarks.yaml").read_text(encoding="utf-8")
    )
    return known


def shipped_benchmark(name: str) -> dict[str, Any]:
    """The keys of `BenchmarkConfig` that benchmarks.yaml gives for a benchmark.

    Raises:
        InputError: it is none of those.
    """
    known = shipped_benchmarks()
    if name not in known:
        raise InputError(f"`like` must be one of {', '.join(known)}, not {name!r}")
    return {key: value for key, value in known[name].items() if key != "hub"}


@dataclass(kw_only=True)
class OwnSampling:
    """Sampling of one evaluation set; what is null is as for all of them."""

    samples: int | None = option(None, doc="answers per problem")
    temperature: float | None = option(None, doc="0: greedy")
    top_p: float | None = option(None, doc="nucleus; used when temperature > 0")
    top_k: int | None = option(None, doc="-1: all tokens; used when temperature > 0")
    max_new_tokens: int | None = option(None, doc="longest answer, tokens")


@dataclass(kw_only=True)
class BenchmarkConfig:
    """One evaluation set."""

    like: str | None = option(
        None, doc="a shipped definition (aime2024, amc2023, olympiad, math500, gsm8k): gives whatever is not given here"
    )
    name: str = option("", doc="as it stands in the table; required without `like`")
    path: str = option("", doc="JSONL of problems; required without `like`")
    prompt: str | None = option(None, doc="user message with {problem}; null: that of chat.prompt")
    stop: list[str] = option([], doc="strings that end an answer, beside those of `stop` for all")
    rule: Literal["box", "box_zeros_trimmed", "last_number"] | None = option(
        None, doc="how the `paper` protocol reads and compares the final answer; null: box"
    )
    problems: list[int] = option([], doc="numbers of problems that the file may hold; []: any")
    limit: int | None = option(None, doc="only the first so many problems; null: all")
    sampling: OwnSampling = option(
        OwnSampling(), doc="of this set where it is another than the rest's, e.g. {samples: 16, temperature: 0.6}"
    )

    def __post_init__(self) -> None:
        if self.like is not None:
            for key, value in shipped_benchmark(self.like).items():
                if not getattr(self, key):
                    setattr(self, key, value)
        for key in ("name", "path"):
            if not getattr(self, key):
                raise InputError(f"`{key}` is required where `like` names no shipped definition")
        self.rule = self.rule or "box"
        if self.limit is not None:
            at_least(self, limit=1)

    def check_number(self, number: int, where: str) -> None:
        """Raises InputError where `where` holds another number of problems than this set has."""
        if self.problems and number not in self.problems:
            raise InputError(f"{where} holds {number} problems; {self.name} has {' or '.join(map(str, self.problems))}")


@dataclass(kw_only=True)
class JudgeConfig:
    """A model that is asked about answers which the paper's string rule rejects."""

    model: str = option(doc="checkpoint (folder or hub name); the paper's: Qwen/Qwen2.5-32B-Instruct", source="SMLG")
    url: str | list[str] | None = option(None, doc="servers that already serve it; null: started", operational=True)
    serve: ServeConfig = option(ServeConfig(), doc="the server that is started for it")


@dataclass(kw_only=True)
class EvaluateSettings(SamplingSettings):
    """Greedy answers to every benchmark, graded."""

    protocol: Literal["strict", "paper"] = option(
        "strict",
        doc="whose verdicts count in the table: math-verify's, or the string rules of the paper's evaluation; both are "
        "in the results",
    )
    judge: JudgeConfig | None = option(
        None, doc="a second opinion on what the `paper` rule rejects, as a third accuracy in the results; null: none"
    )
    max_new_tokens: int = option(16000, doc="longest answer, tokens", source="MiCoTA")
    timeout_s: float = option(10.0, doc="limit on comparing one pair of answers, seconds", source="ours")
    workers: int = option(2, doc="grading processes", operational=True)
    benchmarks: list[BenchmarkConfig] = option([], doc="the sets, in the table's order")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, timeout_s=0.1, workers=1)
        for benchmark in self.benchmarks:
            self.of(benchmark)

    def of(self, benchmark: BenchmarkConfig) -> Self:
        """The settings by which this one of the benchmarks is sampled.

        Raises:
            InputError: they are none.
        """
        own = {key: value for key, value in vars(benchmark.sampling).items() if value is not None}
        try:
            return dataclasses.replace(self, benchmarks=[], **own)
        except InputError as error:
            raise InputError(f"sampling of {benchmark.name}: {error}") from None


@dataclass(kw_only=True)
class EvaluateConfig(EvaluateSettings):
    """`micota evaluate`: a checkpoint in, results.json and graded rows out."""

    model: str = option(doc="checkpoint (folder or hub name)")
    out: str = option(doc="folder: results.json, rows/BENCHMARK.jsonl")


@dataclass(kw_only=True)
class MergeConfig:
    """`micota merge`: a mergekit configuration in, a checkpoint out."""

    config: str = option(doc="mergekit YAML file; its model names are folders (relative to it) or hub names")
    out: str = option(doc="folder of the merged checkpoint; it appears whole or not at all")
    seed: int = option(0, doc="seed of DARE's mask")
    weights: list[float] = option(
        [],
        doc="merge once for each of these weights (slerp: t) of the one model, into OUT/weight-W; []: as the file says",
    )


@dataclass(kw_only=True)
class LengthSweepSettings:
    """At which merge weights answers are sampled, and how."""

    weights: list[float] = option(
        [0.2, 0.4, 0.6, 0.8, 1.0],
        doc="of the one model that is merged into its base (slerp: t); each takes the place of the file's own",
        source="ours",
    )
    limit: int | None = option(
        200,
        doc="only the first so many problems; null: all",
        source="ours: the median's 95% interval is then from the 43rd percentile to the 58th",
    )
    generate: SamplingSettings = option(SamplingSettings(), doc="how answers are sampled, and served")
    timeout_s: float = option(10.0, doc="limit on comparing one pair of answers, seconds", source="ours")
    workers: int = option(2, doc="grading processes", operational=True)
    keep_models: bool = option(
        False, doc="keep each weight's model; else it is deleted once its answers are there", operational=True
    )

    def __post_init__(self) -> None:
        at_least(self, timeout_s=0.1, workers=1)
        if self.limit is not None:
            at_least(self, limit=1)
        if len(self.weights) < 2 or len(set(self.weights)) < len(self.weights):
            raise InputError("`weights` must list at least two, all different")
        if self.generate.url is not None:
            raise InputError("`generate.url`: a server that runs already serves one model, and a sweep makes many")


@dataclass(kw_only=True)
class LengthSweepConfig(LengthSweepSettings):
    """`micota length-sweep`: a merge at several weights, how long and how right its answers are at each."""

    config: str = option(doc="mergekit YAML file of one model that is merged into its base")
    problems: str = option(doc="JSONL of problems: id, problem, answer")
    out: str = option(doc="folder: sweep.json, sweep.md, sweep.svg, sweep.png, a folder for each weight")
    seed: int = option(0, doc="seed of DARE's mask")
    target_median_tokens: int | None = option(
        None, doc="make the merge whose answers have this median length, as OUT/model; null: none is made"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_median_tokens is not None:
            at_least(self, target_median_tokens=1)


@dataclass(kw_only=True)
class AlignSettings:
    """How near a corpus lies to an untrained student."""

    pack_tokens: int = option(16384, doc="tokens in one forward pass")
    max_doc_tokens: int | None = option(None, doc="documents above this are left out and counted; null: pack_tokens")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", doc="compute type")
    device: Literal["auto", "cpu", "cuda"] = option("auto", doc="auto: CUDA where there is one")
    attention: Literal["auto", "flash", "varlen", "sdpa"] = option("auto", doc="as in training")
    chat: ChatConfig = option(ChatConfig(), doc="how problems are put to the model")


@dataclass(kw_only=True)
class AlignConfig(AlignSettings):
    """`micota align`: perplexity and length of corpora under a model."""

    model: str = option(doc="the untrained student (folder or hub name)")
    corpora: dict[str, str] = option(doc="name -> JSONL corpus")
    own: str | None = option(None, doc="JSONL of the model's own completions of these problems; null: there are none")
    out: str = option(doc="folder: one NAME.json a corpus")

    def __post_init__(self) -> None:
        if not self.corpora:
            raise InputError("`corpora` names no corpus")
        check_names("corpora", self.corpora)


@dataclass(kw_only=True)
class ContaminationConfig:
    """`micota contamination`: which benchmark problems a training corpus holds."""

    corpora: dict[str, str] = option(doc="name -> JSONL corpus")
    benchmarks: list[BenchmarkConfig] = option(doc="the sets; of each only name, path and limit count")
    out: str = option(doc="folder: contamination.json")

    def __post_init__(self) -> None:
        if not self.corpora or not self.benchmarks:
            raise InputError("`corpora` and `benchmarks` must each name at least one")
        check_names("corpora", self.corpora)


@dataclass(kw_only=True)
class ClaimsConfig:
    """What others have published, to stand beside our figures."""

    source: str = option(doc="where it is published")
    deltas: dict[str, float] = option(doc="arm -> difference of its average to the untouched student's, points")

    def __post_init__(self) -> None:
        for arm, delta in self.deltas.items():
            if not math.isfinite(delta):
                raise InputError(f"`deltas.{arm}` must be a number of points, not {delta}")


@dataclass(kw_only=True)
class ReportConfig:
    """`micota report`: tables, plots and two self-contained pages."""

    title: str = option(doc="heading of the page")
    out: str = option(
        doc="folder: report.html, answers.html, report.json, table.md, table.tex, CSV files, plots/ (SVG and PNG)"
    )
    base: str = option(doc="results.json of the untouched student")
    arms: dict[str, list[str]] = option(doc="arm -> results.json of each seed, in the table's order")
    corpora: dict[str, dict[str, str]] = option({}, doc="corpus -> {counts: FILE, alignment: FILE}")
    trained_on: dict[str, str] = option({}, doc="arm -> its corpus, where that has another name")
    training: dict[str, list[str]] = option({}, doc="arm -> metrics.jsonl of each seed")
    contamination: str | None = option(None, doc="contamination.json of the training corpora; null: not reported")
    claims: ClaimsConfig | None = option(None, doc="published differences, printed beside the measured ones")
    notes: list[str] = option([], doc="paragraphs printed as they stand: what was tried, what is unusual")
    provenance: dict[str, str] = option({}, doc="versions and machine, printed as they stand", operational=True)


@dataclass(kw_only=True)
class ProblemsSpec:
    """A file of training problems."""

    path: str = option(doc="JSONL: id, problem, answer")
    limit: int | None = option(None, doc="only the first so many; null: all")

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least(self, limit=1)


@dataclass(kw_only=True)
class TrainedModel:
    """A model made by fine-tuning another."""

    base: str = option(doc="name under `models`")
    corpus: str = option(doc="name under `corpora`")
    set: dict[str, Any] = option({}, doc="overrides of the recipe's `train` for this model")


@dataclass(kw_only=True)
class MergedModel:
    """A model made by merging; `mergekit` is written to a file as it stands, with names under `models` resolved."""

    mergekit: dict[str, Any] = option(doc="a mergekit configuration whose model names are names under `models`")
    seed: int = option(0, doc="seed of DARE's mask")
    median_tokens: int | None = option(
        None,
        doc="choose the weight, in place of the configuration's own, so that answers have this median length: merge at "
        "several weights, sample and interpolate (see `micota length-sweep`); null: merge as the configuration says",
    )
    problems: str = option("train", doc="name under `problems`, of those answered for `median_tokens`")
    sweep: dict[str, Any] = option(
        {}, doc="options of the length sweep; sampling and grading are the recipe's where it says nothing"
    )

    def __post_init__(self) -> None:
        if self.median_tokens is not None:
            at_least(self, median_tokens=1)
        elif self.sweep:
            raise InputError("`sweep` says how the weight for `median_tokens` is found; give it, too")


@dataclass(kw_only=True)
class ModelSpec:
    """A checkpoint, or how it is made of others."""

    checkpoint: str | None = option(None, doc="folder (relative to the recipe) or hub name")
    train: TrainedModel | None = option(None, doc="fine-tuned from another model")
    merge: MergedModel | None = option(None, doc="merged from other models")
    url: str | list[str] | None = option(
        None, doc="servers that already serve this model, one or a list", operational=True
    )
    serve: dict[str, Any] = option({}, doc="overrides of `generate.serve` and `evaluate.serve` for this model")

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.checkpoint, self.train, self.merge)) != 1:
            raise InputError("exactly one of `checkpoint`, `train`, `merge` says where this model comes from")
        if self.url is not None and self.checkpoint is None:
            raise InputError("`url` goes with `checkpoint`: a model made in the run is served in the run")


@dataclass(kw_only=True)
class GeneratedCorpus:
    """A corpus written by a model and filtered."""

    model: str = option(doc="name under `models`")
    problems: str = option("train", doc="name under `problems`")
    set: dict[str, Any] = option({}, doc="overrides of the recipe's `generate` for this corpus")
    filter: dict[str, Any] = option({}, doc="overrides of the recipe's `filter` for this corpus")


@dataclass(kw_only=True)
class CorpusSpec:
    """Rows to train on, and where they come from."""

    file: str | None = option(None, doc="JSONL that is there already")
    generate: GeneratedCorpus | None = option(None, doc="answers of a model, filtered")
    mix: dict[str, int] | None = option(None, doc="names under `corpora` -> shares")

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.file, self.generate, self.mix)) != 1:
            raise InputError("exactly one of `file`, `generate`, `mix` says where this corpus comes from")


@dataclass(kw_only=True)
class LaunchConfig:
    """How the stages are run on this machine."""

    jobs: int = option(1, doc="stages run at once")
    nproc: int = option(1, doc="processes of a training stage (torchrun --nproc-per-node)")
    threads: int | None = option(None, doc="OMP_NUM_THREADS of a stage; null: as the environment says")

    def __post_init__(self) -> None:
        at_least(self, jobs=1, nproc=1)
        if self.threads is not None:
            at_least(self, threads=1)


@dataclass(kw_only=True)
class Recipe:
    """A whole run: named models and corpora, each made of others, and the arms that are compared."""

    name: str = option(doc="names the run's folder under runs/")
    title: str = option("", doc="heading of the report; empty: the name")
    seeds: list[int] = option([0], doc="each arm is trained once a seed")
    data_dir: str | None = option(
        None, doc="folder that relative problem and corpus files start from; null: the recipe's"
    )
    problems: dict[str, ProblemsSpec] = option({}, doc="name -> training problems")
    models: dict[str, ModelSpec] = option(doc="name -> model")
    corpora: dict[str, CorpusSpec] = option(doc="name -> corpus")
    student: str = option(doc="the model that every arm starts from, name under `models`")
    arms: dict[str, str] = option(doc="arm -> corpus it is trained on, in the table's order")
    align: list[str] = option([], doc="corpora measured under the untrained student, in the plot's order")
    own: str | None = option(
        None, doc="corpus generated by the student: of all its answers, overlap with those in `align` is measured"
    )
    generate: GenerateSettings = option(GenerateSettings(), doc="defaults of every generated corpus")
    filter: FilterSettings = option(FilterSettings(), doc="defaults of every filter")
    train: TrainSettings = option(TrainSettings(), doc="defaults of every training")
    evaluate: EvaluateSettings = option(EvaluateSettings(), doc="evaluation of every arm")
    alignment: AlignSettings = option(AlignSettings(), doc="measurement of corpora under the student")
    launch: LaunchConfig = option(LaunchConfig(), doc="processes and threads")
    claims: ClaimsConfig | None = option(None, doc="published differences, for the report to print beside the measured")
    notes: list[str] = option([], doc="paragraphs for the report")

    def __post_init__(self) -> None:
        def known(name: str, table: dict[str, Any], where: str, kind: str) -> None:
            if name not in table:
                raise InputError(f"`{where}` names the {kind} {name!r}; known: {', '.join(table) or 'none'}")

        check_names("name", [self.name])
        for table in ("problems", "models", "corpora", "arms"):
            check_names(table, getattr(self, table))
        for part in ("generate", "evaluate"):
            if getattr(self, part).url is not None:
                raise InputError(f"`{part}.url` would serve every model; give it to one: models.NAME.url")
        known(self.student, self.models, "student", "model")
        for name, model in self.models.items():
            if model.train is not None:
                known(model.train.base, self.models, f"models.{name}.train.base", "model")
                known(model.train.corpus, self.corpora, f"models.{name}.train.corpus", "corpus")
            if model.merge is not None and model.merge.median_tokens is not None:
                known(model.merge.problems, self.problems, f"models.{name}.merge.problems", "problem set")
        for name, corpus in self.corpora.items():
            if corpus.generate is not None:
                known(corpus.generate.model, self.models, f"corpora.{name}.generate.model", "model")
                known(corpus.generate.problems, self.problems, f"corpora.{name}.generate.problems", "problem set")
            for part in corpus.mix or {}:
                known(part, self.corpora, f"corpora.{name}.mix", "corpus")
        for arm, corpus_name in self.arms.items():
            known(corpus_name, self.corpora, f"arms.{arm}", "corpus")
        for arm in self.claims.deltas if self.claims is not None else ():
            known(arm, self.arms, "claims.deltas", "arm")
        for corpus_name in self.align:
            known(corpus_name, self.corpora, "align", "corpus")
        if self.own is not None:
            known(self.own, self.corpora, "own", "corpus")
            by = self.corpora[self.own].generate
            if by is None or by.model != self.student:
                raise InputError(f"`own` names the corpus {self.own!r}, which is not generated by {self.student!r}")
        if not self.evaluate.benchmarks:
            raise InputError("`evaluate.benchmarks` must list at least one benchmark")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError("`seeds` must be a list of different numbers, at least one")
