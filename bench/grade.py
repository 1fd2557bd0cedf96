r"""How many answers per second are graded, and are the verdicts math-verify's?

    .venv/bin/python bench/grade.py --data DIR [--quick] [--json FILE]

DIR holds aime2024.jsonl, amc23.jsonl, gsm8k_test.jsonl, math500.jsonl, math_train.jsonl and olympiadbench.jsonl, with a
gold `answer` in each row. The mix, with seed 0: gold answers drawn from all the files' rows alike, so that most are
MATH's and six in ten are integers. Half of the answers are meant to be right: the gold answer as it stands (seven in
ten) or in a usual rewriting. Half are meant to be wrong: another problem's gold answer of the same shape (half of
these), the last integer one off, or the first number's sign turned; where that changes nothing the answer is right. An
answer stands at the end of a sentence in one \boxed{}. Models' real answers were not at hand; with another mix the
figures are others, so the share that needs sympy is printed, and the pairs of that share are measured alone as well.

"math-verify": `verify(parse(gold), parse(completion))`, as its README calls it, its time limits on, in one process.
"micota, 1 worker" and "2 workers": `Grader.grade` on the whole list. Each run of a contestant is a fresh process, the
contestants in turn; starting (imports, one comparison that starts each worker and fills the parsers' tables) is not
counted. Then the verdicts are compared pair by pair.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from machine import provenance

FILES = ["aime2024", "amc23", "gsm8k_test", "math500", "math_train", "olympiadbench"]
CONTESTANTS = ["math-verify", "micota, 1 worker", "micota, 2 workers"]
Pair = tuple[str, str]  # completion, gold answer


def mix(data: Path, number: int) -> list[Pair]:
    """The pairs described above."""
    golds: list[str] = []
    for name in FILES:
        with (data / f"{name}.jsonl").open(encoding="utf-8") as lines:
            golds += [json.loads(line)["answer"] for line in lines]
    shapes: dict[str, list[str]] = {}
    for gold in golds:
        shapes.setdefault(_shape(gold), []).append(gold)
    source = random.Random(0)
    pairs = []
    for _ in range(number):
        gold = source.choice(golds)
        if source.random() < 0.5:
            forms = rewritings(gold)
            answer = source.choice(forms) if forms and source.random() < 0.3 else gold
        else:
            kind = source.randrange(4)
            if kind < 2:
                answer = _another(gold, golds, shapes, source)
            else:
                answer = _one_off(gold, source) if kind == 2 else _sign_turned(gold)
        pairs.append((f"So, putting it all together, the answer is $\\boxed{{{answer}}}$.", gold))
    return pairs


def _shape(gold: str) -> str:
    return re.sub(r"\d+", "9", gold.replace(" ", ""))


def rewritings(gold: str) -> list[str]:
    """Usual ways to write this answer otherwise; none for some."""
    forms = [
        gold.replace("\\frac", "\\dfrac"),
        gold.replace(" ", ""),
        gold.replace("\\left", "").replace("\\right", ""),
    ]
    if re.fullmatch(r"-?\d+", gold):
        forms += [f"x = {gold}", f"{gold}\\text{{ cm}}", f"{int(gold):,}", f"{gold}.0"]
    if match := re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", gold):
        value = Fraction(int(match[2]), int(match[3]))
        forms.append(f"{match[1]}{match[2]}/{match[3]}")
        if (value * 10**4).denominator == 1:
            forms.append(f"{match[1]}{float(value)}")
    return [form for form in dict.fromkeys(forms) if form != gold]


def _another(gold: str, golds: list[str], shapes: dict[str, list[str]], source: random.Random) -> str:
    """Of the same shape, or any where there is no other."""
    same = [other for other in shapes[_shape(gold)] if other != gold]
    return source.choice(same or golds)


def _one_off(gold: str, source: random.Random) -> str:
    """The last integer one more or less."""
    return re.sub(r"\d+(?=\D*$)", lambda match: str(abs(int(match[0]) + source.choice([-1, 1]))), gold)


def _sign_turned(gold: str) -> str:
    """Of the first number, root or fraction."""
    return re.sub(r"-?(?=\d|\\[dt]?frac|\\sqrt)", lambda match: "" if match[0] else "-", gold, count=1)


def run(contestant: str, pairs: list[Pair]) -> dict[str, object]:
    """Seconds and verdicts of one contestant, in this process."""
    grade = _math_verify() if contestant == "math-verify" else _micota(int(contestant.split()[1]))
    started = time.perf_counter()
    verdicts = grade(pairs)
    return {"seconds": time.perf_counter() - started, "verdicts": verdicts}


def _math_verify() -> Callable[[list[Pair]], list[str]]:
    from math_verify import parse, verify

    def grade(pairs: list[Pair]) -> list[str]:
        return [
            "correct" if verify(parse(f"\\boxed{{{gold}}}"), parse(completion)) else "wrong"
            for completion, gold in pairs
        ]

    grade([("\\boxed{x^x+x}", "x+x^x")])
    return grade


def _micota(workers: int) -> Callable[[list[Pair]], list[str]]:
    from micota_fast.grading.grader import Grader

    grader = Grader(workers)
    # pairs that no grader settles without sympy: one for each worker, so that all are started
    grader.grade([(f"\\boxed{{x^x+{number}x}}", "x+x^x") for number in range(2, 2 + workers)])
    return lambda pairs: [verdict.status for verdict in grader.grade(pairs)]


def in_a_fresh_process(contestant: str, pairs: list[Pair]) -> dict[str, object]:
    """`run` there."""
    command = [sys.executable, __file__, "--run", contestant]
    result = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return answer


def measure(which: str, pairs: list[Pair], runs: int) -> tuple[list[dict[str, object]], dict[str, list[str]]]:
    """A row for each contestant, and its verdicts."""
    seconds: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    verdicts: dict[str, list[str]] = {}
    for _ in range(runs):
        for contestant in CONTESTANTS:
            result = in_a_fresh_process(contestant, pairs)
            seconds[contestant].append(result["seconds"])  # type: ignore[arg-type]
            verdicts[contestant] = result["verdicts"]  # type: ignore[assignment]
    rows: list[dict[str, object]] = []
    base = statistics.median(seconds["math-verify"])
    for contestant, times in seconds.items():
        rates = sorted(len(pairs) / time_s for time_s in times)
        median = statistics.median(times)
        rows.append(
            {"pairs": which, "n": len(pairs), "program": contestant, "pairs_per_s": len(pairs) / median}
            | {
                "min_pairs_per_s": rates[0],
                "max_pairs_per_s": rates[-1],
                "over_math_verify": base / median,
                "runs": runs,
            }
        )
        print(
            f"{which:9} {len(pairs):>6,} pairs  {contestant:18} {len(pairs) / median:>10,.0f} pairs/s "
            f"[{rates[0]:,.0f}, {rates[-1]:,.0f}]  {base / median:.1f} x math-verify"
        )
    return rows, verdicts


def main() -> None:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", type=Path, help="where the gold answers are")
    parser.add_argument("--quick", action="store_true", help="200 pairs, one run")
    parser.add_argument("--json", metavar="FILE", help="append the rows here")
    parser.add_argument("--run", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run, [(text, gold) for text, gold in json.load(sys.stdin)])))
        return
    if arguments.data is None:
        parser.error("--data DIR is needed")
    from micota_fast.grading.answers import extract_boxed
    from micota_fast.grading.exact import settle
    from micota_fast.grading.spelling import normalise

    number, runs = (200, 1) if arguments.quick else (3000, 3)
    pairs = mix(arguments.data, number)
    rest = [
        (text, gold) for text, gold in pairs if settle(normalise(extract_boxed(text) or ""), normalise(gold)) is None
    ]
    common = provenance("micota-fast", "math-verify", "latex2sympy2-extended", "sympy")
    print(f"median of {runs} runs [min, max]; {common['machine']}")
    settled = 1 - len(rest) / number
    print(f"settled without sympy: {settled:.1%} of {number:,} pairs")
    rows, verdicts = measure("all", pairs, runs)
    theirs, ours = verdicts["math-verify"], verdicts["micota, 1 worker"]
    differing = [row for row in zip(pairs, theirs, ours, strict=True) if row[1] != row[2]]
    print(f"verdicts that differ: {len(differing)}; one and two workers agree: {ours == verdicts['micota, 2 workers']}")
    for (text, gold), their, our in differing[:20]:
        print(f"  {extract_boxed(text)}  for  {gold}:  math-verify {their}, micota {our}")
    rows += measure("by sympy", rest, runs)[0]
    rows = [{"benchmark": "grade", "settled_without_sympy": settled, "differing": len(differing)} | row for row in rows]
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row | common) + "\n" for row in rows))


if __name__ == "__main__":
    main()
