"""A recipe whose teacher is only served by an API: its stages, its plan, and what the doctor asks and says of it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from micota_fast.cli import main
from micota_fast.common.fingerprint import of_json
from micota_fast.common.json_io import read_json
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.config.shipped import recipe_file
from micota_fast.errors import InputError
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.stage import Stage
from micota_fast.planning import machine

KEY = "sk-very-secret-0123456789"
URL = "http://127.0.0.1:1/v1"


def options(url: str = URL, **openai: object) -> list[str]:
    given = {"key_env": "TEACHER_KEY", **openai}
    return [
        f"models.teacher={{served: big-reasoner, url: '{url}'}}",
        "generate.api=openai",
        *(f"generate.openai.{name}={value}" for name, value in given.items()),
    ]


def stages(*overrides: str) -> dict[str, Stage]:
    path = recipe_file("micro")
    built = build_stages(loader.load(Recipe, path, overrides), path, Path("/run"))
    return {stage.name: stage for stage in built}


def test_only_the_teacher_is_asked_by_the_api_and_no_checkpoint_of_it_is_needed() -> None:
    with_api, without = stages(*options()), stages()
    teacher = with_api["answers/long"]
    assert (teacher.settings.model, teacher.settings.api, teacher.settings.url) == ("big-reasoner", "openai", URL)
    assert [artefact.location.rpartition("/")[2] for artefact in teacher.inputs] == ["train.jsonl"]
    for name in ("answers/short", "answers/own", "answers/mid"):  # by servers that the run starts
        assert with_api[name].settings.api == "sglang"
        assert of_json(loader.identity(with_api[name].settings)) == of_json(loader.identity(without[name].settings))
    assert with_api.keys() == without.keys()


def test_the_way_to_an_api_changes_no_identity_and_the_api_and_the_name_do() -> None:
    def identity(*overrides: str) -> object:
        return loader.identity(stages(*overrides)["answers/long"].settings)

    first = identity(*options())
    assert identity(*options("http://elsewhere/v1", requests_per_minute=5, stream="false")) == first
    assert identity(*options(), f"models.teacher={{served: other, url: '{URL}'}}") != first
    assert "sglang" not in str(first)
    assert "TEACHER_KEY" not in str(first)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("models.teacher={served: big}",), "`served` needs `url`"),
        ((f"models.teacher={{served: big, url: '{URL}'}}",), "it is only `served`"),
        ((*options(), "models.assistant-long.train.base=teacher"), "it is only `served`"),
        ((*options(), "student=teacher", "student_answers=null"), "it is only `served`"),
        ((*options(), "generate.thinking_budget=9"), "`thinking_budget` needs SGLang's native API"),
    ],
)
def test_what_a_model_that_is_only_served_cannot_do_is_refused(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(InputError) as caught:
        stages(*overrides)
    assert why in str(caught.value)


def test_a_plan_gives_an_api_its_price_and_no_gpu_hours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    priced = options(dollars_per_million_prompt_tokens=2, dollars_per_million_completion_tokens=10)
    call = ["plan", "micro", f"--out={tmp_path / 'run'}", "--gpu=h100", f"--json={tmp_path / 'plan.json'}"]
    assert main([*call, *(f"--set={option}" for option in priced), "--answer-tokens", "long=100"]) == 0
    said = capsys.readouterr().out
    planned = {stage["stage"]: stage for stage in read_json(tmp_path / "plan.json")["stages"]}
    teacher = planned["answers/long"]
    assert (teacher["hours"], teacher["gpus"], teacher["memory"], teacher["flops"]) == (None, 0, 0, 0)
    assert teacher["tokens"] > 100
    assert f"at {URL}, $" in said


class Asked:
    """An HTTP server that replies to everything with a status, and what it was asked."""

    def __init__(self, status: int, location: str = "") -> None:
        self.asked: list[tuple[str, str | None]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers.get("Authorization")))
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def api() -> Iterator[Asked]:
    server = Asked(200)
    yield server
    server.close()


@pytest.mark.slow
def test_the_doctor_asks_the_api_with_the_key_and_misses_it_by_its_variable(
    api: Asked, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["doctor", "micro", f"--out={tmp_path / 'run'}", *(f"--set={option}" for option in options(api.url))]
    monkeypatch.setenv("TEACHER_KEY", KEY)
    main(call)
    said = capsys.readouterr()
    assert api.asked == [("/v1/models", f"Bearer {KEY}")]
    assert f"{api.url} answers 200" in said.out
    assert KEY not in said.out + said.err
    monkeypatch.delenv("TEACHER_KEY")
    assert main(call) == 1
    assert "`openai.key_env`: the environment variable TEACHER_KEY is not set" in capsys.readouterr().out
    assert len(api.asked) == 1


def test_a_key_does_not_follow_a_redirect_to_another_host(api: Asked) -> None:
    redirects = Asked(302, f"{api.url}/elsewhere")
    try:
        assert machine.http_status(f"{redirects.url}/v1/models", "GET", f"Bearer {KEY}", proxies=False) == 200
    finally:
        redirects.close()
    assert redirects.asked == [("/v1/models", f"Bearer {KEY}")]
    assert api.asked == [("/elsewhere", None)]
