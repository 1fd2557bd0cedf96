"""`micota benchmarks DIR`: the benchmarks' problems from the Hugging Face Hub, as files of our schema."""

import sys
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import parse_json, read_json, write_json
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.evaluation import BenchmarkConfig, shipped_benchmarks
from micota_fast.errors import InputError
from micota_fast.evaluation.options import with_options
from micota_fast.grading.answers import extract_boxed
from micota_fast.sources import hub
from micota_fast.sources.problems import read_problems
from micota_fast.sources.rows import read_rows


def fetch(folder: str | Path) -> None:
    """Write the file of every benchmark that is not there yet; SOURCES.json says which commit each came from.

    A benchmark that the Hub gives only to some is left out with a warning if it does not come.

    Raises:
        InputError: the Hub cannot be reached, a file there is not as benchmarks.yaml says, or a file, there or here,
            holds another number of problems. Files written until then stay.
    """
    folder = Path(folder)
    sources_path = folder / "SOURCES.json"
    sources = read_json(sources_path) if sources_path.exists() else {}
    for key, definition in shipped_benchmarks().items():
        path, benchmark = folder / definition["path"], BenchmarkConfig(preset=key)
        if path.exists():
            benchmark.check_number(len(read_problems(path)), str(path))
            print(f"{path}: there already")
            continue
        at_hub = definition["hub"]
        repo = hub.parse(at_hub["source"]).repo
        try:
            commit = hub.split(at_hub["source"]).commit
        except InputError as error:
            by_hand = f"{error}; or write {path} by hand (keys: id, problem, answer)"
            if not at_hub.get("gated"):
                raise InputError(by_hand) from None
            terms = f"accept its terms at https://huggingface.co/datasets/{repo} and log in by `hf auth login`"
            print(f"warning: {benchmark.name} is left out; {terms}. {by_hand}", file=sys.stderr, flush=True)
            continue
        rows = (parse_json(line, where) for where, _, line in read_rows(at_hub["source"]))
        problems = [_problem(row, f"{key}-{i}", at_hub) for i, row in enumerate(rows)]
        benchmark.check_number(len(problems), f"{repo} at {commit}")
        write_rows(path, problems)
        sources[definition["path"]] = {"repo": repo, "commit": commit}
        write_json(sources_path, sources, sort_keys=True)
        licence = f", {at_hub['license']}" if "license" in at_hub else ""
        print(f"{path}: {len(problems)} problems of {repo} at {commit}{licence}")


def _problem(row: dict[str, Any], problem_id: str, at_hub: dict[str, Any]) -> Problem:
    """Our row of a dataset's.

    Raises:
        InputError: it has no problem or no answer where benchmarks.yaml says; a wrong gold answer would tell nobody.
    """
    where = f"{at_hub['source']}: row {problem_id}"

    def column(name: str) -> Any:
        if name not in row:
            raise InputError(f"{where} has no {name!r}, but {', '.join(row)}; mend benchmarks.yaml")
        return row[name]

    def text(name: str, value: Any) -> str:
        found = "" if value is None else str(value).strip()
        if not found:
            raise InputError(f"{where}: its {name!r} is empty; mend benchmarks.yaml")
        return found

    problem = text(at_hub["problem"], column(at_hub["problem"]))
    if "options" in at_hub:
        columns = [at_hub["options"]["right"], *at_hub["options"]["wrong"]]
        right, *wrong = (text(name, column(name)) for name in columns)
        try:
            return Problem(problem_id, *with_options(problem, right, wrong, at_hub["options"]["seed"]))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return Problem(problem_id, problem, text(at_hub["answer"], _answer(column(at_hub["answer"]), at_hub, where)))


def _answer(answer: Any, at_hub: dict[str, Any], where: str) -> str:
    """The bare answer in a column of answers, numbers or whole solutions."""
    if isinstance(answer, list):  # OlympiadBench: one or several; joined as in the files that are passed around
        answer = ", ".join(str(item).strip().strip("$") for item in answer)
    elif isinstance(answer, float) and answer.is_integer():  # AMC: 27.0
        answer = int(answer)
    answer = "" if answer is None else str(answer)
    if "after" in at_hub:  # GSM8K: a number behind its mark, thousands apart
        if at_hub["after"] not in answer:
            raise InputError(f"{where}: no {at_hub['after']!r} in its {at_hub['answer']!r}; mend benchmarks.yaml")
        answer = answer.rpartition(at_hub["after"])[2].replace(",", "")
    if at_hub.get("boxed"):
        boxed = extract_boxed(answer)
        if boxed is None:
            raise InputError(f"{where}: no \\boxed{{}} in its {at_hub['answer']!r}; mend benchmarks.yaml")
        answer = boxed
    return str(answer)
