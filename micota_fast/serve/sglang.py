"""How a real SGLang server is started: from an interpreter of its own, since SGLang pins its torch exactly."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace

from micota_fast.config.generation import ServeConfig
from micota_fast.errors import InputError

INSTALL_HINT = (
    "install it in an environment of its own (python -m venv sglang && sglang/bin/pip install sglang) and name that "
    "interpreter in `serve.python` or in $SGLANG_PYTHON"
)

DETERMINISTIC = "--enable-deterministic-inference"
DETERMINISTIC_BACKENDS = ("flashinfer", "fa3", "triton")
# Copies of attention that share the GPUs of one model. SGLang 0.5.23 gives their number by itself; before, it was
# `dp` with a flag, which it takes until the end of 2026 and which is still understood here.
SHARED_ATTENTION = ("--attn-dp-size", "--attention-data-parallel-size")
SHARED_ATTENTION_BEFORE = "--enable-dp-attention"
_SIZES = {
    "tp": ("--tp-size", "--tp", "--tensor-parallel-size"),
    "dp": ("--dp-size", "--dp", "--data-parallel-size"),
}


def find_python(config: ServeConfig) -> str:
    """The interpreter that has sglang: `config.python`, else $SGLANG_PYTHON, else this one.

    Raises:
        InputError: it does not exist, or sglang does not import there.
    """
    named = config.python or os.environ.get("SGLANG_PYTHON")
    if named is None:
        if importlib.util.find_spec("sglang") is None:
            raise InputError(f"sglang is not installed for {sys.executable}; {INSTALL_HINT}")
        return sys.executable
    python = shutil.which(named)
    where = "`serve.python`" if config.python else "$SGLANG_PYTHON"
    if python is None:
        raise InputError(f"{where} names {named}, which is not an executable program")
    # find_spec imports nothing, so this takes a moment only.
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    if subprocess.run([python, "-c", probe], check=False, stdin=subprocess.DEVNULL).returncode != 0:
        raise InputError(f"{where} names {python}, where sglang is not installed; {INSTALL_HINT}")
    return python


def seeded(config: ServeConfig) -> ServeConfig:
    """The same server made to heed sampling seeds, where it can.

    SGLang takes `sampling_seed` from everyone but acts on it with --enable-deterministic-inference alone, which works
    on a GPU with the attention backends flashinfer, fa3 and triton (its default there is fa3, or flashinfer on
    Blackwell: older GPUs need `args: [--attention-backend, triton]`). With others, and on a CPU, the flag is not
    passed: sampled answers are then random, and the client says so. Another engine's config is left as it is.
    """
    if config.engine != "sglang" or DETERMINISTIC in config.args:
        return config
    backend = argument(config, "--attention-backend")
    if "cpu" in (config.device, argument(config, "--device")) or backend not in (None, *DETERMINISTIC_BACKENDS):
        return config
    return replace(config, args=[*config.args, DETERMINISTIC])


def argument(config: ServeConfig, name: str) -> str | None:
    """The value of a further argument, written `--name value` or `--name=value`."""
    for i, argument in enumerate(config.args):
        if argument == name:
            return config.args[i + 1] if i + 1 < len(config.args) else None
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def command(model: str, config: ServeConfig, port: int) -> list[str]:
    """The command line of `sglang.launch_server` for a checkpoint (folder or hub name).

    Raises:
        InputError: no interpreter has sglang, or `config` asks for what it has not.
    """
    line = [find_python(config), "-m", "sglang.launch_server", "--model-path", model]
    line += ["--host", config.host, "--port", str(port)]
    if config.dtype == "float64":
        raise InputError("`serve.dtype` float64 is for the embedded engine; SGLang has auto, bfloat16 and float32")
    if config.dtype != "auto":
        line += ["--dtype", config.dtype]
    if config.context_length is not None:
        line += ["--context-length", str(config.context_length)]
    if config.served_model_name is not None:
        line += ["--served-model-name", config.served_model_name]
    if config.device != "auto":
        line += ["--device", config.device]
    for size, names in _SIZES.items():
        for name in names:
            if argument(config, name) is not None:
                raise InputError(f"`serve.args`: {name}: give it as `serve.{size}`, by which GPUs are assigned")
    if config.tp > 1:
        line += ["--tp-size", str(config.tp)]
    if config.dp > 1 and any(argument(config, name) is not None for name in SHARED_ATTENTION):
        raise InputError(
            f"`serve.dp` is {config.dp} with {SHARED_ATTENTION[0]} in `serve.args`: SGLang does not combine copies of "
            f"the model with copies of its attention; leave `serve.dp` at 1"
        )
    if config.dp > 1:
        line += [SHARED_ATTENTION[0] if SHARED_ATTENTION_BEFORE in config.args else "--dp-size", str(config.dp)]
    return [*line, *(argument for argument in config.args if argument != SHARED_ATTENTION_BEFORE)]


def gpus_needed(config: ServeConfig) -> int:
    """Count the GPUs of one server: `tp` for each of its `dp` copies, unless these are of its attention alone."""
    return config.tp if SHARED_ATTENTION_BEFORE in config.args else config.tp * config.dp


def environment() -> dict[str, str]:
    """Our environment, HF_HUB_OFFLINE among it, without what would tie another interpreter to our packages."""
    ours = {"PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
    return {key: value for key, value in os.environ.items() if key not in ours}
