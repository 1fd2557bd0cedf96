"""Which GPUs a server sees, where several share a machine."""

import os
import shutil
import subprocess

from micota_fast.config.generation import ServeConfig
from micota_fast.errors import InputError
from micota_fast.serve import sglang

VISIBLE = "CUDA_VISIBLE_DEVICES"


def environments(config: ServeConfig) -> list[dict[str, str]]:
    """An environment for each server: the visible GPUs dealt out evenly, in their order; all of them to a single one.

    Raises:
        InputError: there are too few, or their number cannot be found out.
    """
    base = sglang.environment() if config.engine == "sglang" else dict(os.environ)
    shared = [base] * config.replicas
    if config.device == "cpu" or (config.engine == "sglang" and sglang.argument(config, "--device") == "cpu"):
        return shared
    visible = visible_gpus()
    if not visible and config.engine == "embedded" and config.device == "auto":
        return shared  # on the CPU
    if visible is None:
        if config.replicas == 1:
            return shared  # another maker's, say: SGLang finds its own
        raise InputError(
            f"`serve.replicas` = {config.replicas}: nvidia-smi shows no GPUs to share; name them in ${VISIBLE}"
        )
    needed = sglang.gpus_needed(config) if config.engine == "sglang" else 1
    each = len(visible) // config.replicas
    if each < needed:
        raise InputError(
            f"`serve` needs {config.replicas * needed} GPUs ({config.replicas} servers with {needed} each: `replicas`, "
            f"`tp`, `dp`), and {len(visible)} are visible; `serve.device: cpu` needs none"
        )
    if config.replicas == 1:
        return shared
    return [base | {VISIBLE: ",".join(visible[i * each : (i + 1) * each])} for i in range(config.replicas)]


def visible_gpus() -> list[str] | None:
    """Their names, as $CUDA_VISIBLE_DEVICES has them, else as nvidia-smi numbers them; None: neither tells."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=index", "--format=csv,noheader"]
    told = subprocess.run(query, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return told.stdout.split() if told.returncode == 0 else None
