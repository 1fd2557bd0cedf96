"""Options of `score`: a model's log-probabilities of answers that somebody has written."""

from dataclasses import dataclass
from typing import ClassVar

from micota_fast.config.checks import at_least
from micota_fast.config.generation import ChatConfig, ServeConfig
from micota_fast.config.loader import option
from micota_fast.errors import InputError

TOP_K = 32
MOST_TOP_K = 128  # up to which the loss's kernels are known to spill no registers
TOP_K_DOC = f"number of likeliest tokens that are kept at each position, at most {MOST_TOP_K}; each takes six bytes"


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
        doc="largest number of requests in flight per server; fewer are sent while they would only wait in its queue",
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
        doc="seconds within which at least one server of `url` must reply; after that reply, servers may be "
        "unreachable for longer",
        source="ours",
        operational=True,
    )
    chat: ChatConfig = option(ChatConfig(), doc="the scoring model's prompt; thoughts must be treated as in training")
    serve: ServeConfig = option(
        ServeConfig(), doc="the server to start if url is null; else a description of the one that already runs"
    )

    def __post_init__(self) -> None:
        at_least(self, concurrency=1, request_timeout_s=0.1, wait_for_server_s=0.1)
        check_top_k(self, "top_k")
        if self.url == []:
            raise InputError("`url` is an empty list; set it to null to start a server for the model")


@dataclass(kw_only=True)
class ScoreConfig(ScoreSettings):
    """`micota score`: completions in, the likeliest tokens at each position of their answers out."""

    completions: str = option(
        doc="completions as `micota generate` and `micota filter` write them: JSONL, a JSON list (both also .gz or "
        ".zst), Parquet or hf://datasets/ORG/NAME[:SPLIT]"
    )
    model: str = option(
        doc="checkpoint (folder or hub name, or CHECKPOINT+ADAPTER of LoRA) that is served and scores the answers, "
        "with its tokenizer and template"
    )
    student: str | None = option(
        None,
        doc="checkpoint that will be trained on the scores, which are stored with the ids of its tokenizer; that "
        "tokenizer must split the answers into the same tokens; null: it is the scoring model's",
    )
    student_chat: ChatConfig = option(
        ChatConfig(), doc="how the rows become the student's training text, as `chat` of `micota train`"
    )
    out: str = option(doc="folder of the scores; an interrupted run leaves OUT.parts, from which the next run resumes")
