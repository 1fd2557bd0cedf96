"""`micota evaluate` with `api: openai` against our own /v1: answers and scores are those of the native API."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT
from micota_fast.config.evaluation import BenchmarkConfig, EvaluateConfig, OwnSampling
from micota_fast.config.generation import OpenAIConfig, ServeConfig
from micota_fast.evaluation.evaluate import run
from micota_fast.serve.serve import serving
from micota_fast.sources.completions import read_completions

MICRO = ROOT / "micota_fast" / "micro"
MODEL = str(MICRO / "checkpoints" / "assistant")


def test_an_api_scores_as_the_native_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_KEY", key := "sk-of-our-own-server")
    press = str(MICRO / "problems" / "press-4.jsonl")
    sampled = OwnSampling(samples=4, temperature=1.0)
    benchmarks = [
        BenchmarkConfig(name="greedy", path=press, limit=12),
        BenchmarkConfig(name="sampled", path=press, limit=6, sampling=sampled),
    ]

    def evaluated(name: str, **more: Any) -> dict[str, Any]:
        out = str(tmp_path / name)
        run(EvaluateConfig(model=MODEL, out=out, benchmarks=benchmarks, max_new_tokens=60, workers=1, **more))
        results: dict[str, Any] = json.loads((tmp_path / name / "results.json").read_text())
        return results

    with serving(MODEL, ServeConfig(dtype="float64"), tmp_path / "log.txt") as [url]:
        native = evaluated("native", url=url)
        api = evaluated("api", url=f"{url}/v1", api="openai", openai=OpenAIConfig(key_env="OWN_KEY"))
    again = evaluated("api", url="http://127.0.0.1:9", api="openai", openai=OpenAIConfig(key_env="OWN_KEY"))
    assert again == api, "what was answered and graded is not asked again"
    for name, entry in api["benchmarks"].items():
        made_by, theirs = entry.pop("made_by"), native["benchmarks"][name].pop("made_by")
        assert (made_by["api"], "serve" in made_by, "serve" in theirs) == ("openai", False, True)
        assert 0 < entry["accuracy"] < 1
        rows = [
            [(row.completion, row.finish_reason) for row in answers(tmp_path / of, name)] for of in ("api", "native")
        ]
        assert rows[0] == rows[1]
    assert api["benchmarks"] == native["benchmarks"]
    assert {"majority", "pass_at"} <= api["benchmarks"]["sampled"].keys()
    assert not any(key.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def answers(out: Path, name: str) -> Any:
    return read_completions(out / "completions" / f"{name}.jsonl")
