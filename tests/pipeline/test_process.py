"""What `micota run` shows of a stage's log while it runs."""

import os
import sys
import time
from pathlib import Path

from micota_fast.config.recipe import LaunchConfig
from micota_fast.pipeline.process import StageProcess
from micota_fast.pipeline.stage import Stage
from micota_fast.pipeline.stages import VERBS

LINES = [
    "a: 10.00% [5.00, 20.00] (1 of 10)",
    "7 of 20 answers",
    "b: 50.00% [20.00, 80.00] (5 of 10)",
    "average of 2: 30.00% [1.00, 9.00]",
]


def test_each_score_is_shown_once_and_at_once(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("before: 99.00% [90.00, 100.00] (as an earlier process wrote)\n")
    code = f"import time\nfor line in {LINES!r}:\n    print(line, flush=True)\n    time.sleep(0.1)"
    lock = os.open(tmp_path / ".lock", os.O_CREAT | os.O_RDWR)
    stage = Stage("evaluate/base", "evaluate", None, (), ())
    command = [sys.executable, "-c", code]
    process = StageProcess(stage, tmp_path, command, LaunchConfig(), lock, VERBS["evaluate"].results)
    said: list[str] = []
    deadline = time.monotonic() + 60
    status = None
    while status is None and time.monotonic() < deadline:
        status = process.poll(said.append)
        time.sleep(0.01)
    os.close(lock)
    assert status == 0
    assert said == [f"    evaluate/base | {line}" for line in LINES if "answers" not in line]
