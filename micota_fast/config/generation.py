"""Options of generation: the prompt, the server, sampling and the verb `generate`.

"MiCoTA" is arXiv 2507.01887 and its repository; "SMLG" is the Small-Model-Learnability-Gap repository, whose scripts
MiCoTA builds on; "ours" marks what both leave open.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from micota_fast.common.json_io import encode_json
from micota_fast.config.checks import at_least
from micota_fast.config.corpus import FilterSettings
from micota_fast.config.loader import option
from micota_fast.errors import InputError

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")  # of the environment; lower case is left to keys given by mistake
MOST_SAMPLES = (1 << 16) - 1  # a sample's number takes 16 bits in the journal of a run
PROBLEMS = (
    "problems: JSONL, a JSON list (both also .gz or .zst), Parquet or hf://datasets/ORG/NAME[:SPLIT], with keys "
    "problem, answer (only needed for grading) and id (derived from the problem's text if absent)"
)
COLUMNS = "our key -> the file's key, e.g. {problem: question, answer: expected_answer}"
TEACHER_PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(kw_only=True)
class ChatConfig:
    """How a problem becomes the text that a model sees, in generation and in training."""

    system: str | None = option("You are a helpful assistant.", doc="system message; null: none", source="MiCoTA")
    prompt: str = option(TEACHER_PROMPT, doc="user message; `{problem}` is replaced by the problem", source="MiCoTA")
    use_template: bool = option(
        True, doc="render through the checkpoint's chat template; false sends the prompt as bare text", source="ours"
    )
    template: str | None = option(
        None,
        doc="chat template in place of the checkpoint's own: a Jinja file, or the folder of a checkpoint that has one; "
        "a model trained with it is saved with it",
        source="ours",
        newer=True,
    )
    template_kwargs: dict[str, Any] = option(
        {},
        doc="further variables of the template, e.g. {enable_thinking: false} for Qwen3; a row's own "
        "`chat_template_kwargs` take precedence",
        source="ours",
        newer=True,
    )
    thinking: Literal["keep", "strip", "wrap"] = option(
        "keep",
        doc="treatment of a reasoning model's thought in training text: keep (in one pair of <think> tags; the "
        "opening tag is restored if the prompt contained it), strip (keep only the answer), wrap (in "
        "`thinking_tags`)",
        source="ours",
        newer=True,
    )
    thinking_tags: tuple[str, str] = option(
        ("<think>", "</think>"), doc="opening and closing tag of `thinking: wrap`", newer=True
    )

    def __post_init__(self) -> None:
        if not all(tag.strip() for tag in self.thinking_tags):
            raise InputError("`thinking_tags` must be two texts that are not blank")
        if self.thinking_tags[0].strip() == self.thinking_tags[1].strip():
            raise InputError("`thinking_tags` must differ, or the end of a thought could not be found")
        try:
            encode_json(self.template_kwargs)
        except InputError as error:
            raise InputError(f"`template_kwargs` {error}") from None
        if ours := {"messages", "add_generation_prompt"} & self.template_kwargs.keys():
            raise InputError(
                f"`template_kwargs`: {', '.join(sorted(ours))} cannot be set: each conversation supplies its own"
            )
        if not self.use_template and (self.template is not None or self.template_kwargs):
            raise InputError("`template` and `template_kwargs` need `use_template: true`")
        if "{problem}" not in self.prompt:
            raise InputError("`prompt` must contain {problem}, which the problem's text replaces")


@dataclass(kw_only=True)
class ServeConfig:
    """The engine that answers /generate for a checkpoint."""

    engine: Literal["embedded", "sglang"] = option("embedded", doc="our own decoder, or a real SGLang server")
    host: str = option(
        "127.0.0.1", doc="address to bind; anything but loopback opens the server to the network", operational=True
    )
    allow_hosts: list[str] = option(
        [],
        doc="further names by which clients may call the embedded engine, such as a proxy's; requests with any other "
        "Host or Origin are refused, so that no web page can send them",
        operational=True,
    )
    served_model_name: str | None = option(
        None, doc="name that clients use for the model; null: `model` as it is given", operational=True
    )
    port: int = option(0, doc="TCP port; further servers take the next ones; 0: free ports", operational=True)
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = option(
        "auto", doc="compute type; auto: the checkpoint's. float64 makes greedy text independent of the batch"
    )
    max_running: int = option(128, doc="sequences decoded at once (embedded engine)", operational=True)
    context_length: int | None = option(None, doc="tokens of prompt and answer together; null: the checkpoint's")
    device: Literal["auto", "cpu", "cuda"] = option("auto", doc="where it runs; auto: CUDA if there is a device")
    replicas: int = option(
        1,
        doc="servers started for the model; they share the visible GPUs evenly, and requests go to all",
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
    startup_timeout_s: float = option(
        600.0, doc="seconds after the start within which /health_generate must answer", operational=True
    )

    def __post_init__(self) -> None:
        at_least(self, max_running=1, startup_timeout_s=0, replicas=1, tp=1, dp=1)
        if not 0 <= self.port <= 65536 - self.replicas:
            raise InputError(f"`port` must lie between 0 and {65536 - self.replicas}, not {self.port}")
        if self.context_length is not None:
            at_least(self, context_length=2)


@dataclass(kw_only=True)
class OpenAIConfig:
    """How servers with OpenAI's API are used; no option here changes the prompts or the sampling."""

    key_env: str | None = option(
        None,
        doc="name of the environment variable that holds the API key; the key is sent to `url` as a bearer token and "
        "is never written anywhere; null: no key",
    )
    stream: bool = option(
        True,
        doc="receive answers as they are generated, so that proxies do not cut the connection during a long answer; "
        "false: for servers whose streams do not report their token counts",
        source="ours",
    )
    requests_per_minute: float | None = option(None, doc="largest number of requests per minute; null: no limit")
    tokens_per_minute: float | None = option(
        None, doc="largest number of prompt and answer tokens per minute; null: no limit"
    )
    dollars_per_million_prompt_tokens: float | None = option(None, doc="price for the reported cost; null: unknown")
    dollars_per_million_completion_tokens: float | None = option(
        None, doc="price for the reported cost; set both prices or neither"
    )

    def __post_init__(self) -> None:
        if self.key_env is not None and not VARIABLE.fullmatch(self.key_env):
            raise InputError(
                "`key_env` must be the name of an environment variable, such as OPENAI_API_KEY, and never the key "
                "itself (what was given is not repeated here)"
            )
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None:
                at_least(self, **{name: 0.001})
        prices = ("dollars_per_million_prompt_tokens", "dollars_per_million_completion_tokens")
        given = [name for name in prices if getattr(self, name) is not None]
        at_least(self, **dict.fromkeys(given, 0.0))
        if len(given) == 1:
            raise InputError(f"`{given[0]}` goes with `{next(name for name in prices if name not in given)}`: set both")

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Return what these tokens cost, as if none of the prompts' were cached; None: no prices are given."""
        prompt, completion = self.dollars_per_million_prompt_tokens, self.dollars_per_million_completion_tokens
        if prompt is None or completion is None:
            return None
        return (prompt * prompt_tokens + completion * completion_tokens) / 1e6


def check_api(options: "SamplingSettings") -> None:
    """Refuse, by name, what OpenAI's API cannot be asked for.

    Raises:
        InputError: `api` is openai, and an option needs SGLang's native API.
    """
    refused = {
        "thinking_budget": (options.thinking_budget is not None, "an answer cannot be continued by its token ids"),
        "top_logprobs": (options.top_logprobs > 0, "it gives no token ids"),
        "chat.use_template: false": (not options.chat.use_template, "the server renders every prompt by its template"),
        "chat.template": (options.chat.template is not None, "the server renders every prompt by its own template"),
    }
    for name, (asked, why) in refused.items():
        if asked:
            raise InputError(f"`{name}` needs SGLang's native API; with `api: openai` {why}")


def check_scores(options: "SamplingSettings") -> None:
    """Refuse `top_logprobs` with options under which they would not be those of the answer's text.

    Raises:
        InputError: naming the option.
    """
    if options.temperature not in (0, 1):
        raise InputError(
            f"`top_logprobs` with `temperature` {options.temperature}: servers return log-probabilities at the "
            "sampling temperature, but training needs those at temperature 1; set it to 0 or 1, or leave "
            "`top_logprobs` out and `micota score` the answers"
        )
    if options.stop:
        raise InputError(
            "`top_logprobs` with `stop`: servers return the text without the stop string, but the tokens with it; "
            "leave `top_logprobs` out and `micota score` the answers"
        )


def check_url(options: Any) -> None:
    """Refuse `api: openai` without `url`: servers that are started are asked by SGLang's native API.

    Raises:
        InputError: see above.
    """
    if options.api == "openai" and options.url is None:
        raise InputError(
            "`api: openai` needs `url` (in a recipe: `models.NAME.url`), the address of the server up to /v1"
        )


@dataclass(kw_only=True)
class SamplingSettings:
    """Sampling, and how the requests are sent."""

    samples: int = option(1, doc="answers per problem", source="MiCoTA: one, greedy")
    temperature: float = option(0.0, doc="0: greedy", source="MiCoTA")
    top_p: float = option(1.0, doc="nucleus sampling; used if temperature > 0")
    top_k: int = option(-1, doc="sample from the K likeliest tokens; -1: from all; used if temperature > 0")
    max_new_tokens: int = option(16384, doc="longest answer, in tokens", source="MiCoTA")
    stop: list[str] = option([], doc="strings that end an answer")
    seed: int = option(0, doc="seed of sampled answers; each (problem, sample) derives its own")
    thinking_budget: int | None = option(
        None,
        doc="tokens after which an unfinished thought is ended: `thinking_end` is inserted, and the model continues "
        "from there; null: no budget",
        source="budget forcing: s1, arXiv 2501.19393, section 3.1",
    )
    thinking_end: str = option("\n</think>\n\n", doc="text that ends a thought; white space around it need not match")
    top_logprobs: int = option(
        0,
        doc="write OUT.top_logprobs, from which `micota train` can train: the N likeliest tokens at each position of "
        "the answers, with their log-probabilities; needs `temperature` 0 or 1; 0: none. Only of "
        "`micota generate`",
    )
    concurrency: int = option(
        1024,
        doc="largest number of requests in flight per server; fewer are sent while they would only wait in its queue",
        source="ours",
        operational=True,
    )
    request_timeout_s: float = option(
        4 * 3600.0, doc="seconds that one try of a request may take, including time in the queue", operational=True
    )
    url: str | list[str] | None = option(
        None,
        doc="servers that already run, one or a list; null: servers are started (see serve)",
        operational=True,
    )
    api: Literal["sglang", "openai"] = option(
        "sglang",
        doc="API of the servers at `url`: SGLang's native /generate, or OpenAI's chat completions (vLLM, TGI, "
        "llama.cpp, SGLang's /v1, paid APIs). With openai, `model` is only a name, `url` ends in /v1 or similar, and "
        "`thinking_budget`, `top_logprobs` and `chat.use_template: false` are not available",
        newer=True,
    )
    openai: OpenAIConfig = option(OpenAIConfig(), doc="settings of the servers if `api` is openai", operational=True)
    wait_for_server_s: float = option(
        30.0,
        doc="seconds within which at least one server of `url` must reply; after that reply, servers may be "
        "unreachable for longer",
        source="ours",
        operational=True,
    )
    chat: ChatConfig = option(ChatConfig(), doc="the prompt")
    serve: ServeConfig = option(
        ServeConfig(), doc="the server to start if url is null; else a description of the one that already runs"
    )

    def __post_init__(self) -> None:
        at_least(self, samples=1, max_new_tokens=1, concurrency=1, temperature=0, top_logprobs=0)
        at_least(self, request_timeout_s=0.1, wait_for_server_s=0.1)
        if self.thinking_budget is not None:
            at_least(self, thinking_budget=1)
            if not self.thinking_end.strip():
                raise InputError("`thinking_end` must contain the text that ends a thought")
        if not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` must lie above 0 and at most at 1, not {self.top_p}")
        if self.top_k != -1:
            at_least(self, top_k=1)
        if self.samples > MOST_SAMPLES:
            raise InputError(f"`samples` must be at most {MOST_SAMPLES}, not {self.samples}")
        if "" in self.stop:
            raise InputError("`stop` contains an empty string, which would end every answer at once")
        if self.samples > 1 and self.temperature == 0:
            raise InputError("`samples` > 1 needs `temperature` > 0: greedy answers would all be the same")
        if self.url == []:
            raise InputError("`url` is an empty list; set it to null to start a server for the model")
        if self.api == "openai":
            check_api(self)
        if self.top_logprobs:
            check_scores(self)


@dataclass(kw_only=True)
class GenerateSettings(SamplingSettings):
    """How a corpus is sampled."""

    stop_after_accepted: int | None = option(
        None,
        doc="stop sampling a problem when N answers to it are accepted; `samples` is then the largest number of "
        "tries; null: always `samples`",
        alias="enough",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_after_accepted is not None:
            at_least(self, stop_after_accepted=1)
            if self.stop_after_accepted > self.samples:
                raise InputError(
                    f"`stop_after_accepted` {self.stop_after_accepted} exceeds `samples` {self.samples}, the largest "
                    "number of tries"
                )


@dataclass(kw_only=True)
class GenerateConfig(GenerateSettings):
    """`micota generate`: problems in, completions out."""

    model: str = option(
        doc="checkpoint (folder or hub name, or CHECKPOINT+ADAPTER of LoRA) that is served, with its tokenizer and "
        "template; with `api: openai`, only the server's name for the model"
    )
    problems: str = option(doc=PROBLEMS)
    columns: dict[str, str] = option({}, doc=COLUMNS, source="ours", newer=True)
    out: str = option(doc="JSONL of completions; an interrupted run leaves OUT.parts, from which the next run resumes")
    limit: int | None = option(None, doc="only the first N problems; null: all")
    slice: tuple[int, int] | None = option(
        None,
        doc="[START, COUNT]: only COUNT of these problems, starting at number START (0: the first); the first "
        "problem follows the last; each at most once; null: all",
        newer=True,
    )
    accept: FilterSettings | None = option(
        None,
        doc="rules that judge answers as they arrive; the reported share of accepted answers and "
        "`stop_after_accepted` use them",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            at_least(self, limit=1)
        if self.slice is not None and not (self.slice[0] >= 0 and self.slice[1] >= 1):
            raise InputError(
                "`slice` must be [START, COUNT] with START of at least 0 and COUNT of at least 1, not "
                f"{list(self.slice)}"
            )
        check_url(self)
        if self.stop_after_accepted is not None and self.accept is None:
            raise InputError("`stop_after_accepted` needs `accept`, the rules that say which answers count")

    @property
    def operational(self) -> frozenset[str]:
        """The options that cannot change the answers: `accept` only counts them unless sampling stops by it."""
        return frozenset() if self.stop_after_accepted is not None else frozenset({"accept"})
