"""Recorded answers beside lm-evaluation-harness: they are found, verdicts paired, judgements kept and counted."""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from agreement import GRADERS, NOTHING, SOURCES, compare, load, ours

GSM8K = {"problem": "Ann’s 3 hens lay 6 eggs each. How many?", "answer": "18", "solution": "3 * 6"}
MATH = {"problem": "What is $1/4$ of $1$?", "answer": "\\frac{1}{4}", "solution": "It is $\\boxed{\\frac{1}{4}}$."}


def archive(file: Path, rows: dict[str, str]) -> None:
    with zipfile.ZipFile(file, "w") as out:
        for name, text in rows.items():
            out.writestr(name, text)


def write(folder: Path) -> tuple[Path, Path]:
    """Data and recorded answers, as their repositories lay them out."""
    data, answers = folder / "data", folder / "answers"
    data.mkdir()
    (data / "gsm8k_test.jsonl").write_text(json.dumps(GSM8K) + "\n")
    (data / "math500.jsonl").write_text(json.dumps(MATH) + "\n")
    for _, repository, path in SOURCES:
        (answers / repository / path).parent.mkdir(parents=True, exist_ok=True)
    asked = GSM8K["problem"]
    for _, repository, path in SOURCES:
        file = answers / repository / path
        if repository.startswith("openai"):
            models = {"6b": {"solution": "So 3*6=<<3*6=18>>18\n18"}, "175b": {"solution": "#### 17"}}
            file.write_text(json.dumps({"question": asked, "ground_truth": "A: 18", **models}) + "\n")
        elif repository.startswith("GAIR"):
            prompt = f"Question:\n{asked}\nAnswer:\nLet's think step by step.\n"
            file.write_text(json.dumps({"prompt": prompt, "response": "It is 18... #### 18"}) + "\n")
        elif repository.startswith("microsoft"):
            math = [{"question": MATH["problem"], "code": ["So $\\boxed{0.25}$."]}]
            math.append({"question": "not in the data", "code": [""]})
            rows = {"gsm8k": [{"question": asked, "code": ["$\\boxed{18.0}$"]}], "minerva_math": math}
            archive(file, {f"o/m/{name}/t.jsonl": "\n".join(map(json.dumps, of)) for name, of in rows.items()})
        else:
            prompt = MATH["problem"] + "\nPlease reason step by step, and so on."
            row = {"prompt": [{"prompt": prompt}], "origin_prediction": "It is a quarter."}
            archive(file, {"m.json": json.dumps({"details": {"type": "GEN", "4": row}})})
    return data, answers


def test_recorded_answers_are_found_with_their_gold(tmp_path: Path) -> None:
    rows, others = load(*write(tmp_path))
    assert others == 1
    assert [(row["dataset"], row["source"].split("/")[0], row["gold"]) for row in rows] == [
        *[("gsm8k", "openai", "18")] * 2,
        *[("gsm8k", "GAIR-NLP", "18")] * 3,
        ("gsm8k", "microsoft", "18"),
        ("math500", "microsoft", "\\frac{1}{4}"),
        ("math500", "OddFunction0205", "\\frac{1}{4}"),
    ]
    assert rows[-1]["row"] == 4


def test_pairs_lines_and_judgements(tmp_path: Path) -> None:
    rows, _ = load(*write(tmp_path))
    mine = ours(rows)
    assert [of.status for of in mine["paper"]] == [
        *["correct", "wrong"],
        *["correct"] * 3,
        "wrong",
        "wrong",
        "no_answer",
    ]
    assert [of.status for of in mine["strict"]] == [*["no_answer"] * 5, "correct", "correct", "no_answer"]
    # as their graders would say: flexible-extract all as `paper`, strict-match nothing without ####
    strict = [(False, NOTHING), (False, "17"), *[(True, "18")] * 3, (False, NOTHING)]
    flexible = [(of.status == "correct", of.extracted) for of in mine["paper"][:6]]
    verdicts: list[dict[str, Any]] = [
        dict(zip(GRADERS["gsm8k"], of, strict=True)) for of in zip(strict, flexible, strict=True)
    ]
    verdicts.append(dict.fromkeys(GRADERS["math500"], (False, "0.25")))
    verdicts.append(dict.fromkeys(GRADERS["math500"], (True, "a quarter")))
    judged = {("math500", rows[6]["source"], "0"): {"answer_is_right": True, "why": "0.25"}}
    pairs, lines = compare(rows, mine, verdicts, judged)
    found = {(pair["grader"], pair["protocol"]): pair for pair in pairs}
    assert len(found) == 2 * sum(map(len, GRADERS.values()))
    paper = found["gsm8k flexible-extract", "paper"]
    assert (paper["answers"], paper["agree"], paper["agreement"]) == (6, 6, 1)
    matched = found["gsm8k strict-match", "paper"]
    assert (matched["agree"], matched["theirs_read_none"]) == (5, 1)
    assert (matched["agreement"], matched["agreement_where_read"]) == (5 / 6, 1)
    boxed = found["minerva_math500 math_verify", "strict"]
    assert (boxed["answers"], boxed["no_box"], boxed["agree"], boxed["ours_right"]) == (1, 1, 0, 1)
    unboxed = found["minerva_math500 math_verify", "paper"]
    assert (unboxed["answers"], unboxed["agree"], unboxed["not_judged"]) == (2, 1, 1)
    assert len(lines) == 1 + 2 * len(GRADERS["math500"])  # the box 18.0, whose last run is "18.0"
    assert lines[0]["right"] == {"strict": None}
    assert [line["right"] for line in lines if line["row"] == 0 and line["dataset"] == "math500"] == [
        {"strict": "ours"}
    ] * len(GRADERS["math500"])
    assert all(len(line["end"]) <= 80 for line in lines)
