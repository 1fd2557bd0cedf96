"""Which machine, versions, commit and date a row was measured on."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def version(package: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(*packages: str) -> dict[str, object]:
    """What every row says about its making, next to its figures.

    Args:
        packages: distributions whose versions count; null in the row if one is not installed.
    """
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "versions": {package: version(package) for package in packages},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append results to a file of `results/`, a JSON object per line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """HEAD, with "-dirty" where anything but results differs from it; None outside a git checkout."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return head and head + ("-dirty" if changes else "")


def _output(*command: str) -> str | None:
    """What a command prints; None if it does not exist, fails or prints nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
