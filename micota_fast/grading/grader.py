"""Is the final answer right?  A pool of processes that compare answers under limits that hold.

Answers of special forms (choices, times, ratios, units) are judged in this process (`forms`), and so are pairs that can
be read exactly (`exact`), so most corpora need a worker for few pairs. The rest is read by math-verify
(https://github.com/huggingface/Math-Verify), which parses LaTeX into sympy, and compared by its rules but for those
that `comparison` replaces; what one number shows to differ (`refute`) is not simplified. sympy may need unbounded time
or memory (`10^{10^{10}}`, `99999999!`), and math-verify's own limits are SIGALRM-based and turn a time-out into a
silent "not equal". So each comparison runs in a process (`worker`) whose limits the kernel enforces, and a pair that
hits one is reported as `timeout` or `crashed`, never as `wrong`.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from micota_fast.grading.answers import extract_boxed, final_answer
from micota_fast.grading.exact import settle
from micota_fast.grading.forms import judge
from micota_fast.grading.spelling import normalise

__all__ = ["Grader", "Status", "Verdict", "extract_boxed", "grade"]

Status = Literal["correct", "wrong", "no_answer", "timeout", "crashed"]


@dataclass(frozen=True)
class Verdict:
    """`status` and the answer as it stood in the box (None if there was no complete box).

    `timeout`: the comparison used up its time; `crashed`: it ran out of memory or took its worker down. Neither says
    anything about the answer, so both are counted apart from `wrong`.
    """

    status: Status
    extracted: str | None


class Grader:
    """A pool of comparing processes; use as a context manager.

    Args:
        workers: processes at most; None takes one for each usable core. None starts before a pair needs one.
        timeout_s: CPU seconds one comparison may use before its worker is killed by the kernel. (CPU time, so that a
            verdict does not depend on how busy the machine is; six times as much wall-clock time ends it as well.)
        memory_bytes: memory a worker may take above what it starts with (enforced as address space, RLIMIT_AS).

    The verdicts do not depend on the number of workers. They are symmetric (answer and gold may be exchanged) but for
    two cases in which math-verify asks what the gold answer is: an equation such as 2x + y = 4 is not answered by its
    right side, while 4 is answered by `2x + y = 4`; and a tuple is not answered by a set, while a set is answered by a
    tuple in any order. An inequality and an interval of the same numbers are equal either way.

    From asyncio, grade with `await asyncio.to_thread(grader.grade, pairs)`: `grade` blocks its thread only, may run in
    any thread (it uses no signals; the workers know nothing of threads), and calls from several threads wait for each
    other. Cancelling the await does not end the thread's work; `close()`, from any thread, does. Do not use one grader
    on both sides of a fork.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 5.0, memory_bytes: int = 2 << 30) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self._pool: list[_Worker] = []
        self._grading = threading.Lock()
        self._closing = False

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers and wait for their end; the grader may be used again afterwards.

        A `grade` that runs in another thread raises RuntimeError.
        """
        self._closing = True
        for worker in list(self._pool):
            worker.process.kill()  # wakes the thread that waits for it
        with self._grading:
            self._kill_workers()
            self._closing = False

    def _kill_workers(self) -> None:
        while self._pool:
            self._pool.pop().kill()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdict for each (completion text, gold answer), in their order. No text makes it raise.

        Equal pairs are compared once.

        Raises:
            RuntimeError: a worker could not be started, or the grader was closed meanwhile.
        """
        extracted = [final_answer(text, gold) for text, gold in pairs]
        keys: list[tuple[str, str] | None] = []
        settled: dict[tuple[str, str], Status] = {}
        open_: dict[tuple[str, str], list[tuple[str, str]]] = {}  # and the comparisons that decide each
        for answer, (_, gold) in zip(extracted, pairs, strict=True):
            if answer is None or not answer:
                keys.append(None)
                continue
            key = (normalise(answer), normalise(gold))
            keys.append(key)
            if key in settled or key in open_:
                continue
            status, undecided = _without_sympy(*key)
            if status is None:
                open_[key] = undecided
            else:
                settled[key] = status
        if open_:
            with self._grading:
                compared = self._compare(
                    list(dict.fromkeys(pair for undecided in open_.values() for pair in undecided))
                )
            for key, undecided in open_.items():
                settled[key] = min((compared[pair] for pair in undecided), key=_WEIGHT.index)
        return [
            Verdict("no_answer" if key is None else settled[key], answer)
            for key, answer in zip(keys, extracted, strict=True)
        ]

    def _compare(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Status]:
        """Let the workers settle the pairs, each worker one pair at a time."""
        verdicts: dict[tuple[str, str], Status] = {}
        waiting = deque(keys)
        tried: set[tuple[str, str]] = set()
        try:
            with selectors.DefaultSelector() as selector:
                for worker in self._pool:
                    selector.register(worker.answers, selectors.EVENT_READ, worker)
                while len(verdicts) < len(keys):
                    if self._closing:
                        raise RuntimeError("the grader was closed while it graded")
                    while len(self._pool) < min(self.workers, len(keys) - len(verdicts)):
                        self._pool.append(_Worker(self.timeout_s, self.memory_bytes))
                        selector.register(self._pool[-1].answers, selectors.EVENT_READ, self._pool[-1])
                    for worker in self._pool:
                        if waiting and worker.idle:
                            worker.send(waiting.popleft())
                    deadline = min(worker.deadline for worker in self._pool)
                    heard = {key.data for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                    if self._closing:
                        continue
                    now = time.monotonic()
                    for worker in list(self._pool):
                        if worker not in heard and now < worker.deadline:
                            continue
                        pair = worker.pair
                        status, usable = worker.receive() if worker in heard else worker.overdue()
                        if pair is not None and status is not None:
                            # Why a worker died is not known, so the pair that it died on has a second try.
                            if status == "crashed" and worker.process.returncode is not None and pair not in tried:
                                tried.add(pair)
                                waiting.appendleft(pair)
                            else:
                                verdicts[pair] = status
                        if not usable:
                            selector.unregister(worker.answers)
                            worker.kill()
                            self._pool.remove(worker)
        except BaseException:
            self._kill_workers()  # an interrupted comparison must not answer for a later pair
            raise
        return verdicts


_WEIGHT: list[Status] = ["correct", "timeout", "crashed", "wrong"]  # of several comparisons, the first of these counts


def grade(pairs: Sequence[tuple[str, str]], workers: int | None = None) -> list[Verdict]:
    """Judge each (completion text, gold answer), in their order, with a `Grader` of this call's own.

    Args:
        pairs: the answer is what stands in the last \\boxed{} of the text.
        workers: processes at most; None: one per usable core. Most pairs need none.

    Raises:
        RuntimeError: a worker could not be started.
    """
    with Grader(workers) as grader:
        return grader.grade(pairs)


def _without_sympy(answer: str, gold: str) -> tuple[Status | None, list[tuple[str, str]]]:
    """The verdict on a pair, or the comparisons that decide it."""
    judged = judge(answer, gold)
    if isinstance(judged, str):
        return judged, []
    undecided = []
    for pair in judged:
        status = settle(*pair)
        if status == "correct":
            return status, []
        if status is None:
            undecided.append(pair)
    return (None, undecided) if undecided else ("wrong", [])


class _Worker:
    """One comparing process as its parent sees it: JSON lines in, JSON lines out, one pair at a time."""

    START_LIMIT_S = 300.0

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            # -P: a module lying in the current directory must not stand in for one of ours
            [sys.executable, "-P", "-m", "micota_fast.grading.worker", str(timeout_s), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # sympy's order of terms may follow the hashes of strings; one thread, as the pool is the parallelism
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            process_group=0,  # a Ctrl-C at the terminal reaches us alone; we decide what ends
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.questions = self.process.stdin
        self.answers = self.process.stdout
        self.timeout_s = timeout_s
        self.started = False
        self.pair: tuple[str, str] | None = None
        self.deadline = time.monotonic() + self.START_LIMIT_S

    @property
    def idle(self) -> bool:
        return self.started and self.pair is None

    def send(self, pair: tuple[str, str]) -> None:
        self.pair = pair
        self.deadline = time.monotonic() + 6 * self.timeout_s
        with contextlib.suppress(BrokenPipeError):  # it died; its closed stdout says so next
            self.questions.write(json.dumps(pair).encode() + b"\n")
            self.questions.flush()

    def receive(self) -> tuple[Status | None, bool]:
        """Return the pair's status, or None for the greeting, and whether the worker can take another pair."""
        line = self.answers.readline()
        if not line:
            code = self.process.wait()
            if not self.started:
                raise RuntimeError(f"a grading worker did not start (exit status {code}); its message is above")
            return ("timeout" if code == -signal.SIGPROF else "crashed"), False
        self.deadline = float("inf")
        self.pair = None
        if not self.started:
            self.started = True
            return None, True
        answer = json.loads(line)
        return answer["status"], not answer["grown"]

    def overdue(self) -> tuple[Status, bool]:
        if not self.started:
            raise RuntimeError(f"a grading worker did not start within {self.START_LIMIT_S:.0f} s")
        return "timeout", False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):  # what it had not read is of no use to it
            self.questions.close()
