"""The versions and the machine that a stage is made with."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path


def versions() -> dict[str, str]:
    """Return packages and machine, without times, so that equal runs give equal records."""
    packages = ("micota-fast", "torch", "numba", "tokenizers", "safetensors", "math-verify")
    found = {package: _version(package) for package in packages}
    return {
        "python": platform.python_version(),
        **{package: version for package, version in found.items() if version},
        "platform": f"{sys.platform} {platform.machine()}, {os.cpu_count()} cores, {_cpu_model()}",
    }


def commit() -> str:
    """Return the commit of this installation, with -dirty if files differ from it; empty outside of a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or one that does not trust the folder
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
