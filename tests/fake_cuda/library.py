"""Compiles `guard.cpp` once for each torch, into the user's cache, under a name that says what it is made of."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
REQUIRED = "MICOTA_REQUIRE_FAKE_CUDA"  # =1 in the environment: a machine without a compiler fails and does not skip


def compiler() -> str | None:
    """Return the C++ compiler's path; None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def library() -> Path:
    """Return the compiled library; takes four seconds the first time.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    program = compiler()
    if program is None:
        raise RuntimeError("no C++ compiler: install g++, or name another in $CXX")
    spec = importlib.util.find_spec("torch")  # does not import it: the library must be loaded before torch is
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    made_of = f"{version('torch')} {torch} {program} {SOURCE.read_text(encoding='utf-8')}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "micota-fast"
    out = cache / f"fake-cuda-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not out.exists():
        cache.mkdir(parents=True, exist_ok=True)
        aside = out.with_suffix(f".{os.getpid()}")
        include = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
        link = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        command = [program, "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCE), *include, *link, "-o", str(aside)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{program} could not compile {SOURCE}:\n{done.stderr[-4000:]}")
        aside.rename(out)
    return out
