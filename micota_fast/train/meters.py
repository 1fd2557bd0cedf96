"""What people watch: progress lines, and a row of metrics.jsonl per step."""

import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from micota_fast.common.files import writing
from micota_fast.common.gpu_specs import peak_flops
from micota_fast.common.json_io import encode_json, parse_json
from micota_fast.config.train import TrainConfig
from micota_fast.data.batches import PackedSteps
from micota_fast.errors import InputError
from micota_fast.train.compiled_graphs import compiled_graphs
from micota_fast.train.stopwatch import Stopwatch
from micota_fast.train.trackers import Trackers
from micota_fast.train.world import World


def memory(device: torch.device) -> dict[str, int]:
    """Return the bytes that this process holds and has held at most: of the device or, on a CPU, of the host."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class Meters:
    """Collects the figures of each step on the device and reads those of several steps at once.

    Args:
        config: `dtype`, `compile`, and what `Trackers` takes.
        out: the run's folder.
        world: the processes; only the main one writes.
        progress: of the checkpoint that the run resumes from: "step", after which rows of metrics.jsonl are cut off, as
            those steps are done again, and "skipped", the value of `skipped`.
        total: steps of the run.
        steps: what is trained on: how full the packs are, and which documents to blame.
        flops_per_token: forward and backward, for the model-FLOP utilisation.
        watch: where the time goes.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        world: World,
        progress: dict[str, Any],
        total: int,
        steps: PackedSteps,
        flops_per_token: float,
        watch: Stopwatch,
    ) -> None:
        self._world, self._total, self._steps, self._data = world, total, steps, config.data
        self._flops_per_token, self._watch = flops_per_token, watch
        on_cuda = world.device.type == "cuda" and config.dtype == "bfloat16"
        self._peak = peak_flops(torch.cuda.get_device_name(world.device)) if on_cuda else None
        self._rows: list[dict[str, Any]] = []
        self._figures: list[Tensor] = []  # loss and norm of each row, with the reverse KL where it is trained on
        start: int = progress["step"]
        self._trackers: Trackers | None = None
        if config.tensorboard or config.wandb is not None:

            def open_trackers() -> None:
                self._trackers = Trackers(config, out, start)

            world.on_main(open_trackers)
        self.skipped: dict[str, int] = progress["skipped"]  # steps without effect: in a row until now, and in all
        self.last: dict[str, Any] = {}
        self._path = out / "metrics.jsonl"
        if world.is_main:
            _keep_steps(self._path, start)
            self._file = self._path.open("a", encoding="utf-8")
            self.last = _last_row(self._path)
        self._compiling = config.compile
        self._started = self._since = time.perf_counter()
        self._tokens = 0

    def record(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        step: int,
        epoch: float,
        lr: float,
        supervised: int,
        tokens: int,
        reverse_estimate: Tensor | None = None,
    ) -> None:
        """Record a step without waiting for the device, if the gradients are on it, too.

        Args:
            loss: over all ranks, a 0-d tensor.
            grad_norm: over all ranks, before clipping, a 0-d tensor.
            step: steps done, this one included.
            epoch: passes over the documents done, in steps.
            lr: learning rate of the step.
            supervised, tokens: supervised and all tokens of the step, over all ranks.
            reverse_estimate: [2], over all ranks: sum of the estimates of the reverse KL, and their number. Their mean
                is reported as `reverse_kl`, in nats per scored token.
        """
        figures = [loss.to(grad_norm.device), grad_norm]
        if reverse_estimate is not None:
            figures.append((reverse_estimate[0] / reverse_estimate[1]).to(grad_norm.device))
        self._figures.append(torch.stack(figures))
        self._rows.append({"step": step, "epoch": epoch, "lr": lr, "supervised": supervised, "tokens": tokens})

    def report(self, validation_loss: float | None = None) -> None:
        """Print and write the steps recorded since the last report; all ranks see the same figures.

        This is the only place in the loop where the host waits for the device in every report interval.

        Args:
            validation_loss: of the last step, if it was measured.

        Raises:
            InputError: on all ranks, if metrics.jsonl could not be written.
        """
        figures = torch.stack(self._figures).tolist()
        now = time.perf_counter()
        timing = self._timing(now)
        lines = ""
        for row, (loss, grad_norm, *reverse_kl) in zip(self._rows, figures, strict=True):
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite:
                self.skipped["in_a_row"] = 0
                self.last = {"step": row["step"], "loss": loss, "grad_norm": grad_norm, **row}
            else:
                self.skipped = {key: count + 1 for key, count in self.skipped.items()}
                self._world.say(self._not_finite(row["step"], loss, grad_norm))
                self.last = {"step": row["step"], "loss": None, "grad_norm": None, **row, "skipped": True}
            if reverse_kl:
                self.last["reverse_kl"] = reverse_kl[0] if math.isfinite(reverse_kl[0]) else None
            if validation_loss is not None and row is self._rows[-1]:
                finite_loss = validation_loss if math.isfinite(validation_loss) else None
                self.last["validation_loss"] = finite_loss
            lines += encode_json(self.last | {"timing": timing}, finite=False).decode() + "\n"
            if self._trackers is not None:
                self._trackers.report(self.last | timing)
        self._world.on_main(lambda: self._write(lines))
        self._world.say(self._lines(self.last, timing))
        if self._compiling:
            self._world.say(compiled_graphs())
        self._compiling = False
        self._rows, self._figures, self._since = [], [], now

    def _write(self, lines: str) -> None:
        with writing(self._path, len(lines)):
            self._file.write(lines)
            self._file.flush()

    def _not_finite(self, step: int, loss: float, grad_norm: float) -> str:
        documents = self._steps.documents(step - 1).tolist()
        listed = ", ".join(map(str, documents[:20])) + (", ..." if len(documents) > 20 else "")
        return (
            f"WARNING: step {step} is skipped: its loss is {loss} and the norm of its gradient {grad_norm}; the "
            f"weights stay as they are. Its documents, counted from 0 in {self._data} without the rows left out: "
            f"{listed}"
        )

    def _timing(self, now: float) -> dict[str, Any]:
        """Return speeds since the last report, seconds since the start and left at this pace, phases and memory."""
        seconds = max(now - self._since, 1e-9)
        tokens = sum(row["tokens"] for row in self._rows)
        self._tokens += tokens
        timing: dict[str, Any] = {
            "seconds": round(now - self._started, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "supervised_per_s": round(sum(row["supervised"] for row in self._rows) / seconds, 1),
            "left_s": round((self._total - self._rows[-1]["step"]) * seconds / len(self._rows), 1),
        }
        if self._peak is not None:
            flops = tokens / seconds * self._flops_per_token
            timing["mfu"] = round(flops / (self._peak * self._world.size), 4)
        timing["phase_s"] = {phase: round(s, 4) for phase, s in self._watch.read().items()}
        timing["memory_gb"] = {name: round(size / 1e9, 3) for name, size in memory(self._world.device).items()}
        return timing

    def _lines(self, row: dict[str, Any], timing: dict[str, Any]) -> str:
        parts = [
            f"step {row['step']}/{self._total}",
            "skipped" if row["loss"] is None else f"loss {row['loss']:.4f} | grad {row['grad_norm']:.3f}",
            f"lr {row['lr']:.2e}",
            f"{timing['supervised_per_s']:,.0f} supervised tok/s",
            f"{timing['tokens_per_s']:,.0f} tok/s",
            f"packed {self._steps.efficiency:.1%}",
        ]
        if "mfu" in timing:
            parts.append(f"MFU {timing['mfu']:.1%}")
        if row.get("reverse_kl") is not None:
            parts.insert(2, f"reverse KL {row['reverse_kl']:.4f}")
        if row.get("validation_loss") is not None:
            parts.insert(2, f"validation {row['validation_loss']:.4f}")
        whole = sum(timing["phase_s"].values()) or 1.0
        phases = " ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in timing["phase_s"].items())
        sizes = ", ".join(f"{size:.1f} {name}" for name, size in timing["memory_gb"].items())
        step = " | ".join([*parts, f"left {duration(timing['left_s'])}"])
        return f"    time: {phases} | memory, GB: {sizes}\n{step}"  # the step last, where people who follow a log look

    def describe_skipped(self, step: int, folder: Path) -> str:
        """Explain why the run ends after `step`, with its state in `folder`: too many steps in a row were skipped."""
        return (
            f"{self.skipped['in_a_row']} steps in a row, the last of them {step}, had a loss or a gradient that is not "
            f"finite; they changed nothing and are named above, with their documents. {folder} contains the state "
            f"before them. A lower `lr`, a higher `warmup_ratio`, other documents or a sound checkpoint to start from "
            f"may help (delete {folder.parent.parent} to start over)"
        )

    def sync(self) -> None:
        """Sync metrics.jsonl to the disk: a checkpoint must not be ahead of it."""
        if self._world.is_main:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> dict[str, float]:
        """Close the files; return the speed since the start of this process."""
        seconds = time.perf_counter() - self._started
        if self._world.is_main:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close(self.last)
        return {"seconds": round(seconds, 3), "tokens_per_s": round(self._tokens / seconds, 1)}


def _keep_steps(path: Path, steps: int) -> None:
    """Truncate the file after the row of step `steps`: later or torn rows were written after the checkpoint."""
    if not path.exists():
        return
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or parse_json(line, str(path), finite=False)["step"] > steps:
                    break
            except (InputError, KeyError, TypeError):
                break
            kept += len(line)
        file.truncate(kept)


def _last_row(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    last: dict[str, Any] = parse_json(lines[-1], str(path), finite=False) if lines else {}
    last.pop("timing", None)
    return last


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03, or as "?" if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
