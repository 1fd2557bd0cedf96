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
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from micota_fast import config as configuration
from micota_fast.chat import Chat
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.recipe import EvaluateConfig, GenerateConfig
from micota_fast.records import (
    Completion,
    CompletionWriter,
    Problem,
    encode_row,
    model_name,
    read_completions,
    read_problems,
    write_atomic,
)
from micota_fast.serve import sglang
from micota_fast.serve.launch import serving

REQUEST_TIMEOUT_S = 4 * 3600.0  # one answer, its time in the server's queue included
RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
UNAVAILABLE_STATUSES = RETRY_STATUSES - {500}  # of a GET: the server (or the one behind a router) is not up yet
BACKOFF_S = 0.25, 15.0  # first and longest pause between two tries of a request
# How long one request may fail, with no other answered, before the run gives up: a server elsewhere may be restarted,
# ours will not.
PATIENCE_OWN_S, PATIENCE_URL_S = 20.0, 600.0
POISONED_AFTER = 8  # failures in a row of one request, while the server answers others, that are the request's fault
HEALTH_TIMEOUT_S = 30.0
OFFENDERS_NAMED = 3
PROGRESS_S = 5.0
# SGLang takes `sampling_seed` from everyone, but heeds it in this mode alone.
SEEDS_IGNORED = (
    "{url}: this SGLang server ignores sampling seeds (it runs without --enable-deterministic-inference): "
    "the answers are random, and another run's will differ"
)
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
    _checkpoint(config)  # its tokenizer is needed in any case
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
        "model": model_fingerprint(_checkpoint(config)),
        "problems": digest.hexdigest(),
        "prompt": asdict(config.chat),
        "samples": config.samples,
        "seed": config.seed if config.temperature > 0 else None,
        "sampling": _sampling_params(config),
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
            asyncio.run(_Client(problems, config, url, writer).run())
        rows = writer.finalise(out, (problem.id for problem in problems))
        meta = {"fingerprint": request_fingerprint, "sha256": _content(out)[0], **_counts(rows)}
        write_atomic(meta_path, [json.dumps(meta, indent=2).encode() + b"\n"])
        writer.discard()
    return rows


def derive_seed(seed: int, problem_id: str, sample: int) -> int:
    """The sampling seed of one answer: 31 bits that depend on nothing but the arguments."""
    digest = hashlib.sha256(f"{seed}\0{problem_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _checkpoint(config: GenerateConfig | EvaluateConfig) -> Path:
    """The checkpoint's folder. Raises InputError where there is none."""
    if Path(config.model).is_dir():
        return Path(config.model)
    from micota_fast.model.safetensors_io import resolve_checkpoint  # imports torch, which a folder does not need

    return resolve_checkpoint(config.model)


def _content(path: Path) -> tuple[str, int]:
    """sha256 and number of lines of a file."""
    digest, lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            lines += block.count(b"\n")
    return digest.hexdigest(), lines


def _sampling_params(config: GenerateConfig | EvaluateConfig) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    if config.temperature > 0:
        params |= {"top_p": config.top_p, "top_k": config.top_k}
    if config.stop:
        params["stop"] = list(config.stop)
    return params


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


@dataclass
class _Job:
    problem: Problem
    sample: int
    input_ids: list[int]
    failures: int = 0  # in a row
    failing_since: float = 0.0  # the first of them
    answered_then: int = 0  # how many others had been answered by then


class _Temporary(Exception):
    """A failure that another try may mend."""


class _Client:
    """One run against one URL: a bounded number of requests in flight, each retried until it is answered."""

    def __init__(
        self, problems: Sequence[Problem], config: GenerateConfig | EvaluateConfig, url: str, writer: CompletionWriter
    ) -> None:
        self._problems, self._config, self._url, self._writer = problems, config, url, writer
        self._chat = Chat.from_checkpoint(_checkpoint(config), config.chat)
        self._patience_s = PATIENCE_OWN_S if config.url is None else PATIENCE_URL_S
        self._params = _sampling_params(config)
        self._model_name = model_name(config.model)
        self._todo: deque[_Job] = deque()
        self._sent: dict[tuple[str, int], float] = {}  # when the tries now under way were sent
        self._in_flight = 0
        self._said_failing = False
        self._answered = self._aborted = self._tokens = 0
        self._well = sum(row.finish_reason != "abort" for row in writer.rows.values())

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=30.0)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await self._check_model(session)
            info = await self._server_info(session)
            self._context_length = self._find_context_length(info)
            if self._config.temperature > 0 and info.get("enable_deterministic_inference") is False:
                print(SEEDS_IGNORED.format(url=self._url), file=sys.stderr, flush=True)
            self._todo.extend(self._jobs())
            progress = asyncio.create_task(self._report())
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._config.concurrency):
                        group.create_task(self._work(session))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the first ended the run; any others are its echo
            finally:
                progress.cancel()
        if self._aborted:
            print(
                f"{self._aborted} of {len(self._problems) * self._config.samples} completions aborted: the server "
                f"failed on each {POISONED_AFTER} times in a row and answered others; they are empty rows",
                file=sys.stderr,
                flush=True,
            )

    async def _check_model(self, session: aiohttp.ClientSession) -> None:
        """Wait until the server answers, and see that it serves the model asked for."""
        started, (pause, longest_pause) = time.monotonic(), BACKOFF_S
        while True:
            try:
                served = await self._served_model(session)
                break
            except _Temporary as error:
                self._say_failing(error)
                if time.monotonic() - started > self._patience_s:
                    raise self._given_up(time.monotonic() - started, error) from None
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest_pause)
        if served is None:
            print(f"{self._url} does not tell which model it serves: taken on trust", file=sys.stderr, flush=True)
        elif not self._is_wanted(served):
            raise InputError(f"{self._url} serves {served}, but `model` is {self._config.model}")

    async def _served_model(self, session: aiohttp.ClientSession) -> str | None:
        for path in ("/get_model_info", "/model_info"):
            try:
                timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
                async with session.get(self._url + path, timeout=timeout) as response:
                    if response.status in UNAVAILABLE_STATUSES:
                        raise _Temporary(f"HTTP {response.status}: {_message(await response.text())}")
                    if response.status != 200:
                        continue
                    info = json.loads(await response.read())
            except aiohttp.InvalidURL:
                raise InputError(f"`url`: {self._url!r} is no address of a server") from None
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _Temporary(f"{type(error).__name__}: {error}") from None
            except ValueError:
                continue
            if isinstance(info, dict) and isinstance(info.get("model_path"), str):
                return str(info["model_path"])
        return None

    def _is_wanted(self, served: str) -> bool:
        """The same folder or hub name; or, as another machine's folders lie elsewhere, the same last component."""
        ours, theirs = _checkpoint(self._config), Path(served)
        if served == self._config.model or ours.resolve() == theirs.resolve():
            return True
        # NAME/model is called NAME: of our own making, all of them end in `model`.
        last = theirs.parent.name if theirs.name == "model" else theirs.name
        return last in {self._model_name.rpartition("/")[2], ours.name} - {"model"}

    async def _server_info(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What the server tells of its settings; nothing where it does not answer (a router, say)."""
        info = None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with asyncio.timeout(30.0), session.get(f"{self._url}/get_server_info") as response:
                info = await response.json(content_type=None)
        return info if isinstance(info, dict) else {}

    def _find_context_length(self, info: Mapping[str, Any]) -> int:
        """Tokens of prompt and answer together: what the server says, else (SGLang at its default) the checkpoint's."""
        value = info.get("context_length")
        if isinstance(value, int):
            return value
        return ModelConfig.from_checkpoint(_checkpoint(self._config)).max_position_embeddings

    def _jobs(self) -> list[_Job]:
        """What is still to be done, in order, every prompt checked."""
        jobs: list[_Job] = []
        bad: list[str] = []
        for problem in self._problems:
            samples = [s for s in range(self._config.samples) if (problem.id, s) not in self._writer.rows]
            if not samples:
                continue
            try:
                input_ids = self._chat.encode_prompt(problem.problem)
            except InputError as error:
                bad.append(f"problem {problem.id!r}: {error}")
                continue
            # An id outside the vocabulary kills an SGLang server.
            if max(input_ids, default=0) >= self._chat.vocab_size:
                bad.append(
                    f"problem {problem.id!r}: its prompt has token id {max(input_ids)}; the model knows only "
                    f"{self._chat.vocab_size}: the tokenizer does not belong to this checkpoint"
                )
            elif len(input_ids) + 1 >= self._context_length:
                bad.append(
                    f"problem {problem.id!r}: its prompt of {len(input_ids)} tokens leaves no room for an answer in "
                    f"the server's context of {self._context_length}"
                )
            jobs += [_Job(problem, sample, input_ids) for sample in samples]
        if bad:
            named = "; ".join(bad[:OFFENDERS_NAMED]) + ("; ..." if len(bad) > OFFENDERS_NAMED else "")
            raise InputError(f"{len(bad)} of {len(self._problems)} prompts cannot be sent: {named}")
        return jobs

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while self._todo:
            job = self._todo.popleft()
            self._in_flight += 1
            try:
                row = await self._answer(session, job)
            finally:
                self._in_flight -= 1
            self._writer.append(row)
            if row.finish_reason == "abort":
                self._aborted += 1
            else:
                self._said_failing = False
                self._answered += 1
                self._well += 1
            self._tokens += row.completion_tokens

    async def _answer(self, session: aiohttp.ClientSession, job: _Job) -> Completion:
        params = dict(self._params)
        seed = None
        if self._config.temperature > 0:
            seed = params["sampling_seed"] = derive_seed(self._config.seed, job.problem.id, job.sample)
        # SGLang refuses a request whose prompt and limit together exceed the context length (0.5.23; it then stops two
        # short of it, with "length").
        room = self._context_length - len(job.input_ids) - 1
        params["max_new_tokens"] = min(params["max_new_tokens"], room)
        body = {"input_ids": job.input_ids, "sampling_params": params}
        pause, longest_pause = BACKOFF_S
        while True:
            try:
                return self._row(job, seed, await self._post(session, job, body))
            except _Temporary as error:
                self._say_failing(error)
                if not job.failures:
                    job.failing_since, job.answered_then = time.monotonic(), self._answered
                job.failures += 1
                if await self._is_poisoned(session, job, error):
                    return self._aborted_row(job, seed)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # spread out: not all at once again
                pause = min(2 * pause, longest_pause)

    async def _is_poisoned(self, session: aiohttp.ClientSession, job: _Job, error: _Temporary) -> bool:
        """Whether a failed request will never be answered though the server is well. False: try again.

        Raises:
            InputError: the server is not well, and has had its time.
        """
        failing_s = time.monotonic() - job.failing_since
        often = job.failures >= POISONED_AFTER
        if self._answered > job.answered_then:
            return often
        if failing_s <= self._patience_s:
            return False
        # Nothing was answered for long. That may be because the others' answers take long.
        if any(sent < time.monotonic() - self._patience_s / 2 for sent in self._sent.values()):
            if await self._healthy(session, "/health"):
                return False
        # Or because only requests that fail are left: the server has answered others and still generates.
        elif self._well and not self._todo and await self._healthy(session, "/health_generate"):
            return often
        raise self._given_up(failing_s, error) from None

    async def _healthy(self, session: aiohttp.ClientSession, path: str) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with session.get(self._url + path, timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _say_failing(self, error: Exception) -> None:
        if not self._said_failing:
            self._said_failing = True
            print(f"{self._url}: {error}; trying again", file=sys.stderr, flush=True)

    def _given_up(self, silent_s: float, error: Exception) -> InputError:
        return InputError(
            f"{self._url} has given no answer for {silent_s:.0f} s (last: {error}); {len(self._writer.rows)} "
            f"completions are kept in {self._writer.path}: start again to go on from there"
        )

    async def _post(self, session: aiohttp.ClientSession, job: _Job, body: Mapping[str, Any]) -> Any:
        self._sent[job.problem.id, job.sample] = time.monotonic()
        try:
            async with session.post(f"{self._url}/generate", json=body) as response:
                if response.status == 200:
                    return json.loads(await response.read())
                message = _message(await response.text())
                if response.status in RETRY_STATUSES:
                    raise _Temporary(f"HTTP {response.status}: {message}")
                raise InputError(
                    f"problem {job.problem.id!r}: {self._url} refused it with HTTP {response.status}: {message}"
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _Temporary(f"{type(error).__name__}: {error}") from None
        finally:
            del self._sent[job.problem.id, job.sample]

    def _row(self, job: _Job, seed: int | None, answer: Any) -> Completion:
        try:
            text, meta = answer["text"], answer["meta_info"]
            reason, prompt_tokens = meta["finish_reason"]["type"], meta["prompt_tokens"]
            completion_tokens = meta["completion_tokens"]
        except (KeyError, TypeError) as error:
            raise _Temporary(f"an answer that is not SGLang's: {error!r}") from None
        if reason not in ("stop", "length"):
            raise _Temporary(f"the server ended the answer with {meta['finish_reason']}")
        return replace(
            self._aborted_row(job, seed),
            completion=text,
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )

    def _aborted_row(self, job: _Job, seed: int | None) -> Completion:
        return Completion(
            id=job.problem.id,
            sample=job.sample,
            problem=job.problem.problem,
            answer=job.problem.answer,
            completion="",
            finish_reason="abort",
            prompt_tokens=len(job.input_ids),
            completion_tokens=0,
            seed=seed,
            model=self._model_name,
        )

    async def _report(self) -> None:
        """A progress line every PROGRESS_S; the speed is that of the last minute."""
        total = len(self._problems) * self._config.samples
        before = len(self._writer.rows)
        if before:
            print(f"going on after {before} of {total} completions", file=sys.stderr, flush=True)
        window: deque[tuple[float, int, int]] = deque([(time.monotonic(), before, 0)], maxlen=13)
        while True:
            await asyncio.sleep(PROGRESS_S)
            now, done = time.monotonic(), len(self._writer.rows)
            then, done_then, tokens_then = window[0]
            rate = (done - done_then) / (now - then)
            left = f"{(total - done) / rate:.0f} s" if rate > 0 else "?"
            tokens_per_s = (self._tokens - tokens_then) / (now - then)
            window.append((now, done, self._tokens))
            line = f"{done}/{total} done  {tokens_per_s:.0f} tok/s  {self._in_flight} in flight  {left} left"
            print(line, file=sys.stderr, flush=True)


def _message(text: str) -> str:
    """What an error body says."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
