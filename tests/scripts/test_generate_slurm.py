"""scripts/generate.slurm with stand-ins for Slurm's programs: servers, a corpus, and back into the queue."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.servers import Server
from helpers.waiting import wait_for
from micota_fast.common.records import Problem, write_rows
from micota_fast.serve.serve import QUIET_PORTS
from micota_fast.sources.completions import read_completions

PROBLEMS, SAMPLES = 100, 2

# What is used of Slurm. srun passes SIGTERM on to its step, as the real one does; its head is such because the path of
# the interpreter may hold a space.
SLURM = {
    "scontrol": """#!/bin/sh
case "$*" in
    "show hostnames node[1]") echo 127.0.0.1 ;;
    "requeue 7") touch "$SLURM_HERE/requeue" ;;
    *) exit 1 ;;
esac
""",
    "srun": f"""#!/bin/sh
''':'
exec "{sys.executable}" "$0" "$@"
'''
import signal, subprocess, sys
assert sys.argv[1:3] == ["--no-kill", "--kill-on-bad-exit=0"]
step = subprocess.Popen(sys.argv[3:], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: step.terminate())
sys.exit(step.wait())
""",
}


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_on_where_it_was(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    for name, text in SLURM.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    problems, out = tmp_path / "problems.jsonl", tmp_path / "out.jsonl"
    write_rows(problems, [Problem(f"p{i}", f"{i} + 1 = ", str(i + 1)) for i in range(PROBLEMS)])
    options = {"problems": problems, "out": out, "samples": SAMPLES, "temperature": 1.0, "max_new_tokens": 400}
    options |= {"concurrency": 4}
    port = random.SystemRandom().choice(QUIET_PORTS)
    environment = os.environ | {
        **{"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1]"},
        **{"SLURM_HERE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        **{"MODEL": str(qwen2_checkpoint), "SERVERS": "2", "PORT": str(port), "HOST": "127.0.0.1"},
        **{"SERVE": "--set engine=embedded --set device=cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    }
    command = ["bash", str(ROOT / "scripts" / "generate.slurm")]
    command += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    log = tmp_path / "job.log"
    servers = [Server(f"http://127.0.0.1:{port + i}") for i in range(2)]

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def decoded() -> list[int]:
        infos = [None if server.gone() else server.read("/server_info") for server in servers]
        return [info["internal_states"][0]["decode_tokens"] if info else 0 for info in infos]

    job = start()
    try:
        wait_for(lambda: job.poll() is not None or min(decoded()) > 300, 240)
        assert job.poll() is None, log.read_text()
        job.send_signal(signal.SIGUSR1)
        assert job.wait(240) == 0, log.read_text()
        assert (tmp_path / "requeue").exists(), log.read_text()
        wait_for(lambda: all(server.gone() for server in servers))
        assert not out.exists()
        (tmp_path / "requeue").unlink()
        job = start()
        assert job.wait(240) == 0, log.read_text()
    finally:
        job.terminate()
        job.wait(240)
    assert not (tmp_path / "requeue").exists(), "what is finished is not put back"
    wait_for(lambda: all(server.gone() for server in servers))
    assert len(re.findall("^job 7, start", log.read_text(), re.MULTILINE)) == 2
    rows = read_completions(out)
    assert [(row.id, row.sample) for row in rows] == [(f"p{i}", s) for i in range(PROBLEMS) for s in range(SAMPLES)]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    def error(folder: Path, *arguments: str, **env: str) -> str:
        job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "node[1]"}
        command = ["bash", str(ROOT / "scripts" / "generate.slurm"), *arguments]
        done = subprocess.run(command, env=os.environ | job | env, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done.stderr

    assert "submit from the root of the repository" in error(tmp_path)
    assert "MODEL is not set" in error(ROOT, "x.yaml", MODEL="")
    assert "name the configuration" in error(ROOT, MODEL="m")
