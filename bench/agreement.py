r"""Are the verdicts on models' recorded answers those of lm-evaluation-harness's own graders?

    .venv/bin/python bench/agreement.py --data DIR --answers DIR --lm-eval-python PATH [--quick] [--json FILE]
        [--disagreements FILE]

--data holds gsm8k_test.jsonl and math500.jsonl (`problem`, `answer`, `solution`); --answers the files of SOURCES, each
at OWNER/NAME/PATH. PATH is a Python that has lm_eval with its [math] extra; their graders run there, as they are: the
filters and the metric of tasks/gsm8k/gsm8k.yaml, `process_docs` and `process_results` of tasks hendrycks_math500 and
minerva_math500. Answers are given to both sides as they were recorded.

Ours are both protocols of `micota evaluate`. A line of FILE for every answer on which a pair disagrees, with the last
80 characters of the answer at most; `answer_is_right` and `why` are a reader's judgement, kept from the FILE that was
there (null if there is none), and `right` says for each protocol who agrees with the reader. Not listed but counted
in the rows: `no_box`, as `strict` reads boxes only, so answers without one are left out of its pairs; and
`theirs_read_none`, ours correct while theirs did not find the form of answer that it asks for (`####`, `Final Answer:
The final answer is ...`, no dollar sign but the answer's two): ours has read the gold value, and is right by that rule.
"Of the last box" gives hendrycks_math500 what its authors' box functions find in the answer, between dollar signs.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import append_rows, provenance

Row = dict[str, Any]
NOTHING = "[invalid]"  # as their filters call it
QWEN = "提交材料/评测结果附件：评测错误题目-20250110_150616.zip"
SOURCES = (
    ("gsm8k", "openai/grade-school-math", "grade_school_math/data/example_model_solutions.jsonl"),
    *(("gsm8k", "GAIR-NLP/abel", f"outputs/gsm8k/{size}.jsonl") for size in ("7b", "13b", "70b")),
    ("gsm8k", "microsoft/rho", "rho-1/outputs.zip"),
    ("math500", "microsoft/rho", "rho-1/outputs.zip"),
    ("math500", "OddFunction0205/lm-eval-math-500", QWEN),
)
GRADERS = {
    "gsm8k": ("gsm8k strict-match", "gsm8k flexible-extract"),
    "math500": (
        "hendrycks_math500 exact_match",
        "hendrycks_math500 exact_match, of the last box",
        "minerva_math500 exact_match",
        "minerva_math500 math_verify",
    ),
}
JUDGED = ("ours_right", "theirs_right", "not_judged")
FILES = {"gsm8k": "gsm8k_test.jsonl", "math500": "math500.jsonl"}


def recorded(answers: Path) -> Iterator[tuple[str, str, int, str, str]]:
    """(dataset, source, row, problem's statement, answer's text) of every recorded answer."""
    for dataset, repository, path in SOURCES:
        file = answers / repository / path
        if path == QWEN:
            with zipfile.ZipFile(file) as archive:
                details = json.loads(archive.read(archive.namelist()[0]))["details"]
            numbered = [(int(key), row) for key, row in details.items() if key.isdigit()]
            for number, row in sorted(numbered):
                asked = row["prompt"][0]["prompt"].partition("\nPlease reason step by step")[0]
                yield dataset, f"{repository} Qwen2.5-72B-Instruct", number, asked, row["origin_prediction"]
        elif file.suffix == ".zip":
            folder = "gsm8k" if dataset == "gsm8k" else "minerva_math"  # which holds the 500 problems
            with zipfile.ZipFile(file) as archive:
                for name in sorted(archive.namelist()):
                    if f"/{folder}/" in name and name.endswith(".jsonl"):
                        for number, line in enumerate(archive.read(name).decode().splitlines()):
                            row = json.loads(line)
                            text = row["code"][0]
                            yield dataset, f"{repository} {name.split('/')[1]}", number, row["question"], text
        else:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
                row = json.loads(line)
                if "response" in row:
                    asked = row["prompt"].removeprefix("Question:\n").rpartition("\nAnswer:")[0]
                    yield dataset, f"{repository} {file.stem}", number, asked, row["response"]
                else:
                    for model, of in row.items():
                        if isinstance(of, dict):
                            yield dataset, f"{repository} {model}", number, row["question"], of["solution"]


def load(data: Path, answers: Path) -> tuple[list[Row], int]:
    """The answers to problems that the data holds, with gold answer and solution; how many others there are."""
    problems: dict[tuple[str, str], Row] = {}
    for dataset, name in FILES.items():
        for line in (data / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            problems[dataset, _bare(row["problem"])] = row
    found, others = [], 0
    for dataset, source, number, asked, text in recorded(answers):
        problem = problems.get((dataset, _bare(asked)))
        if problem is None:
            others += 1
            continue
        found.append(
            {"dataset": dataset, "source": source, "row": number, "text": text, "gold": problem["answer"]}
            | {"problem": problem["problem"], "solution": problem["solution"]}
        )
    return found, others


def _bare(statement: str) -> str:
    return "".join(statement.split()).replace("’", "'")


def ours(answers: list[Row]) -> dict[str, list[Any]]:
    """The verdicts of each protocol, by the rule that the benchmark has in benchmarks.yaml."""
    from micota_fast.evaluation.evaluate import RULES
    from micota_fast.grading.grader import Grader

    rules = {"gsm8k": RULES["last_number"][0], "math500": RULES["box"][0]}
    with Grader() as grader:
        strict = grader.grade([(row["text"], row["gold"]) for row in answers])
    return {"paper": [rules[row["dataset"]](row["text"], row["gold"]) for row in answers], "strict": strict}


def theirs(answers: list[Row]) -> dict[str, Any]:
    """Their version, and for each answer {grader: (verdict, what it read)}; runs where lm_eval is installed."""
    import datasets
    import lm_eval.tasks
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters import get_filter
    from lm_eval.tasks.hendrycks_math import utils as hendrycks
    from lm_eval.tasks.minerva_math import utils as minerva
    from math_verify import parse

    folder = Path(lm_eval.tasks.__file__).parent
    task = yaml.safe_load((folder / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    metric = {key: of for key, of in task["metric_list"][0].items() if key.startswith(("ignore_", "regexes_"))}
    verdicts: list[dict[str, tuple[bool, str]]] = [{} for _ in answers]
    for chain in task["filter_list"]:
        settings = dict(chain["filter"][0])
        extract = get_filter(settings.pop("function"))(**settings)
        for row, verdict in zip(answers, verdicts, strict=True):
            if row["dataset"] == "gsm8k":
                read = extract.apply([[row["text"]]], [row])[0][0]
                score = exact_match_hf_evaluate([read], [f"{row['solution']}\n#### {row['gold']}"], **metric)
                verdict[f"gsm8k {chain['name']}"] = (bool(score["exact_match"]), read)
    mathematics = [i for i, row in enumerate(answers) if row["dataset"] == "math500"]
    documents = [{key: answers[i][key] for key in ("problem", "solution")} for i in mathematics]
    if documents:
        for name, module in (("hendrycks_math500", hendrycks), ("minerva_math500", minerva)):
            for i, document in zip(
                mathematics, module.process_docs(datasets.Dataset.from_list(documents)), strict=True
            ):
                text = answers[i]["text"]
                for key, score in module.process_results(document, [text]).items():
                    if key == "math_verify":
                        read = str(parse(text))
                    elif module is minerva:
                        read = minerva.get_unnormalized_answer(text)
                    else:
                        read = text[text.find("$") + 1 : text.rfind("$")] if text.count("$") > 1 else text
                        box = hendrycks.last_boxed_only_string(text)
                        inside = module.process_results(document, [f"${hendrycks.remove_boxed(box)}$"]) if box else {}
                        verdicts[i][f"{name} {key}, of the last box"] = (inside.get(key, 0) == 1, box or NOTHING)
                        if box and read != hendrycks.remove_boxed(box):
                            read = NOTHING
                    verdicts[i][f"{name} {key}"] = (bool(score), read)
    packages = ("lm_eval", "math-verify", "sympy")
    return {"versions": {name: importlib.metadata.version(name) for name in packages}, "verdicts": verdicts}


def compare(
    answers: list[Row], mine: dict[str, list[Any]], other: list[dict[str, Any]], judged: dict[tuple[str, ...], Row]
) -> tuple[list[Row], list[Row]]:
    """A row for each pair of graders, and a line for each answer and grader of theirs with a disagreement."""
    lines: list[Row] = []
    pairs: dict[tuple[str, str, str], Row] = {}
    for i, (answer, verdicts) in enumerate(zip(answers, other, strict=True)):
        for grader in GRADERS[answer["dataset"]]:
            their, read = verdicts[grader]
            right: dict[str, str | None] = {}
            judgement = judged.get((answer["dataset"], answer["source"], str(answer["row"])), {})
            truth = judgement.get("answer_is_right")
            for protocol, of in mine.items():
                pair = pairs.setdefault(
                    (answer["dataset"], grader, protocol),
                    dict.fromkeys(("answers", "no_box", "theirs_read_none", "agree", *JUDGED), 0),
                )
                if protocol == "strict" and of[i].extracted is None:
                    pair["no_box"] += 1
                    continue
                pair["answers"] += 1
                our = of[i].status == "correct"
                if our == their:
                    pair["agree"] += 1
                    continue
                if our and not _holds_answer(grader, read):
                    pair["theirs_read_none"] += 1
                    continue
                right[protocol] = None if truth is None else "ours" if our == truth else "theirs"
                pair["not_judged" if truth is None else f"{right[protocol]}_right"] += 1
            if right:
                line = {key: answer[key] for key in ("dataset", "source", "row", "gold")}
                line |= {"grader": grader, "theirs": their, "theirs_read": read[-80:]}
                for protocol, of in mine.items():
                    line |= {protocol: of[i].status, f"{protocol}_read": (of[i].extracted or "")[-80:]}
                lines.append(
                    line
                    | {"end": answer["text"][-80:], "answer_is_right": truth, "why": judgement.get("why")}
                    | {"right": right}
                )
    rows = []
    for (dataset, grader, protocol), pair in pairs.items():
        share = {"agreement": pair["agree"] / pair["answers"] if pair["answers"] else None}
        read = pair["answers"] - pair["theirs_read_none"]
        share["agreement_where_read"] = pair["agree"] / read if read else None
        rows.append({"dataset": dataset, "grader": grader, "protocol": protocol, **pair, **share})
    return rows, lines


def _holds_answer(grader: str, read: str) -> bool:
    """False where their grader did not find the form of an answer that it asks for."""
    return any(map(str.isdigit, read)) if grader.startswith("gsm8k") else read not in (NOTHING, "[invalidanswer]")


def main() -> None:
    """Grade, print a table, write rows and lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", type=Path)
    parser.add_argument("--answers", metavar="DIR", type=Path)
    parser.add_argument("--lm-eval-python", metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="every 50th answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    parser.add_argument("--disagreements", type=Path, metavar="FILE", help="written anew; its judgements are kept")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.theirs:
        print(json.dumps(theirs(json.load(sys.stdin))))
        return
    if not (arguments.data and arguments.answers and arguments.lm_eval_python):
        parser.error("--data, --answers and --lm-eval-python are needed")
    if arguments.quick and arguments.disagreements:
        parser.error("--disagreements is of all answers, with what was judged by hand: not with --quick")
    answers, others = load(arguments.data, arguments.answers)
    answers = answers[:: 50 if arguments.quick else 1]
    print(f"{len(answers):,} answers; {others:,} more are to problems that --data does not hold")
    command = [arguments.lm_eval_python, __file__, "--theirs"]
    done = subprocess.run(command, input=json.dumps(answers), stdout=subprocess.PIPE, text=True, check=True)
    other = json.loads(done.stdout.splitlines()[-1])
    judged = {}
    if arguments.disagreements and arguments.disagreements.exists():
        for line in map(json.loads, arguments.disagreements.read_text(encoding="utf-8").splitlines()):
            judged[line["dataset"], line["source"], str(line["row"])] = line
    rows, lines = compare(answers, ours(answers), other["verdicts"], judged)
    common = {
        "benchmark": "agreement",
        **provenance("micota-fast", "math-verify", "sympy"),
        "theirs": other["versions"],
    }
    for row in rows:
        shares = [f"{row[key] or 0:8.2%}" for key in ("agreement", "agreement_where_read")]
        print(
            f"{row['grader']:46} {row['protocol']:6} {row['answers']:6,} {' '.join(shares)}  theirs read none "
            f"{row['theirs_read_none']}, ours right {row['ours_right']}, theirs {row['theirs_right']}, not judged "
            f"{row['not_judged']}; without a box {row['no_box']}"
        )
    if arguments.json:
        append_rows(arguments.json, (common | row for row in rows))
    if arguments.disagreements:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        arguments.disagreements.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
