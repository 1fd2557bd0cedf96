"""The pipeline on cheap real stages (filter, mix): what is done, stale, set aside, restored, killed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from aiohttp import web

import micota_fast
from helpers.faulty_server import answer
from helpers.servers import http_server
from helpers.training_runs import metrics, train_config
from helpers.waiting import wait_for
from micota_fast.cli import main
from micota_fast.common.records import Completion, Problem, write_rows
from micota_fast.config import loader
from micota_fast.config.corpus import FilterConfig, MixConfig
from micota_fast.config.generation import GenerateConfig
from micota_fast.config.recipe import LaunchConfig, Recipe
from micota_fast.errors import InputError
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.run import Run
from micota_fast.pipeline.stage import Artefact, Stage

MICRO = Path(micota_fast.__file__).parent / "recipes" / "micro.yaml"
ONE_JOB = LaunchConfig(jobs=1, threads=1)


def completions(folder: Path, name: str, tokens: int = 5) -> Path:
    rows = [
        Completion(
            id=f"p{i}",
            sample=0,
            problem=f"{i} + 1?",
            answer=str(i + 1),
            completion=f"{name}: \\boxed{{{i + 1 if i % 3 else 0}}}",
            finish_reason="stop",
            prompt_tokens=4,
            completion_tokens=tokens,
            seed=None,
        )
        for i in range(12)
    ]
    write_rows(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def stages(folder: Path, run: Path, max_tokens: int = 100, seed: int = 0) -> list[Stage]:
    made = []
    parts = {}
    for name in ("long", "short"):
        source = folder / f"{name}.jsonl"
        out = run / "corpus" / name / "corpus.jsonl"
        settings = FilterConfig(completions=str(source), out=str(out), max_tokens=max_tokens, workers=1)
        outputs = ("corpus.jsonl", "corpus.jsonl.counts.json")
        made.append(Stage(f"corpus/{name}", "filter", settings, (Artefact(str(source)),), outputs))
        parts[name] = Artefact(str(out), f"corpus/{name}")
    mixed = MixConfig(
        parts={parts["long"].location: 1, parts["short"].location: 3},
        out=str(run / "corpus" / "mix" / "corpus.jsonl"),
        seed=seed,
    )
    made.append(Stage("corpus/mix", "mix", mixed, tuple(parts.values()), ("corpus.jsonl",)))
    return made


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    completions(tmp_path, "long")
    completions(tmp_path, "short")
    return tmp_path


def states(run: Run) -> dict[str, str]:
    return {name: status.state for name, status in run.statuses().items()}


def make(folder: Path, **options: int) -> Run:
    run = Run(stages(folder, folder / "run", **options), ONE_JOB, folder / "run")
    run.run(lambda line: None)
    return run


def test_done_stays_done_and_is_not_run_again(sources: Path) -> None:
    run = Run(stages(sources, sources / "run"), ONE_JOB, sources / "run")
    assert set(states(run).values()) == {"to do"}
    said: list[str] = []
    run.run(said.append)
    assert len([line for line in said if "done in" in line]) == 3
    assert set(states(run).values()) == {"done"}
    before = {file: file.stat().st_mtime_ns for file in (sources / "run").rglob("corpus.jsonl")}
    again: list[str] = []
    Run(stages(sources, sources / "run"), ONE_JOB, sources / "run").run(again.append)
    assert again == []
    assert before == {file: file.stat().st_mtime_ns for file in (sources / "run").rglob("corpus.jsonl")}


def test_a_password_in_a_url_does_not_stay_in_the_folder(sources: Path, qwen2_checkpoint: Path) -> None:
    allowed: list[str | None] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        allowed.append(http.headers.get("Authorization"))
        return web.json_response(answer(await http.json()))

    write_rows(sources / "problems.jsonl", [Problem(f"p{i}", f"{i} + 1?", str(i + 1)) for i in range(3)])
    folder = sources / "run"
    with http_server(handler) as url:
        settings = GenerateConfig(
            model=str(qwen2_checkpoint),
            problems=str(sources / "problems.jsonl"),
            out=str(folder / "answers" / "out.jsonl"),
            url=url.replace("//", "//me:pass-word@"),
        )
        stage = Stage("answers", "generate", settings, (Artefact(settings.problems),), ("out.jsonl",))
        run = Run([stage], ONE_JOB, folder)
        run.run(lambda line: None)
    assert allowed == ["Basic bWU6cGFzcy13b3Jk"] * 3
    assert states(run) == {"answers": "done"}
    assert url in (folder / "answers" / "config.yaml").read_text()
    assert [path for path in folder.rglob("*") if path.is_file() and b"pass-word" in path.read_bytes()] == []


def test_contents_count_not_times(sources: Path) -> None:
    run = make(sources)
    for file in [*sources.glob("*.jsonl"), *(sources / "run").rglob("corpus.jsonl")]:
        os.utime(file)
    assert set(states(run).values()) == {"done"}
    # One token more in one row: same size, another content.
    source = sources / "long.jsonl"
    source.write_text(source.read_text().replace('"completion_tokens": 5', '"completion_tokens": 6', 1))
    assert states(run) == {"corpus/long": "stale", "corpus/short": "done", "corpus/mix": "waits"}


def test_changed_option_is_named_and_the_old_artefact_comes_back(sources: Path) -> None:
    make(sources)
    old = (sources / "run/corpus/mix/corpus.jsonl").read_bytes()
    other = Run(stages(sources, sources / "run", seed=5), ONE_JOB, sources / "run")
    status = other.statuses()["corpus/mix"]
    assert (status.state, status.why) == ("stale", "seed 0 -> 5")
    other.run(lambda line: None)
    assert (sources / "run/corpus/mix/corpus.jsonl").read_bytes() != old
    said: list[str] = []
    Run(stages(sources, sources / "run"), ONE_JOB, sources / "run").run(said.append)
    assert [": restored" in line for line in said] == [True]
    assert (sources / "run/corpus/mix/corpus.jsonl").read_bytes() == old


def test_a_rebuilt_input_with_equal_bytes_leaves_what_follows_done(sources: Path) -> None:
    make(sources)
    done = (sources / "run/corpus/mix/done.json").read_bytes()
    make(sources, max_tokens=99)  # another option, the same rows pass
    assert (sources / "run/corpus/mix/done.json").read_bytes() == done


def test_a_damaged_output_is_made_again(sources: Path) -> None:
    run = make(sources)
    output = sources / "run/corpus/short/corpus.jsonl"
    good = output.read_bytes()
    output.write_bytes(good[:-7])
    assert run.statuses()["corpus/short"].why == "its output corpus.jsonl was changed"
    make(sources)
    assert output.read_bytes() == good


def test_a_failing_stage_says_so_and_keeps_what_was_done(sources: Path) -> None:
    (sources / "short.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"stage corpus/short failed(.|\n)*short\.jsonl:1"):
        make(sources)
    kept = states(Run(stages(sources, sources / "run"), ONE_JOB, sources / "run"))
    assert kept["corpus/long"] == "done"
    assert kept["corpus/short"] == "partial"


def test_files_that_are_not_ours_are_left_alone(sources: Path) -> None:
    thesis = sources / "run" / "corpus" / "mix" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(InputError, match=r"corpus/mix contains files that no run has made"):
        make(sources)
    assert thesis.read_text() == "years of work"


def test_what_comes_back_is_looked_at(sources: Path) -> None:
    make(sources)
    good = (sources / "run/corpus/mix/corpus.jsonl").read_bytes()
    make(sources, seed=5)
    (aside,) = (file for file in (sources / "run/corpus").glob("mix~*") if file.is_dir())
    (aside / "corpus.jsonl").write_bytes(b"garbage")
    make(sources)
    assert (sources / "run/corpus/mix/corpus.jsonl").read_bytes() == good


def test_a_file_rewritten_with_its_old_times_is_noticed(sources: Path) -> None:
    run = make(sources)
    source = sources / "long.jsonl"
    before = source.stat()
    with source.open("r+b") as file:
        file.seek(10)
        file.write(b"X")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert states(run)["corpus/long"] == "stale"


def test_a_name_that_begins_with_another_is_another(tmp_path: Path) -> None:
    for name in ("qwen", "qwen-long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    names = [str(tmp_path / "qwen"), str(tmp_path / "qwen-long")]
    settings = FilterConfig(completions=names[1], out=str(tmp_path / "run/x/out"))
    stage = Stage("x", "filter", settings, tuple(map(Artefact, names)), ("out",), {"names": " ".join(names)})
    run = Run([stage], ONE_JOB, tmp_path / "run")
    first = run.statuses()["x"].identity
    (tmp_path / "qwen-long" / "weights").write_text("other")
    second = run.statuses()["x"].identity
    assert first is not None
    assert second is not None
    assert first["options"] != second["options"]
    assert first["files"] != second["files"]
    assert str(tmp_path) not in json.dumps(first)


def test_the_order_of_names_counts(sources: Path) -> None:
    make(sources)
    turned = stages(sources, sources / "run")
    mixed = turned[-1].settings
    mixed.parts = dict(reversed(mixed.parts.items()))
    assert states(Run(turned, ONE_JOB, sources / "run"))["corpus/mix"] == "stale"


def test_two_runs_do_not_share_a_folder(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("micota_fast.pipeline.run.RUN_ENDS_S", 0.2)
    (sources / "run").mkdir()
    with (sources / "run" / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another run holds .*lock"):
            make(sources)


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_pipeline import ONE_JOB, Run, stages
folder = Path(sys.argv[2])
Run(stages(folder, folder / "run"), ONE_JOB, folder / "run").run(lambda line: print(line, flush=True))
"""


@pytest.mark.slow
def test_sigkill_anywhere_then_the_same_bytes(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    calm = tmp_path_factory.mktemp("calm")
    for name in ("long", "short"):
        completions(calm, name)
    make(calm)
    command = [sys.executable, "-c", RUNNER, str(Path(__file__).parent), str(sources)]
    kills = 0
    for line_number, delay in ((1, 0.0), (1, 0.0), (1, 0.3), (1, 0.6), (2, 0.0), (3, 0.3), (4, 0.0), (5, 0.2)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(line_number)]
        time.sleep(delay)
        if all(lines) and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.stdout.close()
        process.wait()
    assert kills >= 2, "before the first stage has begun, a kill is never late"
    make(sources)
    for name in ("long", "short", "mix"):
        relative = f"run/corpus/{name}/corpus.jsonl"
        assert (sources / relative).read_bytes() == (calm / relative).read_bytes()
    assert json.loads((sources / "run/corpus/mix/done.json").read_text())["stage"] == "corpus/mix"


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_training_that_a_signal_ended_is_not_taken_for_done(
    nproc: int, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    """It ends with status 0, as one that is finished does; what it left tells them apart."""
    config = train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / "run" / "student"), epochs=30.0)
    inputs = (Artefact(config.model), Artefact(config.data))
    stage = Stage("student", "train", config, inputs, ("model", "metrics.jsonl", "summary.json"))

    def trainers() -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if str(tmp_path / "run/student/config.yaml") in words and not any(
                    "torch.distributed.run" in word or "processes.py" in word for word in words
                ):
                    found.append(process)
        return found

    def end_a_trainer() -> None:
        wait_for(lambda: len(trainers()) >= nproc)  # looked for early: at its third step, none is lost in looking
        last = trainers()[-1]
        wait_for(lambda: len(metrics(config)) >= 3)
        last.terminate()

    signaller = threading.Thread(target=end_a_trainer)
    signaller.start()
    run = Run([stage], replace(ONE_JOB, nproc=nproc), tmp_path / "run")
    with pytest.raises(InputError, match=r"student ended before it was finished, without model, summary\.json"):
        run.run(lambda line: None)
    signaller.join()
    assert states(run) == {"student": "partial"}
    assert 3 <= len(metrics(config)) < 120
    Run([stage], ONE_JOB, tmp_path / "run").run(lambda line: None)
    assert states(run) == {"student": "done"}
    assert [row["step"] for row in metrics(config)] == list(range(1, 121))
    if nproc == 2:
        assert "resuming with 1 processes, but 2 processes wrote" in (tmp_path / "run/student/log.txt").read_text()


def evaluated(out: Path, *changes: str) -> dict[str, object]:
    """The untouched micro student on three problems, by `micota run`; its results."""
    small = ["arms={}", "align=[]", "student_answers=null", "evaluate.max_new_tokens=64", *changes]
    small += ["evaluate.benchmarks=[{name: press-4, path: ../micro/problems/press-4.jsonl, limit: 3}]"]
    assert main(["run", "micro", "--out", str(out), *(word for change in small for word in ("--set", change))]) == 0
    results: dict[str, object] = json.loads((out / "evaluate/base/results.json").read_text())
    return results


@pytest.mark.slow
def test_a_benchmark_that_is_added_or_changed_is_answered_alone(tmp_path: Path) -> None:
    asked: list[str] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        asked.append(body["rid"])
        return web.json_response(answer(body))

    def base(*names: str, **changed: str) -> dict[str, bytes]:
        """Evaluate the untouched micro student by itself; the bytes of what the stage made."""
        sets = [{"name": n, "path": f"../micro/problems/{n}.jsonl", "limit": 3} | changed for n in names]
        if changed:
            sets[:-1] = [{k: v for k, v in of.items() if k not in changed} for of in sets[:-1]]
        overrides = [f"evaluate.benchmarks={json.dumps(sets)}", f"models.student.url={url}", "arms={}"]
        recipe = loader.load(Recipe, str(MICRO), [*overrides, "align=[]", "student_answers=null"])
        stages = [s for s in build_stages(recipe, MICRO, tmp_path / "run") if s.verb == "evaluate"]
        Run(stages, ONE_JOB, tmp_path / "run").run(lambda line: None)
        folder = tmp_path / "run/evaluate/base"
        files = (file for file in folder.rglob("*") if file.is_file() and file.parent != folder)
        return {str(file.relative_to(folder)): file.read_bytes() for file in files if "meters" not in file.name}

    with http_server(handler) as url:
        one = base("press-4")
        assert len(asked) == 3
        two = base("press-4", "press-5")
        assert len(asked) == 6
        assert one.items() <= two.items()  # scores and graded rows among them
        graded = json.loads((tmp_path / "run/evaluate/base/timing.json").read_text())["grading_s"]
        assert list(graded) == ["press-5"]
        changed = base("press-5", "press-4", prompt="Say: {problem}")  # other order, another prompt for one
        assert len(asked) == 9
        assert [name for name in two if two[name] != changed[name] and "press-5" in name] == []
        assert two["completions/press-4.jsonl"] != changed["completions/press-4.jsonl"]
        assert base("press-5", "press-4", prompt="Say: {problem}") == changed
        assert len(asked) == 9
        # As a run of a version before leaves it: no scores, no graded rows are taken over, but the answers are.
        shutil.rmtree(tmp_path / "run/evaluate/base/scores")
        assert base("press-5") == {name: content for name, content in two.items() if "press-5" in name}
        assert len(asked) == 9
    assert not (tmp_path / "run/evaluate/base/server.log").exists()


@pytest.mark.slow
def test_graded_again_by_another_protocol_nothing_is_answered_again(tmp_path: Path) -> None:
    strict = evaluated(tmp_path)
    answers = (tmp_path / "evaluate/base/completions/press-4.jsonl").read_bytes()
    # As a killed run leaves it: half copied.
    (tmp_path / "evaluate/base/.completions.0123456789abcdef.partial").mkdir()
    paper = evaluated(tmp_path, "evaluate.protocol=paper")
    folder = tmp_path / "evaluate/base"
    assert (folder / "completions/press-4.jsonl").read_bytes() == answers
    assert not (folder / "server.log").exists()  # so none was started
    assert paper != strict
    assert paper["average"] == strict["average"]
    (folder / "results.json").unlink()  # as somebody does who wants it graded again
    assert evaluated(tmp_path, "evaluate.protocol=paper") == paper
    assert not (folder / "server.log").exists()
    # Killed before it was finished, and then wanted otherwise.
    (folder / "making.json").write_text(
        json.dumps({"identity": json.loads((folder / "done.json").read_text())["identity"]})
    )
    (folder / "done.json").unlink()
    shutil.rmtree(tmp_path / "evaluate" / next(p.name for p in (tmp_path / "evaluate").iterdir() if "~" in p.name))
    assert evaluated(tmp_path)["average"] == strict["average"]
    assert not (folder / "server.log").exists()
    evaluated(tmp_path, "evaluate.protocol=paper", "evaluate.max_new_tokens=63")
    assert (folder / "server.log").exists()  # other answers are asked for


def test_a_dry_run_tells_every_command_that_it_would_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["run", "micro", "--out", str(run), "--dry-run", "--set", "launch.nproc=2"]) == 0
    told = capsys.readouterr().out
    assert f"-m micota_fast generate {run}/answers/long/config.yaml" in told
    assert f"--nproc-per-node=2 -m micota_fast.train {run}/student/mid-seed1/config.yaml" in told
    assert f"-m micota_fast merge {run}/model/assistant-mid/mergekit.yaml" in told
    assert not run.exists()
