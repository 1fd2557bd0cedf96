"""The judge behind OpenAI's API: the same question, the same client, no checkpoint."""

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from helpers.servers import serving_app
from micota_fast.common.records import Completion
from micota_fast.config import loader
from micota_fast.config.evaluation import JudgeConfig
from micota_fast.errors import InputError
from micota_fast.evaluation.judge import ModelJudge
from micota_fast.grading.grader import Verdict

KEY = "sk-of-the-judge"


def test_a_judge_is_asked_by_openais_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    asked: list[dict[str, Any]] = []

    async def judges(http: web.Request) -> web.StreamResponse:
        assert http.headers["Authorization"] == f"Bearer {KEY}"
        asked.append(body := await http.json())
        text = "True" if "Generated Answer: 0.5" in body["messages"][1]["content"] else "False"
        choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 90, "completion_tokens": 1}})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", judges)
    given = ["0.5", "0.7", "1/2"]
    rows = [Completion("a", i, "Half?", "1/2", f"\\boxed{{{x}}}", "stop", 1, 1, None) for i, x in enumerate(given)]
    verdicts = [Verdict("wrong", "0.5"), Verdict("wrong", "0.7"), Verdict("correct", "1/2")]
    with serving_app(app) as url:
        config = JudgeConfig(model="gpt-judge", url=url, api="openai")
        config.openai.key_env = "JUDGE_KEY"
        judge = ModelJudge(config, tmp_path / "judge", 5.0)
        assert judge.verdicts({"set.jsonl": (rows, verdicts)}) == {"set.jsonl": [True, False, True]}
        judge.verdicts({"set.jsonl": (rows, verdicts)})
    assert len(asked) == 2  # and what is kept is not asked again
    assert {body["model"] for body in asked} == {"gpt-judge"}
    described = judge.describe()
    assert (described.model, described.made_by["api"]) == ("gpt-judge", "openai")
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_the_way_to_a_judge_is_no_part_of_what_its_verdicts_depend_on() -> None:
    native = loader.identity(JudgeConfig(model="m"))
    assert native.keys() == {"model", "serve"}
    api = loader.build(
        JudgeConfig, {"model": "m", "api": "openai", "url": "http://a", "openai": {"stream": False}}, "t"
    )
    assert loader.identity(api) == native | {"api": "openai"}
    with pytest.raises(InputError, match="`api: openai` needs `url`"):
        loader.build(JudgeConfig, {"model": "m", "api": "openai"}, "t")
