# Sourced by the other scripts: makes or reuses .venv and installs the package with the extras named in $1.
# Needs Python >= 3.11; $PYTHON names another interpreter.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

fail() { echo "error: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.12 python3.11; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

prepare_environment() {
    local extras="$1" python stamp wanted
    [ "$(uname -s)" = Linux ] || echo "note: tested on Linux only; this is $(uname -s)" >&2
    if [ ! -x .venv/bin/python ]; then
        python="$(find_python)" || fail "no Python >= 3.11 found; install one or name it: PYTHON=/path/to/python3.11"
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv .venv || fail "could not make .venv; on Debian or Ubuntu: apt-get install python3-venv"
    fi
    # What is installed, and from which pyproject.toml: a second call does nothing.
    stamp=".venv/installed-$extras"
    wanted="$(sha256sum pyproject.toml | cut -d' ' -f1)"
    [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && return
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
            echo "Installing torch (an NVIDIA GPU is here)"
            .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.16" ||
                fail "pip could not install torch; its message is above"
        else
            # First and pinned: an unpinned torch pulls gigabytes of CUDA libraries onto a machine without a GPU.
            echo "Installing torch 2.13.0 (no NVIDIA GPU here)"
            .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 ||
                fail "pip could not install torch==2.13.0; its message is above"
        fi
    fi
    echo "Installing micota-fast[$extras]"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" ||
        fail "pip could not install micota-fast[$extras]; its message is above"
    echo "$wanted" > "$stamp"
}
