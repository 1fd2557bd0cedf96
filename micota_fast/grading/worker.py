"""The process that compares two answers by math-verify for `grade.Grader`, under limits that the kernel enforces."""

import json
import os
import resource
import signal
import sys
from functools import lru_cache

CACHED = 1000  # characters; what is longer is parsed each time, so that the cache stays small


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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the parent, with which we end
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging

    from micota_fast.grading.comparison import equal, read

    logging.disable(logging.CRITICAL)
    # Nothing but our answers may reach the pipe; what the parsers print about hostile input helps nobody.
    answers = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    read_cached = lru_cache(maxsize=1024)(read)  # gold answers recur over samples, and so do wrong ones

    def equal_texts(answer: str, gold: str) -> bool:
        return equal(*(read(text) if len(text) > CACHED else read_cached(text) for text in (gold, answer)))

    read("\\frac{x}{2}")  # builds the parser's tables
    space, at_start = _own_memory()
    resource.setrlimit(resource.RLIMIT_AS, (space + memory_bytes, space + memory_bytes))
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        answer, gold = json.loads(line)
        before = _own_memory()[1]
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        try:
            status = "correct" if equal_texts(answer, gold) else "wrong"
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
