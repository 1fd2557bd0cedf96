"""The requests of a generation: sent to one SGLang-compatible URL, each tried until it is answered or given up on.

Speaks SGLang's native /generate with `input_ids`; prompts are checked before the first of them is sent.
"""

import asyncio
import contextlib
import hashlib
import json
import random
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from micota_fast.chat import Chat
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.recipe import EvaluateConfig, GenerateConfig
from micota_fast.records import Completion, CompletionWriter, Problem, model_name

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


def derive_seed(seed: int, problem_id: str, sample: int) -> int:
    """The sampling seed of one answer: 31 bits that depend on nothing but the arguments."""
    digest = hashlib.sha256(f"{seed}\0{problem_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sampling_params(config: GenerateConfig | EvaluateConfig) -> dict[str, Any]:
    """`sampling_params` of every request, seeds left out."""
    params: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    if config.temperature > 0:
        params |= {"top_p": config.top_p, "top_k": config.top_k}
    if config.stop:
        params["stop"] = list(config.stop)
    return params


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


class Client:
    """One run against one URL: a bounded number of requests in flight, each retried until it is answered."""

    def __init__(
        self,
        problems: Sequence[Problem],
        config: GenerateConfig | EvaluateConfig,
        checkpoint: Path,
        url: str,
        writer: CompletionWriter,
    ) -> None:
        self._problems, self._config, self._url, self._writer = problems, config, url, writer
        self._checkpoint = checkpoint
        self._chat = Chat.from_checkpoint(checkpoint, config.chat)
        self._patience_s = PATIENCE_OWN_S if config.url is None else PATIENCE_URL_S
        self._params = sampling_params(config)
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
        ours, theirs = self._checkpoint, Path(served)
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
        return ModelConfig.from_checkpoint(self._checkpoint).max_position_embeddings

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
