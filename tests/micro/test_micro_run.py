"""MiCoTA end to end on the shipped checkpoints, small: killed in every kind of stage, and read by transformers."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.micro_runs import SMALL
from helpers.waiting import wait_for

ENDS = ["", "arm", "base", "short", "long", "mix", "mid", "", "report:", "answers:", "next:"]
KINDS = ("answers", "corpus", "model", "student", "evaluate", "align", "report")


def command(folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "micota_fast",
        "run",
        "micro",
        "--out",
        str(folder),
        *(f"--set={option}" for option in SMALL),
    ]


def run(folder: Path) -> str:
    ended = subprocess.run(command(folder), capture_output=True, text=True, timeout=840)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def processor_s() -> float:
    """What our children have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


pytestmark = pytest.mark.slow  # the whole run comes first


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro") / "run"
    before = processor_s()
    told = run(folder)
    (folder.parent / "processor_s").write_text(str(processor_s() - before))
    assert re.search(r": done in [\d.]+ s; about \d+ (s|min) left\n", told)
    assert [line.partition(" ")[0] for line in told.splitlines()[-11:]] == ENDS
    return folder


def test_a_finished_run_does_nothing_and_says_so_quickly(finished: Path) -> None:
    before = sorted((str(file), file.stat().st_mtime_ns) for file in finished.rglob("*") if file.is_file())
    started = processor_s()  # not the time: the machine may be busy
    assert [line.partition(" ")[0] for line in run(finished).splitlines()] == ENDS[1:], "the small table, and no more"
    assert processor_s() - started < 0.1 * float((finished.parent / "processor_s").read_text())
    after = sorted((str(file), file.stat().st_mtime_ns) for file in finished.rglob("*") if file.is_file())
    assert [row for row in after if row not in before] == []


def test_killed_in_each_kind_of_stage_gives_the_same_table(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed = set()
    for _ in range(3 * len(KINDS)):
        process = subprocess.Popen(command(folder), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            kind = line.partition("] ")[2].partition("/")[0].partition(":")[0]
            if kind in KINDS and kind not in killed and line.rstrip().endswith((": starts", ": resumes")):
                if kind == "report":  # the last: it must not end meanwhile
                    wait_for(lambda: (folder / "report" / "log.txt").exists())
                else:
                    time.sleep(0.2 if kind == "corpus" else 0.4 + 0.3 * len(killed))  # some in mid-work
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.add(kind)
                    break
        process.stdout.close()
        process.wait()
        if (folder / "report" / "done.json").exists():
            break
    run(folder)
    assert killed == set(KINDS), "the run ended before it was killed in each kind of stage"
    for name in ("table.md", "report.json"):
        assert (folder / "report" / name).read_bytes() == (finished / "report" / name).read_bytes()


def test_the_trained_student_answers_alike_in_transformers(finished: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = finished / "student" / "mid-seed1" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = [json.loads(line) for line in (finished / "evaluate/mid-seed1/rows/press-4.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows[:6]:
        prompt = row["problem"] + "\nPlease reason step by step, and put your final answer within \\boxed{}."
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": prompt},
        ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=256, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == row["completion"]
