# Sourced by the other scripts: makes or reuses .venv and installs the package with the extras named in $1.
# Needs Python >= 3.11; $PYTHON names another interpreter.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

fail() { echo "error: $*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "\$PYTHON names $PYTHON, which is no Python >= 3.11"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python3.11"
}

# Whether pip has a setting whose name matches $1, in its files or in the environment.
pip_has() {
    local settings # all of them first: grep ends at the first match, and pipefail would take pip's broken pipe for a no
    settings="$("$VENV/bin/python" -m pip --disable-pip-version-check config list 2>/dev/null || true)"
    grep -qE "[.]($1)=" <<< "$settings"
}

# Whether pip is to look in a place of the user's choice and in no other. A mere extra index adds to whichever is asked.
pip_has_an_index() { pip_has "index-url|find-links|no-index"; }

# The fast installer where there is one, unless pip has settings of its own, which uv does not read.
pip_install() {
    if command -v uv >/dev/null 2>&1 && ! pip_has "index-url|extra-index-url|find-links|no-index"; then
        uv pip install --quiet --python "$VENV/bin/python" "$@"
    else
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

install() { pip_install "$@" || fail "could not install $*; the installer's message is above"; }

# torch for this machine.
install_torch() {
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        echo "Installing torch (an NVIDIA GPU is here): with CUDA's libraries a download of up to 3 GB"
        install "torch>=2.11,<2.16"
        return
    fi
    install_cpu_torch
}

# A torch without CUDA, about 200 MB: from pip's own index where one is configured (PIP_INDEX_URL=...), else from
# PyTorch's, and only if that does not answer at once from the default index.
install_cpu_torch() {
    echo "Installing torch 2.13.0 for a CPU"
    if ! pip_has_an_index; then
        UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 PIP_TIMEOUT=10 PIP_RETRIES=0 \
            pip_install --index-url "$TORCH_CPU_INDEX" torch==2.13.0 && return
        echo "note: $TORCH_CPU_INDEX did not serve it; from the default index it may bring CUDA's libraries, a download" \
            "of up to 3 GB. To choose another index, stop this and set PIP_INDEX_URL" >&2
    fi
    install torch==2.13.0 # first, and this version: the newest brings CUDA's libraries from every index
}

# An empty environment of its own in directory $2 for the script $1, where `install` then installs. When an earlier call of
# the same script has finished there (`environment_is_complete`), the script ends here.
start_environment() {
    VENV="$2" STAMP="$(sha256sum "$1" | cut -d' ' -f1) $2"
    if [ "$(cat "$VENV/installed" 2>/dev/null || true)" = "$STAMP" ]; then
        echo "$VENV is there already"
        exit
    fi
    local python
    python="$(find_python)"
    echo "Making $VENV with $("$python" --version)"
    rm -rf "$VENV" # half of one, or an older one
    "$python" -m venv "$VENV" || fail "could not make $VENV; on Debian or Ubuntu: apt-get install python3-venv"
}

environment_is_complete() {
    echo "$STAMP" > "$VENV/installed"
    du -sh "$VENV" | sed 's/\t/ of disk: /'
}

prepare_environment() {
    local extras="$1" python stamp wanted
    [ "$(uname -s)" = Linux ] || echo "note: made for Linux; this is $(uname -s)" >&2
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "Making .venv with $("$python" --version)"
        rm -rf "$VENV" # half of one, or one that was moved here
        "$python" -m venv "$VENV" || {
            rm -rf "$VENV"
            fail "could not make $VENV; on Debian or Ubuntu: apt-get install python3-venv"
        }
    fi
    # What is installed, where, and from which pyproject.toml: a second call does nothing.
    stamp="$VENV/installed-$extras"
    wanted="$ROOT $(sha256sum "$ROOT/pyproject.toml" | cut -d' ' -f1)"
    [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && return
    if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        install_torch
    fi
    echo "Installing micota-fast[$extras]"
    install --editable "$ROOT[$extras]"
    echo "$wanted" > "$stamp"
}
