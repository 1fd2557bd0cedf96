r"""The grader's traps: what counts as the final answer, what is equal, and what a hostile answer may cost."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paths import DATA
from helpers.spellings import Spellings
from helpers.waiting import alive, soon, standstill, wait_for
from micota_fast.grading.answers import extract_boxed
from micota_fast.grading.exact import settle
from micota_fast.grading.grader import Grader, Status, Verdict
from micota_fast.grading.spelling import normalise


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
    with soon():
        assert extract_boxed("\\boxed{" * 50_000) is None
        assert extract_boxed("\\boxed" + "{" * 500_000) is None
        assert extract_boxed("\\boxed{" + "{" * 250_000 + "}" * 250_000 + "}") is not None
        for unit in ("$", "$ ", " ", "1,", "{,}000", "\\dfrac", "\\left(", "\\!", ".", "π"):
            assert len(normalise(unit * (1_000_000 // len(unit)))) <= 4_000_000


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


# (completion, gold answer, our verdict): what counts as the answer, and what is equal. math-verify alone, called as its
# README says on the completion and on the boxed gold answer, says otherwise where a reason stands.
TABLE: list[tuple[str, str, Status, str]] = [
    (r"first \boxed{6}, no: \boxed{7}", "7", "correct", "boxes that stand near are one set to it, {6, 7}"),
    (r"\boxed{7} and \fbox{8}", "8", "wrong", ""),  # two answers to one question
    (r"\boxed{6}, \boxed{7}", "6,7", "correct", ""),
    (r"\fbox{7}", "7", "correct", "it looks for \\fbox in mathematics only"),
    (r"\boxed{7}. The final answer is $8$. I hope it is correct.", "7", "correct", "it takes the Minerva phrase first"),
    (r"\boxed{7}, as $x = 6$ shows", "7", "correct", ""),
    (r"\boxed 7", "7", "correct", ""),
    (r"the answer is $7$", "7", "no_answer", "it takes what it finds where there is no box"),
    (r"\boxed{12 \mathrm{~cm}}", "12", "correct", ""),
    (r"\boxed{12\ \text{cm}^2}", "12", "correct", ""),
    (r"\boxed{18 dollars}", "18", "correct", "no unit that it knows: a product of letters"),
    (r"\boxed{1\,000}", "1000", "correct", "the thin space is no separator to it"),
    (r"\boxed{1 000}", "1000", "correct", "the space is no separator to it"),
    (r"\boxed{90°}", "90", "correct", "Unicode is not read by its parser"),
    (r"\boxed{√2}", r"\sqrt{2}", "correct", "Unicode is not read by its parser"),
    (r"\boxed{7.}", "7", "correct", "the full stop makes it 7. and the comparison fails"),
    (r"\boxed{50\%}", "50", "correct", ""),
    (r"\boxed{50\%}", r"\frac12", "correct", ""),
    (r"\boxed{50 percent}", r"50\%", "correct", ""),
    (r"\boxed{12.5\%}", "12.5", "correct", "only whole percentages equal the bare number to it"),
    (r"\boxed{3\frac{1}{2}}", r"\frac{7}{2}", "correct", ""),
    (r"\boxed{-3\frac{1}{2}}", "-3.5", "correct", ""),
    (r"\boxed{3 1/2}", "3.5", "correct", "it reads mixed numbers in LaTeX only"),
    (r"\boxed{(0,1)}", "[0,1)", "wrong", ""),
    (r"\boxed{0 \le x < 1}", "[0,1)", "correct", "it lets an interval answer an inequality, but not the reverse"),
    (r"\boxed{[0,1)}", r"0 \le x < 1", "correct", ""),
    (r"\boxed{x \in [0,1)}", "[0,1)", "correct", ""),
    (r"\boxed{(-\infty, 1] \cup [2, \infty)}", r"(-\infty,1]\cup[2,\infty)", "correct", ""),
    (r"\boxed{2, 1}", "1,2", "correct", ""),
    (r"\boxed{1 \text{ and } 2}", r"\{2, 1\}", "correct", ""),
    (r"\boxed{x = 1 \text{ or } x = 2}", "1,2", "correct", ""),
    (r"\boxed{\pm 1}", "-1,1", "correct", ""),
    (r"\boxed{(1,2)}", "(2,1)", "wrong", ""),
    (r"\boxed{1,2,3}", "(3,2,1)", "wrong", ""),
    (r"\boxed{(3,2,1)}", "1,2,3", "correct", ""),  # a set is answered by a tuple
    (r"\boxed{[3,1]}", "(3,1)", "correct", ""),  # no interval, so two tuples to it
    (r"\boxed{\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "correct", ""),
    (r"\boxed{\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}}", r"\begin{pmatrix} 0.5 \\ 3 \end{pmatrix}", "correct", ""),
    (r"\boxed{(1,2)}", r"\begin{pmatrix}1\\2\end{pmatrix}", "correct", "a column is no tuple to it"),
    (r"\boxed{5}", "x=5", "correct", ""),
    (r"\boxed{y = 2x + 3}", "y=3+2x", "correct", ""),
    (r"\boxed{y = 4 - 2x}", "2x+y=4", "correct", ""),
    (r"\boxed{m+n=25}", "25", "correct", ""),
    (r"\boxed{25}", "m+n=25", "correct", ""),
    (r"\boxed{4}", "2x+y=4", "wrong", ""),  # an equation is not answered by its right side, unless symbols stand left
    (r"\boxed{\mathrm{B}}", r"\textbf{(B)}", "correct", ""),
    (r"\boxed{(B) 7}", "B", "correct", "it reads a product"),
    (r"\boxed{\text{Yes}}", r"\text{yes}", "correct", ""),
    (r"\boxed{\text{Even}}", r"\text{odd}", "wrong", ""),
    (r"\boxed{2ab}", "2", "wrong", "it takes ab for a unit"),
    (r"\boxed{2t}", "2", "wrong", "it takes t for a unit"),
    (r"\boxed{12_5}", "12_7", "wrong", "it drops the base of a number"),
]


def test_table(grader: Grader) -> None:
    verdicts = grader.grade([(completion, gold) for completion, gold, _, _ in TABLE])
    assert [(row[:2], verdict.status) for row, verdict in zip(TABLE, verdicts, strict=True)] == [
        (row[:2], row[2]) for row in TABLE
    ]


def test_where_math_verify_says_otherwise() -> None:
    code = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
for completion, gold in json.load(sys.stdin):
    print("correct" if verify(parse("\\\\boxed{" + gold + "}"), parse(completion)) else "wrong")
"""
    rows = json.dumps([row[:2] for row in TABLE])
    theirs = subprocess.run([sys.executable, "-c", code], input=rows, capture_output=True, text=True, check=True)
    for (completion, gold, ours, reason), verdict in zip(TABLE, theirs.stdout.split(), strict=True):
        assert (verdict != ours) == bool(reason), (completion, gold, verdict)


def test_plain_answers_start_no_worker_and_import_no_sympy() -> None:
    code = (
        "import sys; from micota_fast.grading.grader import Grader\n"
        "with Grader() as g:\n"
        "    v = g.grade([('\\\\boxed{7}', '7'), ('\\\\boxed{1/2}', '0.5'), ('\\\\boxed{3}', '4'), ('', '1')])\n"
        "    assert not g._pool\n"
        "print([x.status for x in v], 'sympy' in sys.modules, 'math_verify' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['correct', 'correct', 'wrong', 'no_answer'] False False"


def mixed_pairs(number: int) -> list[tuple[str, str]]:
    """Completions with gold answers: mostly cheap ones, and at least a tenth that must be asked of math-verify."""
    source = Spellings(7)
    answers = [answer for pair in EQUAL[:-1] + DIFFERENT for answer in pair if extract_boxed(f"\\boxed{{{answer}}}")]
    hard = [
        (answer, gold) for answer in answers for gold in answers if settle(normalise(answer), normalise(gold)) is None
    ]
    pairs = source.random.sample(hard, number // 10)
    while len(pairs) < number:
        pair = source.pair()
        if settle(*map(normalise, pair)) is not None:
            pairs.append(pair)
    source.random.shuffle(pairs)
    return [(f"It is \\boxed{{{answer}}}.", gold) for answer, gold in pairs]


@pytest.mark.parametrize("number", [400, pytest.param(2_000, marks=pytest.mark.slow)])
def test_one_and_many_workers_agree(number: int) -> None:
    pairs = mixed_pairs(number)
    with Grader(workers=1) as one, Grader(workers=3) as many:
        verdicts = one.grade(pairs)
        assert verdicts == many.grade(pairs)
    assert {verdict.status for verdict in verdicts} == {"correct", "wrong"}


def test_symmetric(grader: Grader) -> None:
    """But for an equation against a bare value and a tuple against a set, see `Grader`."""
    forms = [
        "1",
        "2x+1",
        "1+2x",
        "x^2",
        "x=1",
        "1<x<2",
        "(1,2)",
        "1<x\\le 2",
        "[1,2]",
        r"\sqrt{x}",
        r"\cos x",
        "A",
        r"\text{B}",
    ]
    forms += [r"\begin{pmatrix}1\\x\end{pmatrix}", r"(1,2)\cup(3,4)", "3+2i", r"\sqrt[3]{8}", "e", "100\\%", "0.333333"]
    forms += [r"\frac{1}{3}", "x", r"\{1,2\}", "1,2", "x>1", r"(1,\infty)"]
    pairs = [(a, b) for a in forms for b in forms if a < b and (a, b) != ("(1,2)", r"\{1,2\}")]
    there = grader.grade([(f"\\boxed{{{a}}}", b) for a, b in pairs])
    back = grader.grade([(f"\\boxed{{{b}}}", a) for a, b in pairs])
    assert [p for p, v, w in zip(pairs, there, back, strict=True) if v.status != w.status] == []
    assert any(v.status == "correct" for v in there)


def test_where_it_is_not_symmetric(grader: Grader) -> None:
    pairs = [("2x+y=4", "4"), ("(3,2,1)", "1,2,3"), ("(1,2)", r"\{1,2\}")]
    verdicts = grader.grade([(f"\\boxed{{{a}}}", b) for a, b in pairs] + [(f"\\boxed{{{b}}}", a) for a, b in pairs])
    assert [verdict.status for verdict in verdicts] == ["correct"] * 3 + ["wrong"] * 3


@given(st.text(max_size=40), st.text(alphabet="\\{}()^_$%&=,.0123456789abx \x00\ud800frcsqtboxed", max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_text_makes_it_raise(grader: Grader, text: str, answer: str) -> None:
    pairs = [(text, answer), (answer, text), (f"\\boxed{{{text}}}", answer), (f"\\boxed{{{answer}}}", text)]
    assert len(grader.grade(pairs)) == 4


HOSTILE = [
    "10^{10^{10}}",
    "99999999!",
    r"\sum_{n=1}^{10^{9}} \sin(n!)",
    "{" * 50_000 + "}" * 50_000,
    r"\frac{" * 1_000 + "1" + "}{2}" * 1_000,
    "2" * 100_000,
    "x" * 1_000_000,
    "$" * 1_000_000,
    "\u202e" * 1_000 + "∑∏∫" * 1_000,
    "7\x00",
    "\ud800\udc00\ud800",
]


ENDLESS = 3  # the first of them, whose comparison certainly takes for ever


def test_hostile_answers_end_and_are_never_wrong_for_lack_of_time() -> None:
    limit_s = 0.8
    with Grader(workers=1, timeout_s=limit_s) as grader:
        grader.grade([(r"\boxed{x^x}", "y^y")])  # start the worker
        for number, hostile in enumerate(HOSTILE):
            with soon():  # six times the limit is the bound in wall-clock time; the rest is a fresh worker's start
                status = grader.grade([(f"\\boxed{{{hostile}}}", "7")])[0].status
            assert status in ("timeout", "crashed", "wrong"), hostile[:30]
            assert status == "timeout" or number >= ENDLESS, hostile[:30]
        assert grader.grade([(r"\boxed{x^x+x}", "x+x^x")])[0].status == "correct"


@pytest.mark.parametrize(
    ("headroom", "limit_s", "statuses"), [(64 << 20, 100.0, {"crashed"}), (12 << 20, 2.0, {"crashed", "timeout"})]
)
def test_lack_of_memory_is_never_wrong_and_the_worker_replaced(
    headroom: int, limit_s: float, statuses: set[str]
) -> None:
    """This parse takes 22 MB: with 64 it ends, but has taken too much to be believed; with 12 it cannot end."""
    with Grader(workers=1, timeout_s=limit_s, memory_bytes=headroom) as grader:
        verdict, after = grader.grade([(f"\\boxed{{{'x+' * 8_000}x}}", "7"), (r"\boxed{x^x+x}", "x+x^x")])
    assert verdict.status in statuses
    assert after.status == "correct"


def test_a_killed_worker_is_replaced_and_its_pair_tried_again() -> None:
    with Grader(workers=1) as grader:
        assert grader.grade([(r"\boxed{2x+t^t}", "2y")])[0].status == "wrong"
        grader._pool[0].process.kill()
        grader._pool[0].process.wait()
        pairs = [(r"\boxed{x^x+x}", "x+x^x"), (r"\boxed{y^y+y}", "y+y^y")]
        assert [verdict.status for verdict in grader.grade(pairs)] == ["correct", "correct"]


def test_a_pair_that_takes_two_workers_down_is_crashed() -> None:
    with Grader(workers=1, timeout_s=60) as grader:
        done = threading.Event()

        def kill() -> None:
            while not done.wait(0.1):
                for worker in list(grader._pool):
                    if worker.pair is not None and "99999999!" in worker.pair:
                        worker.process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            pairs = [(r"\boxed{99999999!}", "7"), (r"\boxed{x^x+x}", "x+x^x")]
            assert [verdict.status for verdict in grader.grade(pairs)] == ["crashed", "correct"]
        finally:
            done.set()
            killer.join()


def test_signals_for_the_parent_do_not_end_a_worker() -> None:
    with Grader(workers=1) as grader:
        grader.grade([(r"\boxed{x^x+x}", "x+x^x")])
        worker = grader._pool[0]
        assert os.getpgid(worker.process.pid) != os.getpgrp()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            worker.process.send_signal(number)
        assert grader.grade([(r"\boxed{y^y+y}", "y+y^y")])[0].status == "correct"
        assert grader._pool == [worker]


def test_an_event_loop_goes_on_while_a_thread_grades() -> None:
    pairs = mixed_pairs(300)

    with Grader(workers=1) as grader:  # whose worker's start is most of the time
        verdicts, still = asyncio.run(standstill(asyncio.to_thread(grader.grade, pairs)))
        assert verdicts == grader.grade(pairs)
    assert still < 0.5


def test_threads_share_a_grader() -> None:
    pairs = mixed_pairs(60)
    with Grader(workers=2) as grader:
        results: list[list[Verdict]] = []
        threads = [threading.Thread(target=lambda: results.append(grader.grade(pairs))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(grader._pool) <= 2
        assert results == [grader.grade(pairs)] * 4


def test_close_ends_a_grading_in_another_thread_and_leaves_no_worker() -> None:
    async def main() -> None:
        grading = asyncio.create_task(asyncio.to_thread(grader.grade, [(r"\boxed{99999999!}", "7")] * 2))
        while not any(worker.pair for worker in list(grader._pool)):
            await asyncio.sleep(0.01)
        pids = [worker.process.pid for worker in grader._pool]
        grader.close()
        with pytest.raises(RuntimeError, match="closed"):
            await grading
        assert pids
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)

    with Grader(workers=2, timeout_s=60) as grader:
        asyncio.run(main())
        assert grader._pool == []
        assert grader.grade([(r"\boxed{x^x+x}", "x+x^x")])[0].status == "correct"  # it may be used again


def test_workers_end_with_the_grader_and_with_their_parent() -> None:
    with Grader(workers=2) as grader:
        grader.grade([(r"\boxed{x^x}", "y^y"), (r"\boxed{x^x+1}", "y^y")])
        pids = [worker.process.pid for worker in grader._pool]
    assert len(pids) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)

    code = (
        "import os, signal; from micota_fast.grading.grader import Grader\n"
        "g = Grader(workers=1, timeout_s=1); g.grade([('\\\\boxed{x^x}', 'y^y')])\n"
        "print(g._pool[0].process.pid, flush=True)\n"
        "g._pool[0].send(('99999999!', '7'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    wait_for(lambda: not alive(pid))


def golds(name: str) -> list[tuple[str, str]]:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [(row["id"], row["answer"]) for row in map(json.loads, lines)]


def rewritings(gold: str) -> list[str]:
    """The usual ways in which a model writes this answer otherwise."""
    spaced = re.sub(r"(?<![\\a-zA-Z])([-+=,<>()\[\]])(?![\\!])", r" \1 ", gold)
    forms = [f"${gold}$", f" {gold.removesuffix('.')}.", gold.replace(", ", ","), spaced]
    forms += [gold.replace("\\frac", "\\dfrac"), re.sub(r"\\[dt]frac", r"\\frac", gold)]
    if gold.count("(") == gold.count(")") == 1 and "\\left" not in gold:
        forms.append(gold.replace("(", "\\left(").replace(")", "\\right)"))
    forms.append(gold.replace("\\left", "").replace("\\right", ""))
    if re.fullmatch(r"-?\d+", gold):
        forms += [f"x = {gold}", f"{gold}.0", f"{gold}\\text{{ cm}}", f"{gold}\\text{{ units}}^2", f"\\${gold}"]
        forms += [f"{int(gold):,}", f"{int(gold):,}".replace(",", "{,}"), f"{gold} \\mathrm{{~cm}}"]
    if match := re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", gold):
        sign, above, below = match.groups()
        value = Fraction(int(above), int(below))
        forms += [f"{sign}{above}/{below}", f"\\frac{{{sign}{above}}}{{{below}}}", f"{gold}\\text{{ cm}}"]
        if (value * 10**6).denominator == 1:
            forms.append(f"{sign}{float(value):.6f}".rstrip("0").rstrip("."))
    if match := re.fullmatch(r"(-?)(\d*\.\d+)", gold):
        value = Fraction(match[2])
        forms += [f"{match[1]}\\frac{{{value.numerator}}}{{{value.denominator}}}", f"{gold}0"]
    return [form for form in dict.fromkeys(forms) if form != gold]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
@pytest.mark.parametrize(
    "name", ["aime2024", "amc23", "gsm8k_train", "gsm8k_test", "math500", "math_train", "olympiadbench"]
)
def test_every_gold_answer_equals_itself_and_its_rewritings(grader: Grader, name: str) -> None:
    same, rewritten = [], []
    for id_, gold in golds(name):
        same.append((f"Let us see. \\boxed{{{gold}}} is the answer.", gold))
        rewritten += [(id_, form, gold) for form in rewritings(gold)]
    assert [pair for pair, verdict in zip(same, grader.grade(same), strict=True) if verdict.status != "correct"] == []
    cheap = [row for row in rewritten if settle(normalise(row[1]), normalise(row[2])) is not None]
    assert len(cheap) > 0.9 * len(rewritten)
    verdicts = grader.grade([(f"\\boxed{{{form}}}", gold) for _, form, gold in rewritten])
    assert [row for row, verdict in zip(rewritten, verdicts, strict=True) if verdict.status != "correct"] == []
