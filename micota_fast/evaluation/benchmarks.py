"""`micota benchmarks DIR`: the benchmarks' problems from the Hugging Face Hub, as files of our schema."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import parse_json, read_json, write_json
from micota_fast.common.records import Problem, read_lines, write_rows
from micota_fast.config.evaluation import BenchmarkConfig, shipped_benchmarks
from micota_fast.errors import InputError
from micota_fast.grading.answers import extract_boxed
from micota_fast.sources.problems import read_problems


def fetch(folder: str | Path) -> None:
    """Write the file of every benchmark that is not there yet; SOURCES.json says which commit each came from.

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
        commit, rows = _rows(definition["hub"])
        problems = [_problem(row, f"{key}-{i}", definition["hub"]) for i, row in enumerate(rows)]
        benchmark.check_number(len(problems), f"{definition['hub']['repo']} at {commit}")
        write_rows(path, problems)
        sources[definition["path"]] = {"repo": definition["hub"]["repo"], "commit": commit}
        write_json(sources_path, sources, sort_keys=True)
        print(f"{path}: {len(problems)} problems of {definition['hub']['repo']} at {commit}")


def _rows(hub: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Commit and rows of a dataset's split, from its Parquet or JSON Lines files."""
    from huggingface_hub import HfApi, hf_hub_download

    repo, split = hub["repo"], hub["split"]
    try:
        info = HfApi().dataset_info(repo)
        names = [sibling.rfilename for sibling in info.siblings or []]
        files = sorted(
            name
            for name in names
            if name.endswith((".parquet", ".jsonl")) and split in Path(name).name and hub.get("config", "") in name
        )
        paths = [Path(hf_hub_download(repo, name, repo_type="dataset", revision=info.sha)) for name in files]
    except Exception as error:  # the library lets its HTTP client's errors through, and that differs by version
        raise InputError(
            f"cannot fetch {repo} from the Hugging Face Hub ({type(error).__name__}: {error}); copy the files there by "
            f"hand (keys: id, problem, answer)"
        ) from None
    if not paths:
        raise InputError(f"{repo}: no .parquet or .jsonl file of the split {split!r} among {', '.join(names)}")
    return str(info.sha), [row for path in paths for row in _read(path)]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        for where, line in read_lines(path):
            yield parse_json(line, where)
        return
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{path.name} is a Parquet file: pip install 'micota-fast[parquet]'") from None
    yield from parquet.read_table(path).to_pylist()


def _problem(row: dict[str, Any], problem_id: str, hub: dict[str, Any]) -> Problem:
    """Our row of a dataset's.

    Raises:
        InputError: it has no problem or no answer where benchmarks.yaml says; a wrong gold answer would tell nobody.
    """
    where = f"{hub['repo']}: row {problem_id}"
    try:
        problem, answer = row[hub["problem"]], row[hub["answer"]]
    except KeyError as error:
        raise InputError(f"{where} has no {error}, but {', '.join(row)}; mend benchmarks.yaml") from None
    if isinstance(answer, list):  # OlympiadBench: one or several; joined as in the files that are passed around
        answer = ", ".join(str(item).strip().strip("$") for item in answer)
    elif isinstance(answer, float) and answer.is_integer():  # AMC: 27.0
        answer = int(answer)
    answer = "" if answer is None else str(answer)
    if "after" in hub:  # GSM8K: a number behind its mark, thousands apart
        if hub["after"] not in answer:
            raise InputError(f"{where}: no {hub['after']!r} in its {hub['answer']!r}; mend benchmarks.yaml")
        answer = answer.rpartition(hub["after"])[2].replace(",", "")
    if hub.get("boxed"):
        boxed = extract_boxed(answer)
        if boxed is None:
            raise InputError(f"{where}: no \\boxed{{}} in its {hub['answer']!r}; mend benchmarks.yaml")
        answer = boxed
    problem, answer = "" if problem is None else str(problem).strip(), answer.strip()
    for key, text in ((hub["problem"], problem), (hub["answer"], answer)):
        if not text:
            raise InputError(f"{where}: its {key!r} is empty; mend benchmarks.yaml")
    return Problem(problem_id, problem, answer)
