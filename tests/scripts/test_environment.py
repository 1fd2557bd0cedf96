"""scripts/environment.sh: where torch comes from. A stand-in for the environment's Python notes what it is asked."""

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.executables import executable
from helpers.paths import ROOT

CPU = "https://download.pytorch.org/whl/cpu"
PYTHON = """#!/bin/sh
case "$*" in
*"config list"*) printf '%s' "$CONFIGURED" ;;
*) echo "pip $*" >> "$ASKED"; case "$*" in *pytorch.org*) exit $UNREACHABLE ;; esac ;;
esac
"""


def asked(folder: Path, *, configured: str = "", unreachable: int = 0, gpu: bool = False, uv: bool = False) -> str:
    """Return what is asked of pip and uv, in order, and what the script says, by `install_torch`."""
    log, programs = folder / "asked", folder / "programs"
    executable(folder / "venv" / "python", PYTHON)
    (folder / "venv" / "bin").symlink_to(folder / "venv")
    executable(programs / "nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")
    if uv:
        executable(programs / "uv", '#!/bin/sh\necho "uv $*" >> "$ASKED"\n')
    script = f'. "{ROOT}/scripts/environment.sh"; VENV="{folder}/venv"; install_torch'
    variables = {"CONFIGURED": configured, "ASKED": str(log), "UNREACHABLE": str(unreachable)}
    for tool in (
        "bash",
        "sh",
        "cat",
        "grep",
        "sed",
        "dirname",
        "env",
        "sha256sum",
        "cut",
        "tr",
        "head",
        "timeout",
        "mkdir",
    ):
        if (found := shutil.which(tool)) and not (programs / tool).exists():  # and no uv of this machine's
            (programs / tool).symlink_to(found)
    path = str(programs)
    run = subprocess.run(["bash", "-c", script], env={**variables, "PATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return log.read_text().replace("--quiet ", "").replace("--disable-pip-version-check ", "") + run.stdout + run.stderr


def test_without_a_gpu_torch_comes_from_its_cpu_index(tmp_path: Path) -> None:
    said = asked(tmp_path)
    assert said.count("pip -m pip install") == 1
    assert f"--index-url {CPU} torch==2.13.0" in said
    assert "3 GB" not in said


def test_if_that_index_does_not_answer_the_default_one_is_asked_and_the_size_is_said_before(tmp_path: Path) -> None:
    lines = asked(tmp_path, unreachable=1).splitlines()
    assert [CPU in line for line in lines[:2]] == [True, False]
    assert lines[1].endswith("torch==2.13.0")
    assert "up to 3 GB" in lines[-1]


@pytest.mark.parametrize(
    "setting",
    [
        "global.index-url='https://x'\n",
        ":env:.find-links='/wheels'\n",
        "global.find-links='/x'\n" + "a.b='c'\n" * 15_000,
    ],
    ids=["index", "wheels in the environment", "wheels, and many other settings"],
)
def test_an_index_of_pips_own_settings_wins_and_uv_which_does_not_read_them_is_not_used(
    tmp_path: Path, setting: str
) -> None:
    said = asked(tmp_path, configured=setting, uv=True)
    assert said.splitlines()[0] == "pip -m pip install torch==2.13.0"
    assert CPU not in said
    assert "uv " not in said


def test_an_extra_index_adds_to_pytorchs_and_does_not_replace_it(tmp_path: Path) -> None:
    said = asked(tmp_path, configured="global.extra-index-url='https://x'\n", uv=True)
    assert said.splitlines()[0] == f"pip -m pip install --index-url {CPU} torch==2.13.0", (
        "uv would not read the setting"
    )


@pytest.mark.parametrize("name", ["sglang_cpu_env.sh", "real_clients_env.sh"])
def test_the_other_environments_get_torch_from_the_same_place(name: str) -> None:
    lines = (ROOT / "scripts" / name).read_text().splitlines()
    first = next(line for line in lines if line.startswith("install"))
    assert first.split()[0] == "install_cpu_torch"


def test_settings_that_name_no_index_are_none(tmp_path: Path) -> None:
    assert CPU in asked(tmp_path, configured="global.cert='/etc/ssl/x'\n:env:.default-timeout='180'\n")


def test_uv_is_used_where_it_is_installed(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    assert (
        asked(tmp_path, uv=True).splitlines()[0] == f"uv pip install --python {python} --index-url {CPU} torch==2.13.0"
    )


def test_with_a_gpu_the_size_is_said_before_the_download(tmp_path: Path) -> None:
    said = asked(tmp_path, gpu=True)
    assert said.splitlines()[0] == "pip -m pip install torch>=2.11,<2.16"
    assert "up to 3 GB" in said
