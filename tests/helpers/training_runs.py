"""What the training tests share: a small corpus, a configuration, and training in processes that can be killed."""

import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.ports import free_port
from micota_fast.config.generation import ChatConfig
from micota_fast.config.train import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn, optim

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers.preload"])


def fork(target: Callable[..., None], *args: Any) -> BaseProcess:
    """A fresh process that a server with torch in its memory forks: real processes without the seconds."""
    process = FORKS.Process(target=target, args=args)
    process.start()
    return process


def write_corpus(path: Path, rows: int = 23, seed: int = 0) -> Path:
    """Sums and their working, of varied length."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            terms = [rng.randrange(50) for _ in range(rng.randrange(2, 9))]
            steps = [f"{sum(terms[:k])} + {terms[k]} = {sum(terms[: k + 1])}" for k in range(1, len(terms))]
            problem = " + ".join(map(str, terms))
            row = {"id": str(i), "problem": problem, "completion": f"{', '.join(steps)} \\boxed{{{sum(terms)}}}"}
            file.write(json.dumps(row) + "\n")
    return path


def train_config(checkpoint: Path, folder: Path, **options: Any) -> TrainConfig:
    """Two epochs of five steps (the last one partial) over the corpus in `folder`, made if need be."""
    data = folder / "corpus.jsonl"
    if not data.exists():
        write_corpus(data)
    settings: dict[str, Any] = {
        "out": str(folder / "out"),
        "lr": 1e-3,
        "dtype": "float32",
        "device": "cpu",
        "pack_tokens": 256,
        "packs_per_step": 2,
        "log_every": 1,  # so that a test sees each step when it is done
        "chat": ChatConfig(system=None, prompt="{problem} =\n", use_template=False),
        **options,
    }
    return TrainConfig(model=str(checkpoint), data=str(data), **settings)


def result(config: TrainConfig) -> tuple[dict[str, bytes], list[dict[str, Any]], dict[str, Any], list[str]]:
    """The model's files, metrics, summary (without what depends on the clock) and the names of all that is there."""
    out = Path(config.out)
    summary = json.loads((out / "summary.json").read_text())
    del summary["timing"]
    model = {path.name: path.read_bytes() for path in (out / "model").iterdir()}
    return model, metrics(config), summary, sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def checkpoint_steps(config: TrainConfig) -> list[int]:
    """Of the checkpoints that are there."""
    return sorted(int(path.name[-8:]) for path in (Path(config.out) / "checkpoints").glob("step-*"))


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without their timing; a torn last line is left out."""
    path = Path(config.out) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]


def start_training(config: TrainConfig, world: int = 1, before: Callable[..., None] | None = None) -> list[BaseProcess]:
    """Train in `world` new processes, as torchrun would start them; their output goes to OUT.log.

    `before(my_rank=RANK)` is called in each before it trains (moments.py).
    """
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(world):
        env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(fork(_child, config, {k: str(v) for k, v in env.items()}, before))
    return processes


def weights_of(config: TrainConfig) -> "dict[str, Tensor]":
    """The trained model's tensors by name."""
    from safetensors.torch import load_file  # imports torch, which the tests of the scripts do without

    return load_file(Path(config.out) / "model" / "model.safetensors")


def flip(path: Path) -> None:
    """Turn over one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def finish(processes: list[BaseProcess], config: TrainConfig) -> None:
    """Wait for all and check that they succeeded."""
    for process in processes:
        process.join(240)
    assert [p.exitcode for p in processes] == [0] * len(processes), Path(f"{config.out}.log").read_text()


def wait_until(condition: Callable[[], bool], processes: list[BaseProcess], timeout_s: float = 240) -> None:
    """Poll until `condition` holds or a process has ended."""
    end = time.monotonic() + timeout_s
    while not condition() and all(p.is_alive() for p in processes):
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.002)


def kill(processes: list[BaseProcess]) -> None:
    """SIGKILL and wait."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _child(config: TrainConfig, env: dict[str, str], before: Callable[..., None] | None) -> None:
    os.environ.update(env)
    log = os.open(f"{config.out}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from micota_fast.errors import InputError
    from micota_fast.train.loop import train

    torch.set_num_threads(1)
    if before is not None:
        before(my_rank=int(env["RANK"]))
    try:  # as python -m micota_fast.train
        train(config)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except InputError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None


def clipped_step(model: "nn.Module", optimizer: "optim.Optimizer", max_grad_norm: float, lr: float) -> float:
    """Take a step as plain torch would, from gradients that are there; returns their norm before it was clipped."""
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
    for p in model.parameters():
        assert p.grad is not None
        p.grad *= min(1.0, max_grad_norm / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm
