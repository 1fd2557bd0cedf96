r"""The grader's traps: what counts as the final answer, what is equal, and what a hostile answer may cost."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from micota_fast import grade as grading
from micota_fast.grade import Grader, Status, Verdict, extract_boxed, normalise

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{1}, no: \boxed{2} and some text after it", "2"),
        (r"\boxed{3} and \fbox{4}", "4"),
        (r"\fbox{4} and \boxed{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{a \\ {b}}", r"a \\ {b}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed { 7 }", "7"),
        ("\\boxed\n{7}", "7"),
        (r"\boxed 7 is it", "7"),
        (r"is $\boxed 7$.", "7"),
        (r"\boxed\frac{1}{2}, so", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{7", None),
        (r"\boxed{1} then \boxed{\frac{1", None),  # cut off: the last box counts, and it is not complete
        (r"\boxed", None),
        (r"\boxedanswer{3} and \boxed{2} and \fboxsep{1}", "2"),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, answer: str | None) -> None:
    assert extract_boxed(text) == answer


def test_extract_boxed_is_linear() -> None:
    started = time.perf_counter()
    assert extract_boxed("\\boxed{" * 50_000) is None
    assert extract_boxed("\\boxed" + "{" * 500_000) is None
    assert extract_boxed("\\boxed{" + "{" * 250_000 + "}" * 250_000 + "}") is not None
    assert time.perf_counter() - started < 5


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, timeout_s=10) as grader:
        yield grader


EQUAL = [
    ("7", "7"),
    ("7", " 7. "),
    ("7", "$7$"),
    ("7", r"x=7"),
    ("7", r"x = 7"),
    ("-3", "−3"),  # U+2212
    ("025", "25"),
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("1000", r"1\,000"),
    ("1000", r"1{,}000.0"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac{2}{4}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{5}{2}", r"2\frac{1}{2}"),
    (r"\frac{1}{3}", "0.333333"),
    (r"50\%", "50%"),
    ("50", r"50\%"),
    ("12", r"12\text{ cm}"),
    ("12", "12 cm"),
    ("90", r"90^\circ"),
    ("90", "90°"),
    ("18", r"\$18"),
    (r"\text{(B)}", "B"),
    ("B", r"\textbf{(B)}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"[0,\infty)", r"\left[0, \infty\right)"),
    (r"\{1,2,3\}", r"\{3, 2, 1\}"),
    ("1,2", "2, 1"),
    (r"\pi", "π"),
    (r"2\pi", r"2 \pi"),
    (r"\sqrt{2}", r"\sqrt2"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("10^{10^{10}}", "10^{10^{10}}"),  # equal as it stands: nobody has to work it out
]

DIFFERENT = [
    ("7", "8"),
    ("7", "-7"),
    ("7", "7.001"),
    ("1000", "1.000001"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{2}", "0.499"),
    (r"\frac{1}{3}", "0.333"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\sqrt{2}", "1.414"),
    (r"\pi", "3.14"),
    ("B", "C"),
    (r"\text{Evelyn}", "Carla"),
    ("x^2", "x^3"),
    ("5", r"\frac{5}{2}"),
    ("12", r"1 2"),
    ("7", "\x00\x01"),
    ("7", "🙂"),
    ("7", r"\frac{"),
    ("7", r"\undefinedcommand{7"),
    ("7", "}{"),
]


@pytest.mark.parametrize(
    ("gold", "answer", "status"),
    [(*pair, "correct") for pair in EQUAL] + [(*pair, "wrong") for pair in DIFFERENT],
)
def test_verdict(grader: Grader, gold: str, answer: str, status: Status) -> None:
    text = f"Thus the answer is $\\boxed{{{answer}}}$, as was to be shown."
    if extract_boxed(text) != answer.strip():
        text = f"\\boxed {answer}"  # unbalanced: only so can it be an answer at all
    assert grader.grade([(text, gold)])[0].status == status


def test_no_answer_and_order(grader: Grader) -> None:
    texts = ["no box", r"\boxed{}", r"\boxed{ }", r"\boxed{7", r"\boxed{2x}", r"\boxed{7}", r"\boxed{8}"]
    verdicts = grader.grade([(text, "7") for text in texts])
    assert [verdict.status for verdict in verdicts] == ["no_answer"] * 4 + ["wrong", "correct", "wrong"]
    assert verdicts[4] == Verdict("wrong", "2x")
    assert verdicts[0].extracted is None


def test_the_fast_path_agrees_with_math_verify(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)

    def number() -> str:
        a, b, c = rng.randrange(12), rng.randrange(5), rng.randrange(1, 5)
        forms = [f"{a}", f"{a:03}", f"{b}.{c}", f"{b}.{c}0", f"\\frac{{{b}}}{{{c}}}", f"{a}/{c}", f"{c},000", f"\\${a}",
                 f"\\frac{b}{c}", f"\\dfrac{{-{b}}}{{{c}}}", f"{c}000", f"{b}.333333", f"{b}.0000015"]  # fmt: skip
        return rng.choice(["", "-"]) + rng.choice(forms)

    pairs = [(number(), number()) for _ in range(500)]
    fast = [grading._certain(normalise(answer), normalise(gold)) for answer, gold in pairs]
    assert sum(status is not None for status in fast) > 400
    assert {"correct", "wrong"} <= set(fast)
    monkeypatch.setattr(grading, "_certain", lambda answer, gold: None)
    slow = grader.grade([(f"\\boxed{{{answer}}}", gold) for answer, gold in pairs])
    differing = [
        (pair, ours, theirs.status)
        for pair, ours, theirs in zip(pairs, fast, slow, strict=True)
        if ours is not None and ours != theirs.status
    ]
    assert not differing


def test_plain_answers_start_no_worker_and_import_no_sympy() -> None:
    code = (
        "import sys; from micota_fast.grade import Grader\n"
        "with Grader() as g:\n"
        "    v = g.grade([('\\\\boxed{7}', '7'), ('\\\\boxed{1/2}', '0.5'), ('\\\\boxed{3}', '4'), ('', '1')])\n"
        "    assert not g._pool\n"
        "print([x.status for x in v], 'sympy' in sys.modules, 'math_verify' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['correct', 'correct', 'wrong', 'no_answer'] False False"


def test_one_and_many_workers_agree() -> None:
    answers = [answer for pair in EQUAL + DIFFERENT for answer in pair if extract_boxed(f"\\boxed{{{answer}}}")]
    pairs = [(f"\\boxed{{{a}}}", b) for a in answers[:20] for b in answers[::16]]
    with Grader(workers=1) as one, Grader(workers=2) as two:
        assert one.grade(pairs) == two.grade(pairs)


HOSTILE = [
    "10^{10^{10}}",
    "99999999!",
    r"\sum_{n=1}^{10^{9}} \sin(n!)",
    "{" * 50_000 + "}" * 50_000,
    "2" * 100_000,
    "\u202e" * 1_000 + "∑∏∫" * 1_000,
]


ENDLESS = 3  # the first of them, whose comparison certainly takes for ever


def test_hostile_answers_end_and_are_never_wrong_for_lack_of_time() -> None:
    limit_s = 0.4
    with Grader(workers=1, timeout_s=limit_s) as grader:
        grader.grade([(r"\boxed{2x}", "2y")])  # start the worker
        for number, hostile in enumerate(HOSTILE):
            started = time.monotonic()
            status = grader.grade([(f"\\boxed{{{hostile}}}", "7")])[0].status
            # six times the limit is the bound in wall-clock time; the rest is a fresh worker's start on a busy machine
            assert time.monotonic() - started < 6 * limit_s + 30
            assert status in ("timeout", "crashed", "wrong"), hostile[:30]
            assert status == "timeout" or number >= ENDLESS, hostile[:30]
        assert grader.grade([(r"\boxed{x+x}", "2x")])[0].status == "correct"


@pytest.mark.parametrize(
    ("headroom", "limit_s", "statuses"), [(64 << 20, 20.0, {"crashed"}), (12 << 20, 2.0, {"crashed", "timeout"})]
)
def test_lack_of_memory_is_never_wrong_and_the_worker_replaced(
    headroom: int, limit_s: float, statuses: set[str]
) -> None:
    """This parse takes 22 MB: with 64 it ends, but has taken too much to be believed; with 12 it cannot end."""
    with Grader(workers=1, timeout_s=limit_s, memory_bytes=headroom) as grader:
        verdict, after = grader.grade([(f"\\boxed{{{'x+' * 8_000}x}}", "7"), (r"\boxed{x+x}", "2x")])
    assert verdict.status in statuses
    assert after.status == "correct"


def test_a_killed_worker_is_replaced() -> None:
    with Grader(workers=1) as grader:
        assert grader.grade([(r"\boxed{2x}", "2y")])[0].status == "wrong"
        grader._pool[0].process.kill()
        grader._pool[0].process.wait()
        statuses = [v.status for v in grader.grade([(r"\boxed{x+x}", "2x"), (r"\boxed{y+y}", "2y")])]
        assert statuses == ["crashed", "correct"]


def test_workers_end_with_the_grader_and_with_their_parent() -> None:
    with Grader(workers=2) as grader:
        grader.grade([(r"\boxed{2x}", "2y"), (r"\boxed{3x}", "3y")])
        pids = [worker.process.pid for worker in grader._pool]
    assert len(pids) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)

    code = (
        "import os, signal; from micota_fast.grade import Grader\n"
        "g = Grader(workers=1, timeout_s=1); g.grade([('\\\\boxed{2x}', '2y')])\n"
        "print(g._pool[0].process.pid, flush=True)\n"
        "g._pool[0].send(('99999999!', '7'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 30
    while _alive(pid):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
@pytest.mark.parametrize("name", ["aime2024", "amc23", "gsm8k_test", "math500"])
def test_every_gold_answer_equals_itself(grader: Grader, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
        golds = [json.loads(line)["answer"] for line in lines]
    pairs = [(f"Let us see. \\boxed{{{gold}}} is the answer.", gold) for gold in golds]
    assert [pair for pair, verdict in zip(pairs, grader.grade(pairs), strict=True) if verdict.status != "correct"] == []
    if name == "math500":  # and without the short cut for equal strings, on a sample
        monkeypatch.setattr(grading, "_certain", lambda answer, gold: None)
        sample = pairs[::10]
        assert {verdict.status for verdict in grader.grade(sample)} == {"correct"}
