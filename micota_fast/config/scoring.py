"""Options of `score`: a model's log-probabilities of answers that somebody has written."""

from dataclasses import dataclass
from typing import ClassVar

from micota_fast.config.checks import at_least
from micota_fast.config.generation import ChatConfig, ServeConfig
from micota_fast.config.loader import option
from micota_fast.errors import InputError

TOP_K = 32
MOST_TOP_K = 128  # up to which the loss's kernels are known to spill no registers
TOP_K_DOC = f"likeliest tokens that are kept at each position, at most {MOST_TOP_K}; each takes six bytes"


def check_top_k(options: object, name: str) -> None:
    """Check that an option is a number of tokens that the loss can take at each position.

    Raises:
        InputError: it is not.
    """
    at_least(options, **{name: 1})
    if (value := getattr(options, name)) > MOST_TOP_K:
        raise InputError(f"`{name}` must be at most {MOST_TOP_K}, not {value}")


@dataclass(kw_only=True)
class ScoreSettings:
    """What is asked of the scoring model, and how the requests are sent."""

    api: ClassVar = "sglang"  # OpenAI's gives no log-probabilities of a text's own tokens by their ids
    top_k: int = option(TOP_K, doc=TOP_K_DOC, source="ours")
    concurrency: int = option(
        64,
        doc="most requests in flight per server; fewer while they only queue there",
        source="ours",
        operational=True,
    )
    request_timeout_s: float = option(
        3600.0, doc="seconds that one try of a request may take, including time in the queue", operational=True
    )
    url: str | list[str] | None = option(
        None,
        doc="servers that already run, one or a list, with SGLang's native API; null: servers are started (see serve)",
        operational=True,
    )
    wait_for_server_s: float = option(
        30.0,
        doc="seconds in which the first server that `url` names must reply; once one has, they may be gone for longer",
        source="ours",
        operational=True,
    )
    chat: ChatConfig = option(
        ChatConfig(), doc="how problems are put to the scoring model; what becomes of thoughts must be as in training"
    )
    serve: ServeConfig = option(
        ServeConfig(), doc="the server: started if url is null, else a description of the one that runs"
    )

    def __post_init__(self) -> None:
        at_least(self, concurrency=1, request_timeout_s=0.1, wait_for_server_s=0.1)
        check_top_k(self, "top_k")
        if self.url == []:
            raise InputError("`url` is an empty list; null: a server is started for the model")


@dataclass(kw_only=True)
class ScoreConfig(ScoreSettings):
    """`micota score`: completions in, the likeliest tokens at each position of their answers out."""

    completions: str = option(
        doc="completions as `micota generate` and `micota filter` write them: JSONL, a JSON list (both also .gz or "
        ".zst), Parquet or hf://datasets/ORG/NAME[:SPLIT]"
    )
    model: str = option(
        doc="checkpoint (folder or hub name, or CHECKPOINT+ADAPTER of LoRA) that scores: its tokenizer and template, "
        "and what is served"
    )
    student: str | None = option(
        None,
        doc="checkpoint that will be trained on the scores: they get the ids of its tokenizer, which must cut the "
        "answers into the same tokens; null: it has the scoring model's own",
    )
    student_chat: ChatConfig = option(
        ChatConfig(), doc="how the rows become the student's training text, as `chat` of `micota train`"
    )
    out: str = option(doc="folder of the scores; an interrupted run leaves OUT.parts, from which the next run resumes")
