"""The requests of a generation: sent to servers, each tried until it is answered or given up on."""

import asyncio
import math
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from micota_fast.common.json_io import parse_json
from micota_fast.common.records import Completion, parse_row
from micota_fast.config.generation import SamplingSettings
from micota_fast.corpus.rules import REASONS, Judge, Judgement
from micota_fast.errors import InputError
from micota_fast.generation import fleet
from micota_fast.generation.api import Api
from micota_fast.generation.endpoint import Endpoint, RetryableError, client_session
from micota_fast.generation.journal import Journal
from micota_fast.generation.progress import Meters, Screen
from micota_fast.generation.rate_limit import RateLimit
from micota_fast.generation.schedule import Schedule, Sized, Wanted

POISONED_AFTER = 8  # failures of one request on a server that answers others meanwhile, that are the request's fault
PROGRESS_S = 5.0
CONFIRM_S = 5.0  # for which a run that fails waits for its servers to say what they serve
MOST_JUDGED = 4096  # answers that wait for their judgement before no more are asked for
UNJUDGED, ACCEPTED = 0, 1  # verdicts in the journal; a rejected answer's is 2 + its reason's place in REASONS


def verdict_code(judgement: Judgement) -> int:
    """Return a judgement as the journal keeps it."""
    return ACCEPTED if judgement.reason is None else 2 + REASONS.index(judgement.reason)


@dataclass(slots=True, eq=False)
class _Job:
    wanted: Wanted
    failures: Counter[Endpoint] = field(default_factory=Counter)  # that may be its own
    answered_then: dict[Endpoint, int] = field(default_factory=dict)  # others, when it first failed there
    failing_since: float = 0.0
    pause: float = field(default_factory=lambda: fleet.BACKOFF_S[0])
    sent: float = 0.0  # when the try now under way was
    reserved: float = 0.0  # tokens, for this try


class Client:
    """One run against one or several servers.

    Args:
        problems: what is asked.
        config: sampling, prompt, limits.
        api: that the servers speak.
        urls: of the servers, without a slash at the end.
        journal: where answers go as they come.
        judge: judges them; None: every answer counts as accepted.
        enough: see `GenerateSettings`.
    """

    def __init__(
        self,
        problems: Sized,
        config: SamplingSettings,
        api: Api,
        urls: Sequence[str],
        journal: Journal,
        judge: Judge | None,
        enough: int | None,
    ) -> None:
        self._problems, self._config, self._judge = problems, config, judge
        self._api, self._journal = api, journal
        self._enough = enough
        self._wake = asyncio.Event()
        self._pace = RateLimit(
            config.openai.requests_per_minute, config.openai.tokens_per_minute, config.max_new_tokens
        )
        self._fleet = fleet.Fleet(api, urls, config, journal, self._wake.set)
        self._ready: deque[_Job] = deque()  # failed, and due again
        self._under_way: set[_Job] = set()
        self._judging = 0
        self._answered_at = -math.inf
        self._aborted = 0
        self._well = len(journal)  # answers that show that the servers can, sometime
        accepted = int((journal.entries["verdict"] == ACCEPTED).sum())
        self.meters = Meters(len(journal), None if judge is None else accepted, config.openai.dollars)

    async def run(self) -> None:
        """Ask for everything that the journal lacks.

        Raises:
            InputError: a prompt that cannot be sent, a request the servers refuse, another model than asked for, or no
                answer for too long. Everything that was answered is in the journal.
        """
        screen, servers = Screen(), self._fleet
        async with servers, client_session(aiohttp.TCPConnector(limit=0)) as self._session:
            try:
                async with asyncio.TaskGroup() as group:
                    watchers = [group.create_task(servers.watch(endpoint)) for endpoint in servers.endpoints]
                    await self._api.check_prompts(await servers.first_up(), self._journal.folder)
                    await self._judge_left_over()
                    self._schedule = self._make_schedule()
                    watchers.append(group.create_task(self._report(screen)))
                    await self._feed(group)
                    await servers.confirm()
                    for watcher in watchers:
                        watcher.cancel()
            except BaseExceptionGroup as errors:
                # Any others are the first one's echo.
                raise await self._without_suspects(errors.exceptions[0]) from None
            finally:
                screen.end()
        if self._aborted:
            print(
                f"{self._aborted} of {len(self._journal)} completions aborted: the server "
                f"failed on each {POISONED_AFTER} times in a row and answered others; they are empty rows",
                file=sys.stderr,
                flush=True,
            )

    def summary(self) -> dict[str, Any]:
        """Return this run's meters."""
        return self.meters.summary(self._fleet.endpoints)

    async def _without_suspects(self, error: BaseException) -> BaseException:
        """Throw away what a server may have answered with another model; the error then says so, too."""
        noticed = self._fleet.suspect_from is not None
        try:  # another model may be why the run ends, and other servers may have changed theirs together with the first
            async with asyncio.timeout(CONFIRM_S):
                await self._fleet.confirm()
        except TimeoutError:
            pass
        except InputError as found:
            error = error if noticed else found
        kept = self._fleet.suspect_from
        if kept is None:
            return error
        suspects = len(self._journal) - kept
        self._journal.cut_back(kept)
        return InputError(
            f"{error}: it has changed its model during the run. The last {suspects} completions, written since it was "
            f"seen to serve the right one, are thrown away; {kept} are kept in {self._journal.folder}: start again "
            f"with the right server to resume from there"
        )

    # -- the work ----------------------------------------------------------------------------------------------------

    def _make_schedule(self) -> Schedule:
        entries = self._journal.entries
        accepted = np.ones(len(entries), bool) if self._enough is None else entries["verdict"] == ACCEPTED
        return Schedule(
            self._problems.levels,
            self._problems.sizes,
            self._config.samples,
            self._enough,
            entries["problem"],
            entries["sample"],
            accepted,
        )

    async def _judge_left_over(self) -> None:
        """Answers that a killed run had written but not judged, if it matters."""
        if self._judge is None or self._enough is None:
            return
        entries = self._journal.entries
        left = np.flatnonzero(entries["verdict"] == UNJUDGED)
        for start in range(0, len(left), MOST_JUDGED):
            some = left[start : start + MOST_JUDGED]
            where = str(self._journal.folder)
            rows = [parse_row(Completion, parse_json(line, where), where) for line in self._journal.rows(some)]
            judgements = await asyncio.gather(*(self._judgement(row) for row in rows))
            for i, judgement in zip(some.tolist(), judgements, strict=True):
                self._journal.settle_entry(i, verdict_code(judgement))
                self.meters.judge(judgement.reason)

    async def _judgement(self, row: Completion) -> Judgement:
        assert self._judge is not None
        return self._judge.at_once(row) or await self._judge.compared(row)

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        """Hand out work to whoever has room until there is none left."""
        while True:
            self._wake.clear()
            while self._judging < MOST_JUDGED and (endpoint := self._fleet.freest()) is not None:
                if (wait_s := self._pace.wait_s()) > 0:
                    asyncio.get_running_loop().call_later(wait_s, self._wake.set)
                    break
                if (job := self._take()) is None:
                    break
                job.reserved = self._pace.sent()
                endpoint.in_flight += 1
                self._under_way.add(job)
                group.create_task(self._work(endpoint, job))
            if self._schedule.finished:
                return
            await self._wake.wait()

    def _take(self) -> _Job | None:
        if self._ready:
            return self._ready.popleft()
        wanted = self._schedule.next()
        return None if wanted is None else _Job(wanted)

    async def _work(self, endpoint: Endpoint, job: _Job) -> None:
        """One try of one request, and all that comes of it."""
        job.sent = time.monotonic()
        try:
            row, extra = await self._api.answer(endpoint, self._session, job.wanted)
        except RetryableError as error:
            endpoint.in_flight -= 1
            self._under_way.discard(job)
            self.meters.failures += 1
            self._pace.ended(job.reserved, None)
            await self._failed(endpoint, job, error)
            return
        endpoint.in_flight -= 1
        endpoint.succeeded()
        self._under_way.discard(job)
        self._wake.set()
        self._fleet.answered()
        self._answered_at = time.monotonic()
        self._well += 1
        self.meters.answer(row.prompt_tokens, row.completion_tokens)
        self._pace.ended(job.reserved, row.prompt_tokens + row.completion_tokens)
        await self._deliver(job, row, extra)

    async def _deliver(self, job: _Job, row: Completion, extra: dict[str, Any]) -> None:
        """Write an answer down, then judge it."""
        problem, sample = job.wanted.problem, job.wanted.sample
        judgement = Judgement(None) if self._judge is None else self._judge.at_once(row)
        verdict = UNJUDGED if self._judge is None or judgement is None else verdict_code(judgement)
        self._journal.append(problem, sample, verdict, row.completion_tokens, row.prompt_tokens, vars(row) | extra)
        if judgement is None:
            assert self._judge is not None
            self._judging += 1
            try:
                judgement = await self._judge.compared(row)
            finally:
                self._judging -= 1
            self._journal.settle(problem, sample, verdict_code(judgement))
        if self._judge is not None:
            self.meters.judge(judgement.reason)
        self._schedule.done(job.wanted, judgement.accepted)
        self._wake.set()

    async def _failed(self, endpoint: Endpoint, job: _Job, error: RetryableError) -> None:
        """Try again later, here or elsewhere; or give up on the request, or on the run."""
        job.failing_since = job.failing_since or time.monotonic()
        job.answered_then.setdefault(endpoint, endpoint.answered)
        job.failures[endpoint] += error.own
        loop = asyncio.get_running_loop()
        if rest_s := endpoint.failed(*fleet.BACKOFF_S):
            loop.call_later(rest_s, self._wake.set)
        if error.lost and endpoint.down is None:
            self._fleet.is_down(endpoint, str(error))
        self._fleet.say_failing(endpoint, str(error))
        if await self._is_poisoned(endpoint, job, error):
            self._aborted += 1
            await self._deliver(job, self._api.aborted(job.wanted), {})
            return
        # Spread out: not all at once again.
        loop.call_later(job.pause * random.uniform(0.5, 1.5), self._again, job)
        job.pause = min(2 * job.pause, fleet.BACKOFF_S[1])

    def _again(self, job: _Job) -> None:
        self._ready.append(job)
        self._wake.set()

    async def _is_poisoned(self, endpoint: Endpoint, job: _Job, error: RetryableError) -> bool:
        """Whether a request that failed will never be answered though the server is well. False: try again.

        Raises:
            InputError: the servers are not well, and have had their time.
        """
        now = time.monotonic()
        often = job.failures[endpoint] >= POISONED_AFTER
        if often and endpoint.answered > job.answered_then[endpoint]:
            return True
        # That others answer shows nothing: it may be this server that is not well.
        silent_s = now - max(job.failing_since, self._answered_at, endpoint.asked_to_rest_until)
        if silent_s <= self._fleet.patience_s:
            return False
        # Nothing was answered for long. That may be because the others' answers take long.
        if any(other.sent < now - self._fleet.patience_s / 2 for other in self._under_way):
            if await self._fleet.any_healthy(generates=False):
                return False
        # Or because only requests that fail are left: a server has answered others and still generates.
        # A remote one that says it is well may refuse us forever, say when no credit is left.
        elif (
            self._well
            and not self._under_way
            and (often or not endpoint.remote)
            and await self._fleet.any_healthy(generates=True)
        ):
            return often
        raise self._fleet.given_up(silent_s, str(error)) from None

    async def _report(self, screen: Screen) -> None:
        """A progress line every PROGRESS_S."""
        if before := len(self._journal):
            print(f"resuming after {before} of {self._schedule.expected} completions", file=sys.stderr, flush=True)
        while True:
            await asyncio.sleep(PROGRESS_S)
            self._journal.sync()  # answers may be far apart, and only an append finds that a sync is due
            screen.show(self.meters.line(self._schedule.expected, self._fleet.endpoints))
