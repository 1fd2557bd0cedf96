"""Is the final answer right?  Extraction of the boxed answer and comparison under a limit that holds.

The comparison is math-verify's (https://github.com/huggingface/Math-Verify), which parses LaTeX into sympy. sympy may
need unbounded time or memory (`10^{10^{10}}`, `99999999!`), and math-verify's own limits are SIGALRM-based and turn a
time-out into a silent "not equal". So each comparison runs in a worker process whose limits the kernel enforces, and a
pair that hits one is reported as `timeout` or `crashed`, never as `wrong`. Pairs whose verdict is certain without
sympy (equal strings, plain numbers) are settled in this process, so that most corpora never start a worker.
"""

import contextlib
import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Status = Literal["correct", "wrong", "no_answer", "timeout", "crashed"]

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")


@dataclass(frozen=True)
class Verdict:
    """`status` and the answer as it stood in the box (None where there was no complete box).

    `timeout`: the comparison used up its time; `crashed`: it ran out of memory or took its worker down. Neither says
    anything about the answer, so both are counted apart from `wrong`.
    """

    status: Status
    extracted: str | None


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` of a text, stripped; None if there is none or it never closes.

    Braces nest; escaped ones (`\{`) do not count. `\boxed 7` without braces yields what follows up to white space, a
    dollar sign or the end. Where boxes are nested the innermost last one counts. Linear in the length of the text.
    """
    start = -1
    for match in _BOX.finditer(text, max(text.rfind("\\boxed"), text.rfind("\\fbox"), 0)):
        start = match.end()
    if start < 0:  # the last occurrence was another command, such as \boxedtext: look at all
        for match in _BOX.finditer(text):
            start = match.end()
    if start < 0:
        return None
    if text[start : start + 1] != "{":
        bare = re.compile(r"[^\s$]+").match(text, start)
        return bare.group().rstrip(".,;:") or None if bare else None
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if token.group() == "{":
            depth += 1
        elif token.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : token.start()].strip()
    return None


# Unicode that models write where LaTeX has a command; math-verify would not parse it.
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "°": "^\\circ ", "％": "\\%"}
    | {"≤": "\\le ", "≥": "\\ge ", "√": "\\sqrt ", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_TIDY = (
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z.])"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))"), ""),  # 1{,}000 and 1\,000
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![\w\\]) | (?!\w)"), ""),  # a space matters only between two word characters and after a \
)


def normalise(answer: str) -> str:
    r"""One spelling for what only looks different: white space, dollar signs around, `\dfrac`, `\left`, a full stop."""
    answer = answer.translate(_UNICODE).strip()
    while len(answer) > 1 and answer[0] == "$" == answer[-1] and answer[-2] != "\\":
        answer = answer[1:-1].strip()
    for pattern, replacement in _TIDY:
        answer = pattern.sub(replacement, answer)
    return answer.strip().removesuffix(".")


_INTEGER = r"\d{1,15}|[1-9]\d{0,2}(?:,\d{3}){1,4}"
_NUMBER = re.compile(
    rf"(?P<sign>-?)(?:\\\$)?(?:(?P<int>{_INTEGER})|(?P<dec>\d{{1,9}}\.\d{{1,6}})"
    r"|\\frac(?:(?P<a>\d)(?P<b>\d)|\{(?P<c>-?\d{1,9})\}\{(?P<d>\d{1,9})\})|(?P<e>\d{1,9})/(?P<f>\d{1,9}))"
)


def _number(normalised: str) -> Fraction | None:
    """The value of a plain integer, decimal or fraction; None for anything else."""
    match = _NUMBER.fullmatch(normalised)
    if match is None:
        return None
    part = match.groupdict()
    if part["int"] is not None:
        value = Fraction(int(part["int"].replace(",", "")))
    elif part["dec"] is not None:
        value = Fraction(part["dec"])
    else:
        denominator = int(part["b"] or part["d"] or part["f"])
        if denominator == 0:
            return None
        value = Fraction(int(part["a"] or part["c"] or part["e"]), denominator)
    return -value if part["sign"] else value


def _certain(answer: str, gold: str) -> Status | None:
    """The verdict where it certainly is math-verify's too, from two normalised strings; else None.

    math-verify rounds decimals to 6 places, so two different numbers are only certain to differ beyond that.
    """
    if answer == gold:
        return "correct"
    a, b = _number(answer), _number(gold)
    if a is None or b is None:
        return None
    if a == b:
        return "correct"
    return "wrong" if abs(a - b) > Fraction(2, 10**6) else None


class Grader:
    """A pool of comparing processes; use as a context manager.

    Args:
        workers: processes at most; None takes one for each usable core. None starts before a pair needs one.
        timeout_s: CPU seconds one comparison may use before its worker is killed by the kernel. (CPU time, so that a
            verdict does not depend on how busy the machine is; six times as much wall-clock time ends it as well.)
        memory_bytes: memory a worker may take above what it starts with (enforced as address space, RLIMIT_AS).

    The verdicts do not depend on the number of workers.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 5.0, memory_bytes: int = 2 << 30) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self._pool: list[_Worker] = []

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers; the grader may be used again afterwards."""
        while self._pool:
            self._pool.pop().kill()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdict for each (completion text, gold answer), in their order. Never raises on any text.

        Equal pairs are compared once.
        """
        extracted = [extract_boxed(text) for text, _ in pairs]
        keys: list[tuple[str, str] | None] = []
        settled: dict[tuple[str, str], Status] = {}
        open_: dict[tuple[str, str], None] = {}
        for answer, (_, gold) in zip(extracted, pairs, strict=True):
            if answer is None or not answer:
                keys.append(None)
                continue
            key = (normalise(answer), normalise(gold))
            keys.append(key)
            if key in settled or key in open_:
                continue
            status = _certain(*key)
            if status is None:
                open_[key] = None
            else:
                settled[key] = status
        settled.update(self._compare(list(open_)))
        return [
            Verdict("no_answer" if key is None else settled[key], answer)
            for key, answer in zip(keys, extracted, strict=True)
        ]

    def _compare(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Status]:
        """Let the workers settle the pairs, each worker one pair at a time."""
        verdicts: dict[tuple[str, str], Status] = {}
        waiting = deque(keys)
        while len(self._pool) < min(self.workers, len(keys)):
            self._pool.append(_Worker(self.timeout_s, self.memory_bytes))
        with selectors.DefaultSelector() as selector:
            for worker in self._pool:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            try:
                while len(verdicts) < len(keys):
                    for worker in self._pool:
                        if waiting and worker.idle:
                            worker.send(waiting.popleft())
                    deadline = min(worker.deadline for worker in self._pool)
                    events = selector.select(max(0.0, deadline - time.monotonic()))
                    now = time.monotonic()
                    heard = {key.data for key, _ in events}
                    for worker in list(self._pool):
                        if worker not in heard and now < worker.deadline:
                            continue
                        pair = worker.pair
                        status, usable = worker.receive() if worker in heard else worker.overdue()
                        if pair is not None and status is not None:
                            verdicts[pair] = status
                        if not usable:
                            selector.unregister(worker.answers)
                            worker.kill()
                            self._pool.remove(worker)
                            if waiting:
                                self._pool.append(_Worker(self.timeout_s, self.memory_bytes))
                                selector.register(self._pool[-1].answers, selectors.EVENT_READ, self._pool[-1])
            except BaseException:
                self.close()  # an interrupted comparison must not answer for a later pair
                raise
        return verdicts


class _Worker:
    """One comparing process as its parent sees it: JSON lines in, JSON lines out, one pair at a time."""

    START_LIMIT_S = 300.0

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            # -P: a module lying in the current directory must not stand in for one of ours
            [sys.executable, "-P", "-m", "micota_fast.grade", str(timeout_s), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # sympy's order of terms may follow the hashes of strings; one thread, as the pool is the parallelism
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
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
        """(status of the pair, or None for the greeting; whether the worker can go on)."""
        line = self.answers.readline()
        if not line:
            code = self.process.wait()
            if not self.started:
                raise RuntimeError(f"a grading worker did not start (exit status {code}); its message stands above")
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


def _own_memory() -> tuple[int, int]:
    """(address space, peak resident size) of this process, bytes.

    Not from getrusage: its ru_maxrss starts at the size of the process that we were forked from.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        values = dict(line.split(":", 1) for line in status)
    space, peak = (int(values[key].split()[0]) * 1024 for key in ("VmSize", "VmHWM"))
    return space, peak


def _serve(timeout_s: float, memory_bytes: int) -> None:
    """The worker's side: read a pair, compare, answer, until the input ends.

    The kernel ends the process by SIGPROF (default action) when one comparison has used `timeout_s` of CPU time, also
    inside one long C call and also when the parent is gone. math-verify swallows MemoryError, so a "wrong" after the
    comparison has taken much of the memory is not believed but reported as `crashed`.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # Nothing but our answers may reach the pipe; what the parsers print about hostile input helps nobody.
    answers = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(answer: str) -> list[Any]:
        return parse(f"\\boxed{{{answer}}}", targets, parsing_timeout=None)

    read_gold = lru_cache(maxsize=64)(read)
    parse("\\boxed{\\frac{x}{2}}", targets, parsing_timeout=None)  # builds the parser's tables
    space, at_start = _own_memory()
    resource.setrlimit(resource.RLIMIT_AS, (space + memory_bytes, space + memory_bytes))
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        answer, gold = json.loads(line)
        before = _own_memory()[1]
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        try:
            equal = bool(verify(read_gold(gold), read(answer), timeout_seconds=None))
            status: Status = "correct" if equal else "wrong"
        except MemoryError:
            status = "crashed"
        except Exception:  # math-verify found no way to compare: not equal, as in its own rule
            status = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        after = _own_memory()[1]
        if status == "wrong" and after - before > memory_bytes // 8:
            status = "crashed"
        answers.write(json.dumps({"status": status, "grown": after - at_start > memory_bytes // 4}).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
