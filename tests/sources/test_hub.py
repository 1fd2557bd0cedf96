"""Datasets by name, fetched over HTTP by huggingface_hub from a server of our own that speaks the Hub's protocol."""

import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from helpers.servers import serving_app
from micota_fast.errors import InputError
from micota_fast.sources.hub import choose, parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ = "import sys\nfrom micota_fast.sources.problems import read_problems\nprint(read_problems(sys.argv[1]))"


@contextlib.contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serves one repository, org/name."""

    async def info(http: web.Request) -> web.Response:
        siblings = [{"rfilename": name} for name in files]
        return web.json_response({"_id": "1", "id": "org/name", "sha": COMMIT, "siblings": siblings})

    async def file(http: web.Request) -> web.Response:
        content = files[http.match_info["path"].removeprefix(f"{COMMIT}/")]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return web.Response(body=content, headers=headers)

    app = web.Application()
    app.router.add_get("/api/datasets/org/name", info)
    app.router.add_get("/api/datasets/org/name/revision/main", info)
    app.router.add_get("/datasets/org/name/resolve/{path:.*}", file)
    with serving_app(app) as url:
        yield url


def read(source: str, url: str, cache: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", READ, source]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_all_files_of_a_split_are_read_in_their_order(tmp_path: Path) -> None:
    table = tmp_path / "table"
    pq.write_table(pa.table({"problem": ["one?"], "answer": [1]}), table)
    second = tmp_path / "second"
    pq.write_table(pa.table({"problem": ["two?"], "answer": [2]}), second)
    files = {
        "README.md": b"train",
        "data/train-00001-of-00002.parquet": second.read_bytes(),
        "data/train-00000-of-00002.parquet": table.read_bytes(),
        "data/test-00000-of-00001.jsonl.gz": gzip.compress(json.dumps({"problem": "t?", "answer": "3"}).encode()),
    }
    with hub(files) as url:
        train = read("hf://datasets/org/name", url, tmp_path / "cache")
        test = read("hf://datasets/org/name@main:test", url, tmp_path / "cache")
        none = read("hf://datasets/org/name:dev", url, tmp_path / "cache")
    assert train.returncode == test.returncode == 0, train.stderr + test.stderr
    assert train.stdout.index("one?") < train.stdout.index("two?")
    assert "t?" in test.stdout
    assert "hf://datasets/org/name:dev: no file of the split 'dev'" in none.stderr
    gone = read("hf://datasets/org/other", "http://127.0.0.1:9", tmp_path / "empty")
    assert "cannot fetch org/other from the Hugging Face Hub" in gone.stderr
    assert "--repo-type dataset --local-dir DIR` and name its file" in gone.stderr


@pytest.mark.parametrize(
    ("source", "names", "chosen"),
    [
        ("", ["data/train-0-of-1.parquet", "data/test-0-of-1.parquet"], ["data/train-0-of-1.parquet"]),
        (":test", ["main/train-0.parquet", "main/test-0.parquet"], ["main/test-0.parquet"]),
        ("/main", ["main/train-0.parquet", "socratic/train-0.parquet"], ["main/train-0.parquet"]),
        ("/test-b.jsonl", ["a.jsonl", "test-b.jsonl"], ["test-b.jsonl"]),
        ("", ["rows.json", "README.md"], ["rows.json"]),
        ("", ["default/train/0000.parquet", "default/train/0001.parquet"], None),
        (":train", ["training/untrained.jsonl"], "no file of the split 'train'"),
        ("", ["main/train-0.parquet", "socratic/train-0.parquet"], "several folders or formats .*datasets/o/n/main$"),
        ("", ["train.jsonl", "train.parquet"], "several folders or formats"),
        ("", ["README.md", "train.csv"], "none that can be read"),
    ],
)
def test_which_files_are_a_split(source: str, names: list[str], chosen: list[str] | str | None) -> None:
    name = parse(f"hf://datasets/o/n{source}")
    if isinstance(chosen, str):
        with pytest.raises(InputError, match=chosen):
            choose(names, name, f"hf://datasets/o/n{source}")
    else:
        assert choose(names, name, "") == (chosen or names)


@pytest.mark.parametrize("source", ["hf://o/n", "hf://datasets/n", "hf://datasets/o/n:", "hf://models/o/n"])
def test_another_form_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="expected hf://datasets/ORG/NAME"):
        parse(source)
