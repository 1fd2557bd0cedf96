"""Completions from SGLang-compatible servers: concurrent, resumable, nothing lost, nothing twice.

Speaks HTTP alone (SGLang's native /generate with `input_ids`), so it does not matter which engine answers. Every row is
written to OUT.parts as it comes (see `journal`); a run that was killed goes on from there.

Whether the finished OUT then has the same bytes as an uninterrupted run's is the server's doing. The embedded engine in
float64 gives them. In lower precision, and on SGLang also when greedy, near-ties between tokens fall one way or the
other with the batch that a request happens to share; --enable-deterministic-inference removes that, too, and without it
SGLang ignores sampling seeds (`sglang.seeded` asks for it where it can be had).
"""

import asyncio
import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from micota_fast.common.files import write_atomic
from micota_fast.common.fingerprint import Fingerprints
from micota_fast.config import loader
from micota_fast.config.evaluation import EvaluateConfig
from micota_fast.config.generation import GenerateConfig
from micota_fast.corpus.rules import REASONS, Judge
from micota_fast.errors import InputError
from micota_fast.generation.client import ACCEPTED, Client
from micota_fast.generation.journal import Journal
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.generation.request import sampling_params
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.serve import sglang
from micota_fast.serve.serve import serving

Config = GenerateConfig | EvaluateConfig
_CONTENTS = Fingerprints(None)  # an evaluation asks for its model's fingerprint several times a benchmark


def run(config: GenerateConfig) -> None:
    """`micota generate`: answer all problems of a file. A finished output with the same fingerprint is left as it is.

    Raises:
        InputError: bad input, an output that belongs to another run, a request the server refuses, or a server that
            does not answer any more (what was generated until then is kept).
    """
    named_urls(config)
    problems = open_problems(config.problems, config.limit, config.out)
    if finished(problems, config, config.out):
        _clear_away(problems, config, config.out)
        print(f"{config.out}: done already")
        return
    with servers_for(config, f"{config.out}.server.log") as urls:
        meta = generate_corpus(problems, config, urls, config.out)
    print(f"{config.out}: {meta['completions']} completions")


def open_problems(path: str, limit: int | None, out: str | Path) -> ProblemFile:
    """A file of problems whose index is kept with the parts of `out`, so that going on does not read it all again."""
    parts = Path(f"{out}.parts")
    if not Path(out).exists():
        with contextlib.suppress(OSError):  # who writes there will say so
            parts.mkdir(parents=True, exist_ok=True)
    try:
        return ProblemFile(path, limit, cache=parts / "problems.index" if parts.is_dir() else None)
    except InputError:
        with contextlib.suppress(OSError):  # it is not there, or holds what an earlier run has left
            parts.rmdir()
        raise


@contextlib.contextmanager
def servers_for(config: Config, log_path: str | Path) -> Iterator[list[str]]:
    """The URLs named in the config, or those of servers started for its model.

    Raises:
        InputError: see `named_urls`; or a server did not start.
    """
    if (urls := named_urls(config)) is not None:
        yield urls
        return
    serve = sglang.seeded(config.serve) if config.temperature > 0 else config.serve
    with serving(config.model, serve, log_path) as urls:
        yield urls


def named_urls(config: Config) -> list[str] | None:
    """The servers that the config names; None: one is to be started.

    Raises:
        InputError: there is no such checkpoint, a URL is none, or stands there twice.
    """
    resolve_checkpoint(config.model)  # its tokenizer is needed in any case
    if config.url is None:
        return None
    urls = [_checked_url(url) for url in ([config.url] if isinstance(config.url, str) else config.url)]
    if len(set(urls)) != len(urls):
        raise InputError("`url` names a server twice")
    return urls


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not set(url) & set(" \t\n")
    except ValueError:  # a port that is no number, brackets that do not match
        good = False
    if not good:
        raise InputError(f"`url`: {url!r} is no address of a server; it looks like http://localhost:30000")
    return url.rstrip("/")


def fingerprint(problems: ProblemFile, config: Config) -> dict[str, Any]:
    """What the completions depend on, and nothing else: neither URLs nor concurrency.

    Of `serve` it is what the pipeline's identity holds, also where a URL is given: it is then what the server there is
    meant to run with, so a run may move from one to the other.
    """
    made_by: dict[str, Any] = {
        "model": model_fingerprint(resolve_checkpoint(config.model)),
        "problems": problems.sha256,
        "prompt": asdict(config.chat),
        "samples": config.samples,
        "seed": config.seed if config.temperature > 0 else None,
        "sampling": sampling_params(config),
        "serve": loader.identity(config.serve),
    }
    if config.thinking_budget is not None:
        made_by["thinking"] = {"budget": config.thinking_budget, "end": config.thinking_end}
    if config.top_logprobs:
        made_by["top_logprobs"] = config.top_logprobs
    if isinstance(config, GenerateConfig) and config.stop_after_accepted is not None:
        # The key is the option's former name: runs made under it stay finished.
        made_by["enough"] = {"accepted": config.stop_after_accepted, "rules": loader.identity(config.accept)}
    return made_by


def model_fingerprint(path: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, all of the weights: frozen models differ in little.

    Several files are read at once, so a 60 GB checkpoint takes as long as its disk or page cache does.

    Raises:
        InputError: there is no checkpoint.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".json", ".jinja"} and p.is_file())
    files = [file for file in files if file.name != "trainer_state.json"]  # how it was made is not what it is
    if not files:
        raise InputError(f"{path}: no checkpoint here (no *.json, no *.safetensors)")
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(_CONTENTS.of, files))
    digest = hashlib.sha256()
    for file, content in zip(files, contents, strict=True):
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()


def finished(problems: ProblemFile, config: Config, out: str | Path) -> bool:
    """Whether `out` is complete, unchanged since it was written (sha256, rows), and of this very request.

    Raises:
        InputError: a file is there that belongs to another request, or to none that is known.
    """
    out, meta_path, parts = Path(out), Path(f"{out}.meta.json"), Path(f"{out}.parts")
    if not out.exists():
        return False
    if not meta_path.exists():
        if (parts / "manifest.json").exists():
            return False  # killed between writing the two
        raise InputError(f"{out} exists and was not written by generate; delete it or write elsewhere")
    try:
        meta = json.loads(meta_path.read_bytes())
        theirs, content = meta["fingerprint"], (meta["sha256"], meta["completions"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{meta_path} is damaged ({error!r}); delete it and {out}, or write elsewhere") from None
    ours = json.loads(json.dumps(fingerprint(problems, config)))
    if theirs == ours:
        return bool(_content(out) == content)
    differing = ", ".join(sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)))
    raise InputError(f"{out} belongs to another run (it differs in: {differing}); delete it or write elsewhere")


def generate_corpus(problems: ProblemFile, config: Config, urls: Sequence[str], out_path: str | Path) -> dict[str, Any]:
    """Answer each problem and write the completions, in the problems' order, to `out_path`.

    Beside it stands OUT.meta.json with the fingerprint, counts and tokens, and OUT.meters.json with what depends on the
    clock; while the run lasts, OUT.parts. Takes up what an interrupted run has left. Calls `asyncio.run`, so it must
    not be called from a running event loop.

    Args:
        problems: with unique ids.
        config: sampling, prompt and limits; `config.model` is the checkpoint whose tokenizer and template make
            the prompts.
        urls: of the servers, without a slash at the end.
        out_path: JSONL of `Completion`.

    Returns:
        The contents of OUT.meta.json.

    Raises:
        InputError: see `run`.
    """
    out = Path(out_path)
    parts, meta_path = Path(f"{out}.parts"), Path(f"{out}.meta.json")
    if finished(problems, config, out):
        _clear_away(problems, config, out)
        meta: dict[str, Any] = json.loads(meta_path.read_bytes())
        return meta
    if out.exists() and not (parts / "manifest.json").exists():
        aside = out.with_name(f"{out.name}.damaged")
        print(f"{out} was cut off or changed; it is kept as {aside.name} and made anew", file=sys.stderr, flush=True)
        out.replace(aside)
    made_by = fingerprint(problems, config)
    with Journal(parts, made_by) as journal:
        _complete(problems, config, urls, journal, out)
        entries = journal.entries
        order = np.lexsort((entries["sample"], entries["problem"]))
        summary = _Summary()
        write_atomic(out, map(summary.take, journal.rows(order)))
        meta = {"fingerprint": made_by, **summary.counts()}
        if "enough" in made_by:  # every answer is judged then
            meta["judged"] = _judged(entries["verdict"])
        write_atomic(meta_path, [json.dumps(meta, indent=2).encode() + b"\n"])
        journal.discard()
    return meta


def _clear_away(problems: ProblemFile, config: Config, out: str | Path) -> None:
    """Remove what a run that was killed between its last file and its end has left."""
    if (parts := Path(f"{out}.parts")).exists():
        Journal(parts, fingerprint(problems, config)).discard()


def _complete(
    problems: ProblemFile,
    config: Config,
    urls: Sequence[str],
    journal: Journal,
    out: Path,
) -> None:
    """Ask for what the journal lacks."""
    enough, rules = (config.stop_after_accepted, config.accept) if isinstance(config, GenerateConfig) else (None, None)
    if enough is None and len(journal) == len(problems) * config.samples:
        return
    with Judge(rules) if rules is not None else contextlib.nullcontext() as judge:
        checkpoint = resolve_checkpoint(config.model)
        client = Client(problems, config, config.model, checkpoint, urls, journal, judge, enough)
        try:
            asyncio.run(client.run())
        finally:
            meters = json.dumps(client.summary(), indent=2).encode() + b"\n"
            with contextlib.suppress(InputError):  # a full disk: the error under way says more
                write_atomic(Path(f"{out}.meters.json"), [meters])


class _Summary:
    """sha256, rows and tokens of a file as its lines pass by."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._rows = self._prompt_tokens = self._problems = 0
        self._last_problem: str | None = None
        self._reasons: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def take(self, line: bytes) -> bytes:
        row = json.loads(line)
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
