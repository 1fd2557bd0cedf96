"""Completions from any SGLang-compatible server: concurrent, resumable, nothing lost, nothing twice.

Speaks HTTP alone (SGLang's native /generate with `input_ids`), so it does not matter which engine answers. Every row is
appended to OUT.part as it comes; a run that was killed goes on from there.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from micota_fast import config as configuration
from micota_fast.client import Client, sampling_params
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.recipe import EvaluateConfig, GenerateConfig
from micota_fast.records import (
    Completion,
    CompletionWriter,
    Problem,
    encode_row,
    read_completions,
    read_problems,
    write_atomic,
)
from micota_fast.serve import sglang
from micota_fast.serve.launch import serving

FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 64, 1 << 16


def run(config: GenerateConfig) -> None:
    """`micota generate`: answer all problems of a file. A finished output with the same fingerprint is left as it is.

    Raises:
        InputError: bad input, an output that belongs to another run, a request the server refuses, or a server that
            does not answer any more (what was generated until then is kept).
    """
    problems = read_problems(config.problems, config.limit)
    if finished(problems, config, config.out):
        print(f"{config.out}: done already")
        return
    with server_for(config, f"{config.out}.server.log") as url:
        generate_corpus(problems, config, url, config.out)
    print(f"{config.out}: {len(problems) * config.samples} completions")


@contextlib.contextmanager
def server_for(config: GenerateConfig | EvaluateConfig, log_path: str | Path) -> Iterator[str]:
    """The URL named in the config, or that of a server started for its model.

    Raises:
        InputError: the URL is none, there is no such checkpoint, or the server did not start.
    """
    resolve_checkpoint(config.model)  # its tokenizer is needed in any case
    if config.url is not None:
        yield _checked_url(config.url)
        return
    serve = sglang.seeded(config.serve) if config.temperature > 0 else config.serve
    with serving(config.model, serve, log_path) as url:
        yield url


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not set(url) & set(" \t\n")
    except ValueError:  # a port that is no number, brackets that do not match
        good = False
    if not good:
        raise InputError(f"`url`: {url!r} is no address of a server; it looks like http://localhost:30000")
    return url.rstrip("/")


def fingerprint(problems: Sequence[Problem], config: GenerateConfig | EvaluateConfig) -> dict[str, Any]:
    """What the completions depend on, and nothing else: neither URL nor concurrency.

    Of `serve` it is what the pipeline's identity holds, also where a URL is given: it is then what the server there is
    meant to run with, so a run may move from one to the other.
    """
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(encode_row(problem))
    return {
        "model": model_fingerprint(resolve_checkpoint(config.model)),
        "problems": digest.hexdigest(),
        "prompt": asdict(config.chat),
        "samples": config.samples,
        "seed": config.seed if config.temperature > 0 else None,
        "sampling": sampling_params(config),
        "serve": configuration.identity(config.serve),
    }


def model_fingerprint(path: Path) -> str:
    """SHA-256 over a checkpoint's files: all of the small ones; of a large one its size and evenly spaced blocks.

    Training and merging change weights everywhere, so blocks suffice to tell two checkpoints of one shape apart, and
    a 60 GB checkpoint takes no minute.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".json", ".jinja"} and p.is_file())
    if not files:
        raise InputError(f"{path}: no checkpoint here (no *.json, no *.safetensors)")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= FINGERPRINT_BLOCKS * FINGERPRINT_BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for block in range(FINGERPRINT_BLOCKS):
                stream.seek(block * (size - FINGERPRINT_BLOCK_BYTES) // (FINGERPRINT_BLOCKS - 1))
                digest.update(stream.read(FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()


def finished(problems: Sequence[Problem], config: GenerateConfig | EvaluateConfig, out: str | Path) -> bool:
    """Whether `out` is complete, unchanged since it was written (sha256, rows), and of this very request.

    Raises:
        InputError: a file is there that belongs to another request, or to none that is known.
    """
    out, meta_path, part_path = Path(out), Path(f"{out}.meta.json"), Path(f"{out}.part")
    if not out.exists():
        return False
    if not meta_path.exists():
        if part_path.exists():
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


def generate_corpus(
    problems: list[Problem], config: GenerateConfig | EvaluateConfig, url: str, out_path: str | Path
) -> list[Completion]:
    """Answer each problem `config.samples` times and write the completions, in the problems' order, to `out_path`.

    Beside it stands OUT.meta.json with the fingerprint, counts and tokens; while the run lasts, OUT.part. Takes up what
    an interrupted run has left. Calls `asyncio.run`, so it must not be called from a running event loop.

    Args:
        problems: with unique ids.
        config: sampling, prompt and concurrency; `config.model` is the checkpoint whose tokenizer and template make
            the prompts.
        url: of the server, without a slash at the end.
        out_path: JSONL of `Completion`.

    Raises:
        InputError: see `run`.
    """
    out = Path(out_path)
    part, meta_path = Path(f"{out}.part"), Path(f"{out}.meta.json")
    if finished(problems, config, out):
        part.unlink(missing_ok=True)
        return read_completions(out)
    if out.exists() and not part.exists():
        aside = out.with_name(f"{out.name}.damaged")
        print(f"{out} was cut off or changed; it is kept as {aside.name} and made anew", file=sys.stderr, flush=True)
        out.replace(aside)
    request_fingerprint = fingerprint(problems, config)
    with CompletionWriter(part, request_fingerprint) as writer:
        if len(writer.rows) < len(problems) * config.samples:
            asyncio.run(Client(problems, config, resolve_checkpoint(config.model), url, writer).run())
        rows = writer.finalise(out, (problem.id for problem in problems))
        meta = {"fingerprint": request_fingerprint, "sha256": _content(out)[0], **_counts(rows)}
        write_atomic(meta_path, [json.dumps(meta, indent=2).encode() + b"\n"])
        writer.discard()
    return rows


def _content(path: Path) -> tuple[str, int]:
    """sha256 and number of lines of a file."""
    digest, lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            lines += block.count(b"\n")
    return digest.hexdigest(), lines


def _counts(rows: Sequence[Completion]) -> dict[str, Any]:
    reasons = Counter(row.finish_reason for row in rows)
    tokens: Counter[str] = Counter()
    for row in rows:
        tokens[row.finish_reason] += row.completion_tokens
    return {
        "completions": len(rows),
        "problems": len({row.id for row in rows}),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "completion_tokens": sum(tokens.values()),
        "by_finish_reason": {r: {"completions": reasons[r], "completion_tokens": tokens[r]} for r in sorted(reasons)},
    }
