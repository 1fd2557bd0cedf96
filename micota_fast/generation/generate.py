"""`micota generate`: completions from servers, concurrent and resumable, each answer exactly once.

Speaks only HTTP, so any engine can answer that has SGLang's native /generate or OpenAI's chat completions. Every row is
written to OUT.parts as it arrives (see `journal`), and a run that was killed resumes from there.

Whether the finished OUT has the same bytes as an uninterrupted run's depends on the server. The embedded engine in
float64 gives the same bytes. In lower precision, and on SGLang even when greedy, near-ties between tokens are decided
by the batch that a request happens to share; --enable-deterministic-inference removes that as well, and without it
SGLang ignores sampling seeds (`sglang.seeded` asks for it where it is available).
"""

import asyncio
import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from micota_fast.chat.template import chat_identity
from micota_fast.common.files import write_atomic
from micota_fast.common.fingerprint import Fingerprints, differences
from micota_fast.common.json_io import as_read_back, parse_json, read_json, write_json
from micota_fast.common.records import store_file
from micota_fast.config import loader
from micota_fast.config.evaluation import EvaluateConfig
from micota_fast.config.generation import ChatConfig, GenerateConfig, OpenAIConfig
from micota_fast.corpus.rules import REASONS, Judge
from micota_fast.errors import InputError
from micota_fast.generation.answer_store import check_no_store, check_store, without_scores, write_store
from micota_fast.generation.api import Api
from micota_fast.generation.client import ACCEPTED, Client
from micota_fast.generation.journal import Journal
from micota_fast.generation.model_identity import model_identity
from micota_fast.generation.openai_api import OpenAIApi
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.generation.request import sampling_params
from micota_fast.generation.servers import named_urls, servers_for
from micota_fast.generation.sglang_api import SGLangApi
from micota_fast.grading.gold import check_golds
from micota_fast.model.folder import resolve_model
from micota_fast.sources.top_logprobs import FORMAT


def run(config: GenerateConfig) -> None:
    """Answer all problems of a file. A finished output with the same fingerprint is left as it is.

    Raises:
        InputError: bad input, no gold answer that `accept` could compare, an output that belongs to another run, a
            request that a server refuses, or no server answers any more (what was generated until then is kept).
    """
    named_urls(config)
    graded = config.accept is not None and config.accept.require_correct
    generation = Generation(
        config.problems, config, config.out, config.limit, None, config.columns, config.slice, need_answers=graded
    )
    if generation.is_finished():
        generation.clear_up()
        print(f"{config.out}: done already")
        return
    if graded:
        check_golds(((problem.id, problem.answer) for problem in generation.problems), config.problems)
    with servers_for(config, f"{config.out}.server.log") as urls:
        meta = generation.run(urls)
    print(f"{config.out}: {meta['completions']} completions")


class Generation:
    """One model's answers to the problems of one file, at one place.

    Next to OUT stand OUT.meta.json (fingerprint, counts, tokens), OUT.meters.json (what depends on the clock), with
    `top_logprobs` the store OUT.top_logprobs, and while a run lasts OUT.parts, the journal from which an interrupted
    run is resumed.

    Args:
        problems: a file of problems (see `ProblemFile`), with unique ids.
        config: sampling, prompt and limits; `config.model` is the checkpoint whose tokenizer and template make the
            prompts.
        out: JSONL of `Completion`, in the problems' order.
        limit: only the first `limit` problems; None: all.
        hashes: of the files read so far, shared by generations of one model so that its weights are hashed once.
        columns: our key -> the file's.
        part: of the problems, as `ProblemFile` takes it.
        need_answers: whether each problem must have `answer`, because something grades.

    Attributes:
        problems: the opened file. Its index is kept in OUT.parts, so that resuming does not check all rows again.

    Raises:
        InputError: see `ProblemFile`.
    """

    def __init__(
        self,
        problems: str | Path,
        config: GenerateConfig | EvaluateConfig,
        out: str | Path,
        limit: int | None = None,
        hashes: Fingerprints | None = None,
        columns: Mapping[str, str] | None = None,
        part: tuple[int, int] | None = None,
        *,
        need_answers: bool = True,
    ) -> None:
        self.out = Path(out)
        self._config, self._part = config, part
        self._parts, self._meta_path = Path(f"{out}.parts"), Path(f"{out}.meta.json")
        self._store = Path(store_file(out))
        self._hashes = hashes or Fingerprints(None)
        if not self.out.exists():
            with contextlib.suppress(OSError):  # whoever writes there will report it
                self._parts.mkdir(parents=True, exist_ok=True)
        try:
            cache = self._parts / "problems.index" if self._parts.is_dir() else None
            self.problems = ProblemFile(problems, limit, cache, columns, part, need_answers=need_answers)
        except InputError:
            with contextlib.suppress(OSError):  # it is not there, or holds what an earlier run has left
                self._parts.rmdir()
            raise

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the completions depend on, and nothing else: neither URLs nor concurrency.

        `serve` is included as in the pipeline's identity, even where a URL is given: it then describes what the server
        there is meant to run with, so a run may move from one to the other.
        """
        config = self._config
        known = model_identity(config, self._hashes)
        made_by: dict[str, Any] = {
            "model": known.pop("model"),
            "problems": self.problems.sha256,
            "prompt": _prompt_identity(config.chat),
            "samples": config.samples,
            "seed": config.seed if config.temperature > 0 else None,
            "sampling": sampling_params(config),
            **known,
        }
        if self._part is not None:
            made_by["slice"] = self._part
        if config.thinking_budget is not None:
            made_by["thinking"] = {"budget": config.thinking_budget, "end": config.thinking_end}
        if config.top_logprobs:
            made_by["top_logprobs"] = {"top_k": config.top_logprobs, "format": FORMAT}
        if isinstance(config, GenerateConfig) and config.stop_after_accepted is not None:
            # The key is the option's former name: runs made under it stay finished.
            made_by["enough"] = {"accepted": config.stop_after_accepted, "rules": loader.identity(config.accept)}
        return made_by

    def is_finished(self) -> bool:
        """Return whether OUT is complete, unchanged since its writing (sha256, rows), and the answer to this request.

        Raises:
            InputError: a file is there that belongs to another request, or to an unknown one.
        """
        resumes = (self._parts / "manifest.json").exists()
        if not self.out.exists():
            if self._config.top_logprobs and not resumes:
                check_no_store(self._store, self.out)
            return False
        if not self._meta_path.exists():
            if resumes:
                return False  # killed between writing the two
            raise InputError(f"{self.out} exists and was not written by generate; delete it or write elsewhere")
        try:
            meta = read_json(self._meta_path)
            theirs, content = dict(meta["fingerprint"]), (meta["sha256"], meta["completions"])
        except (InputError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._meta_path} is damaged ({error!r}); delete it and {self.out}, or write elsewhere"
            ) from None
        differing = ", ".join(sorted(differences(theirs, as_read_back(self.fingerprint))))
        if not differing:
            whole = bool(_content(self.out) == content)
            if whole and self._config.top_logprobs:
                check_store(self._store, self.out, self._store_made_by(content[0]))
            elif self._config.top_logprobs and not resumes:
                check_no_store(self._store, self.out)
            return whole
        raise InputError(
            f"{self.out} belongs to another run (it differs in: {differing}); delete it or write elsewhere"
        )

    def run(self, urls: Sequence[str]) -> dict[str, Any]:
        """Answer each problem and write the completions; resumes what an interrupted run has left.

        Calls `asyncio.run`, so it must not be called from a running event loop.

        Args:
            urls: of the servers, without a slash at the end; none are needed if nothing is left to ask.

        Returns:
            The contents of OUT.meta.json.

        Raises:
            InputError: see the verb's `run`.
        """
        if self.is_finished():
            self.clear_up()
            meta: dict[str, Any] = read_json(self._meta_path)
            return meta
        if self.out.exists() and not (self._parts / "manifest.json").exists():
            aside = self.out.with_name(f"{self.out.name}.damaged")
            print(
                f"{self.out} was cut off or changed; it is kept as {aside.name} and generated again",
                file=sys.stderr,
                flush=True,
            )
            self.out.replace(aside)
        with Journal(self._parts, self.fingerprint) as journal:
            self._complete(urls, journal)
            entries = journal.entries
            order = np.lexsort((entries["sample"], entries["problem"]))
            summary, top_k = _Summary(), self._config.top_logprobs
            rows = map(without_scores, journal.rows(order)) if top_k else journal.rows(order)
            write_atomic(self.out, map(summary.take, rows))
            meta = {"fingerprint": self.fingerprint, **summary.counts()}
            if top_k:
                write_store(self._store, top_k, self._store_made_by(meta["sha256"]), journal.rows(order))
            if "enough" in self.fingerprint:  # every answer is judged then
                meta["judged"] = _judged(entries["verdict"])
            write_json(self._meta_path, meta, 2)
            journal.discard()
        if self._config.api == "openai":
            print(f"{self.out}: {_usage(meta, self._config.openai)}", flush=True)
        return meta

    def _store_made_by(self, sha256: str) -> dict[str, Any]:
        """What a store is of: these very answers, as others of the same request may have other tokens."""
        return {**self.fingerprint, "completions": sha256}

    def clear_up(self) -> None:
        """Remove the journal that a run killed between its last file and its end has left next to a finished OUT."""
        if self._parts.exists():
            Journal(self._parts, self.fingerprint).discard()

    def _complete(self, urls: Sequence[str], journal: Journal) -> None:
        """Ask for what the journal lacks."""
        config = self._config
        enough = rules = None
        if isinstance(config, GenerateConfig):
            enough, rules = config.stop_after_accepted, config.accept
        if enough is None and len(journal) == len(self.problems) * config.samples:
            return
        with Judge(rules) if rules is not None else contextlib.nullcontext() as judge:
            api: Api
            if config.api == "openai":
                api = OpenAIApi(self.problems, config, config.model)
            else:
                api = SGLangApi(self.problems, config, config.model, resolve_model(config.model)[0])
            client = Client(self.problems, config, api, urls, journal, judge, enough)
            try:
                asyncio.run(client.run())
            finally:
                with contextlib.suppress(InputError):  # a full disk: the error under way says more
                    write_json(Path(f"{self.out}.meters.json"), client.summary(), 2)


def _prompt_identity(chat: ChatConfig) -> dict[str, Any]:
    """What prompts depend on; the treatment of thoughts in training text is not part of it."""
    return {key: value for key, value in chat_identity(chat).items() if not key.startswith("thinking")}


def _usage(meta: dict[str, Any], config: OpenAIConfig) -> str:
    """What an API has counted for the answers that are kept, and what that costs."""
    prompt, completion = meta["prompt_tokens"], meta["completion_tokens"]
    used = f"{prompt:,} prompt tokens and {completion:,} completion tokens"
    if (dollars := config.dollars(prompt, completion)) is None:
        return used
    return (
        f"{used}: ${dollars:,.2f} at ${config.dollars_per_million_prompt_tokens:g} and "
        f"${config.dollars_per_million_completion_tokens:g} per million, without failed tries and discounts"
    )


class _Summary:
    """sha256, rows and tokens of a file as its lines pass by."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._rows = self._prompt_tokens = self._problems = 0
        self._last_problem: str | None = None
        self._reasons: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def take(self, line: bytes) -> bytes:
        row = parse_json(line, "a row of the journal")
        self._digest.update(line)
        self._rows += 1
        self._prompt_tokens += row["prompt_tokens"]
        self._problems += row["id"] != self._last_problem  # lines come problem by problem
        self._last_problem = row["id"]
        self._reasons[row["finish_reason"]] += 1
        self._tokens[row["finish_reason"]] += row["completion_tokens"]
        return line

    def counts(self) -> dict[str, Any]:
        reasons = sorted(self._reasons)
        return {
            "sha256": self._digest.hexdigest(),
            "completions": self._rows,
            "problems": self._problems,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": sum(self._tokens.values()),
            "by_finish_reason": {
                r: {"completions": self._reasons[r], "completion_tokens": self._tokens[r]} for r in reasons
            },
        }


def _judged(verdicts: Any) -> dict[str, Any]:
    """Accepted and rejected answers by reason."""
    numbers = np.bincount(verdicts, minlength=ACCEPTED + 1 + len(REASONS)).tolist()
    rejected = {reason: number for reason, number in zip(REASONS, numbers[ACCEPTED + 1 :], strict=True) if number}
    return {"accepted": numbers[ACCEPTED], "rejected": rejected}


def _content(path: Path) -> tuple[str, int]:
    """sha256 and number of lines of a file."""
    digest, lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            lines += block.count(b"\n")
    return digest.hexdigest(), lines
