"""The benchmarks fetched over HTTP by huggingface_hub from a server of our own that speaks the Hub's protocol."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

import micota_fast
from helpers.servers import serving_app
from micota_fast.common.records import Problem, write_rows
from micota_fast.errors import InputError
from micota_fast.evaluation.benchmarks import _problem
from micota_fast.sources.hub import parse

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DEFINITIONS = yaml.safe_load((Path(micota_fast.__file__).parent / "evaluation" / "benchmarks.yaml").read_text())


def rows_of(key: str, hub: dict[str, Any], number: int) -> list[dict[str, Any]]:
    answers = {
        "aime2024": lambda i: f"So the sum is \\boxed{{{i}}}.",
        "olympiad": lambda i: [f"${i}$", f"${i + 1}$"],
        "gsm8k": lambda i: f"There are {i} + 1.\n#### 1,{i:03}",
    }
    if "options" in hub:
        right, wrong = hub["options"]["right"], hub["options"]["wrong"]
        return [
            {hub["problem"]: f" Problem {i}? ", right: f"{i} m\n"} | {name: f"{i} {name}" for name in wrong}
            for i in range(number)
        ]
    answer = answers.get(key, str)
    return [{hub["problem"]: f" Problem {i}? ", hub["answer"]: answer(i), "more": i} for i in range(number)]


@contextlib.contextmanager
def hub(folder: Path, changed: dict[str, int], *, gated: bool = False) -> Iterator[str]:
    """Serves a repository per definition; `changed` gives some of them another number of problems.

    `gated`: those that are gated do not open.
    """
    files: dict[str, tuple[str, bytes]] = {}
    for key, definition in DEFINITIONS.items():
        source, place = definition["hub"], parse(definition["hub"]["source"])
        if gated and source.get("gated"):
            continue
        rows = rows_of(key, source, changed.get(key, definition["problems"][-1]))
        if key == "math500":
            name, content = "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
        else:
            name = f"{place.folder or 'data'}/{place.split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet")
            content = (folder / "t.parquet").read_bytes()
        files[place.repo] = (name, content)

    async def info(http: web.Request) -> web.Response:
        repo = f"{http.match_info['org']}/{http.match_info['name']}"
        if repo not in files:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "You must have accepted its terms."}
            return web.json_response({}, status=401, headers=headers)
        assert http.match_info.get("revision") in (None, "refs/convert/parquet")
        siblings = [{"rfilename": "README.md"}, {"rfilename": "other/rows-0.parquet"}, {"rfilename": files[repo][0]}]
        return web.json_response({"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings})

    async def file(http: web.Request) -> web.Response:
        name, content = files[f"{http.match_info['org']}/{http.match_info['name']}"]
        assert http.match_info["path"] == f"{COMMIT}/{name}"
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return web.Response(body=content, headers=headers)

    app = web.Application()
    app.router.add_get("/api/datasets/{org}/{name}", info)
    app.router.add_get("/api/datasets/{org}/{name}/revision/{revision}", info)
    app.router.add_get("/datasets/{org}/{name}/resolve/{path:.*}", file)
    with serving_app(app) as url:
        yield url


def micota_benchmarks(folder: Path, url: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "micota_fast", "benchmarks", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_all_are_fetched_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with hub(tmp_path, {}) as url:
        done = micota_benchmarks(folder, url, tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        first = {file.name: file.read_bytes() for file in folder.iterdir()}
        again = micota_benchmarks(folder, url, tmp_path / "cache")
        assert again.stdout.count("there already") == len(DEFINITIONS)
    assert "math-ai/aime25 at 0123456789abcdef0123456789abcdef01234567, Apache-2.0" in done.stdout
    for definition in DEFINITIONS.values():
        assert first[definition["path"]].count(b"\n") == definition["problems"][-1]
    answers = {name: json.loads(text.splitlines()[7])["answer"] for name, text in first.items() if name[0] != "S"}
    assert answers == {
        "aime2024.jsonl": "7",
        "amc23.jsonl": "7",
        "olympiadbench.jsonl": "7, 8",
        "math500.jsonl": "7",
        "gsm8k_test.jsonl": "1007",
        "aime2025.jsonl": "7",
        "hmmt_feb_2025.jsonl": "7",
        "minerva_math.jsonl": "7",
        "gpqa_diamond.jsonl": answers["gpqa_diamond.jsonl"],
    }
    for line in first["gpqa_diamond.jsonl"].splitlines():
        row = json.loads(line)
        question, empty, *options = row["problem"].split("\n")
        assert (question[:8], empty, [option[:3] for option in options]) == (
            "Problem ",
            "",
            ["A) ", "B) ", "C) ", "D) "],
        )
        assert options["ABCD".index(row["answer"])].endswith(" m")
    assert json.loads(first["SOURCES.json"])["amc23.jsonl"] == {"repo": "math-ai/amc23", "commit": COMMIT}


def test_the_wrong_number_of_problems_is_an_error_and_the_rest_stays(tmp_path: Path) -> None:
    with hub(tmp_path, {"amc2023": 83}) as url:
        done = micota_benchmarks(tmp_path / "data", url, tmp_path / "cache")
    assert done.returncode == 2
    assert f"math-ai/amc23 at {COMMIT} has 83 problems; AMC 2023 has 40" in done.stderr
    assert (tmp_path / "data" / "aime2024.jsonl").exists()
    assert not (tmp_path / "data" / "amc23.jsonl").exists()


def test_a_gated_set_that_does_not_open_is_left_out_with_a_warning(tmp_path: Path) -> None:
    with hub(tmp_path, {}, gated=True) as url:
        done = micota_benchmarks(tmp_path / "data", url, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "warning: GPQA-Diamond is left out; accept its terms at https://huggingface.co/" in done.stderr
    assert not (tmp_path / "data" / "gpqa_diamond.jsonl").exists()
    assert (tmp_path / "data" / "minerva_math.jsonl").exists()


def changed_row(hub: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {hub["problem"]: "What?", hub["answer"]: "7"} | {hub[key]: value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("preset", "answer", "what"),
    [
        ("aime2024", "The sum is 7.", r"no \\boxed\{\} in"),
        ("gsm8k", "The sum is 7.", "no '#### ' in"),
        ("gsm8k", "The sum is\n#### ", "is empty"),
        ("amc2023", None, "is empty"),
        ("amc2023", "  ", "is empty"),
        ("olympiad", [], "is empty"),
    ],
)
def test_a_row_that_holds_no_answer_is_an_error(preset: str, answer: Any, what: str) -> None:
    """A whole solution for an answer would mark every answer wrong, and nobody would be told."""
    source = DEFINITIONS[preset]["hub"]
    with pytest.raises(InputError, match=f"{source['source']}: row x: .*{what}"):
        _problem(changed_row(source, answer=answer), "x", source)


def test_a_row_without_a_problem_is_an_error() -> None:
    source = DEFINITIONS["amc2023"]["hub"]
    with pytest.raises(InputError, match=r"row x: its 'question' is empty"):
        _problem(changed_row(source, problem=None), "x", source)


def test_columns_of_another_name_are_an_error() -> None:
    source = DEFINITIONS["gpqa_diamond"]["hub"]
    [row] = rows_of("gpqa_diamond", source, 1)
    del row["Incorrect Answer 2"]
    with pytest.raises(InputError, match=r"row x has no 'Incorrect Answer 2', but Question, Correct Answer, "):
        _problem(row, "x", source)
    with pytest.raises(InputError, match=r"row x: the right option is among the wrong ones: '0 m'"):
        _problem(row | {"Incorrect Answer 2": "0 m"}, "x", source)


def test_a_number_keeps_its_value() -> None:
    """The copy of AMC writes its whole answers as floats."""
    source = DEFINITIONS["amc2023"]["hub"]
    assert _problem(changed_row(source, answer=27.0), "x", source).answer == "27"
    assert _problem(changed_row(source, answer=27.5), "x", source).answer == "27.5"


def test_files_that_are_there_are_counted_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "aime2024.jsonl", [Problem(str(i), "?", "7") for i in range(29)])
    done = micota_benchmarks(tmp_path, "http://127.0.0.1:9", tmp_path / "cache")
    assert done.returncode == 2
    assert "aime2024.jsonl has 29 problems; AIME 2024 has 30" in done.stderr


def test_sources_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "SOURCES.json").write_text("{")
    done = micota_benchmarks(tmp_path, "http://127.0.0.1:9", tmp_path / "cache")
    assert done.returncode == 2
    assert "SOURCES.json:1: not JSON" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_network_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    done = micota_benchmarks(tmp_path / "data", "http://127.0.0.1:9", tmp_path / "cache")
    assert done.returncode == 2
    assert "cannot fetch math-ai/aime24 from the Hugging Face Hub" in done.stderr
    assert f"or write {tmp_path / 'data' / 'aime2024.jsonl'} by hand" in done.stderr
    assert "Traceback" not in done.stderr
