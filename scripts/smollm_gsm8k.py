"""The two steps of the SmolLM2 on GSM8K run that are not a stage of the pipeline: its rows, and its held-out loss.

python scripts/smollm_gsm8k.py rows --data-dir DIR --out FOLDER
python scripts/smollm_gsm8k.py heldout --before FILE --after FILE --out FILE
"""

import argparse
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

from micota_fast.alignment.results import Alignment
from micota_fast.common.json_io import write_json
from micota_fast.common.records import Problem, write_rows
from micota_fast.common.schema import load
from micota_fast.errors import InputError
from micota_fast.sources.problems import read_problems

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")  # GSM8K's annotation of what a calculator would return (arXiv 2110.14168)
TRAIN_ROWS = 320
HELDOUT_ROWS = 100


def boxed_solution(problem: Problem) -> str:
    """A worked solution as a model should write it: no calculator marks, the answer boxed at the end.

    Raises:
        InputError: the row has no solution.
    """
    if not problem.solution:
        raise InputError(f"problem {problem.id!r} has no `solution`")
    return f"{CALCULATOR_MARK.sub('', problem.solution)}\nThe final answer is \\boxed{{{problem.answer}}}."


def write_gsm8k_rows(data_dir: Path, out: Path) -> None:
    """Write train_solutions.jsonl, heldout_solutions.jsonl and test_problems.jsonl in `out`.

    Training takes the first rows of the training split, the held-out loss the first of the test split; the test
    problems are all there, as they are.

    Raises:
        InputError: `data_dir` lacks a file or a row is bad.
    """
    files = {split: data_dir / f"gsm8k_{split}.jsonl" for split in ("train", "test")}
    for file in files.values():
        if not file.is_file():
            raise InputError(
                f"no such file: {file}; the folder needs gsm8k_train.jsonl and gsm8k_test.jsonl, one JSON object "
                "a line with the string keys id, problem, answer (the number) and solution (the worked text)"
            )
    test = read_problems(files["test"])
    for name, rows in (
        ("train_solutions", read_problems(files["train"], TRAIN_ROWS)),
        ("heldout_solutions", test[:HELDOUT_ROWS]),
    ):
        write_rows(out / f"{name}.jsonl", [replace(row, solution=boxed_solution(row)) for row in rows])
    write_rows(out / "test_problems.jsonl", test)
    print(f"{out}: {TRAIN_ROWS} training and {HELDOUT_ROWS} held-out solutions, {len(test)} test problems")


def compare_heldout(before: Path, after: Path, out: Path) -> bool:
    """Print and write the held-out loss of two models from the files that `micota align` wrote.

    Returns:
        Whether the loss fell.

    Raises:
        InputError: a file cannot be read, or the two were not measured on the same tokens.
    """
    first, second = (load(Alignment, path) for path in (before, after))
    losses = [first.nll, second.nll]
    if first.documents_fingerprint != second.documents_fingerprint:
        raise InputError(f"{before} and {after} were measured on different documents")
    result = {
        "documents": first.documents,
        "tokens": first.tokens.total,
        "nll_before": losses[0],
        "nll_after": losses[1],
        "fall": losses[0] - losses[1],
        "perplexity_before": math.exp(losses[0]),
        "perplexity_after": math.exp(losses[1]),
    }
    write_json(out, result)
    print(
        f"held-out loss (nats per token, {result['documents']} test solutions, {result['tokens']} tokens): "
        f"{losses[0]:.4f} before, {losses[1]:.4f} after, {result['fall']:.4f} less; "
        f"perplexity {result['perplexity_before']:.3f} -> {result['perplexity_after']:.3f}"
    )
    return losses[1] < losses[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    rows = steps.add_parser("rows", help="training, held-out and test rows from GSM8K's files")
    rows.add_argument("--data-dir", type=Path, required=True, help="folder of gsm8k_train.jsonl and gsm8k_test.jsonl")
    rows.add_argument("--out", type=Path, required=True, help="folder to write")
    heldout = steps.add_parser("heldout", help="held-out loss before and after; exit status 1 if it did not fall")
    heldout.add_argument("--before", type=Path, required=True, help="the base model's alignment of the held-out rows")
    heldout.add_argument("--after", type=Path, required=True, help="the trained model's")
    heldout.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    try:
        if arguments.step == "rows":
            write_gsm8k_rows(arguments.data_dir, arguments.out)
        elif not compare_heldout(arguments.before, arguments.after, arguments.out):
            print("error: the held-out loss did not fall", file=sys.stderr)
            return 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
