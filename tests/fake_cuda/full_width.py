"""`train()` of a model at its full width, until its first step is done: documents and weights are made up."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fake_cuda.session import Session, compile_nothing


class _StepDone(Exception):
    """Raised where the real run would go on to write checkpoints of gigabytes."""


def train_step(
    session: Session,
    model: str,
    tokenizer: str,
    folder: str,
    pack_tokens: int,
    layers: int | None,
    lora: Any,
    **options: Any,
) -> dict[str, tuple[int, str]]:
    """Run a step of one full pack per process, with an optimizer that has its moments, as after a resume.

    Args:
        session: this process.
        model: a hub name that `planning.shapes` knows by its shapes; nothing is asked of the hub.
        tokenizer: a checkpoint whose tokenizer the model has.
        folder: for files.
        pack_tokens: of each pack, all of them filled by documents of different lengths.
        layers: of the model; None: as many as it has.
        lora: adapters, or None.
        options: further ones of training.

    Returns:
        By phase of the step, the most bytes on the device, and in which function of ours that was.
    """
    import torch

    from micota_fast.config.train import TrainConfig
    from micota_fast.model import safetensors_io
    from micota_fast.model.folder import COPIED_FILES
    from micota_fast.planning.shapes import known_shapes
    from micota_fast.train import loop, prepare
    from micota_fast.train.low_bit_adamw import LowBitAdamW
    from micota_fast.train.stopwatch import Stopwatch

    shape = known_shapes(model)
    assert shape is not None
    run = Path(tempfile.mkdtemp(dir=folder))
    source = run / "checkpoint"
    source.mkdir()
    for file in (path for path in Path(tokenizer).iterdir() if path.name in COPIED_FILES):
        shutil.copyfile(file, source / file.name)
    described = shape.to_dict("bfloat16") | ({} if layers is None else {"num_hidden_layers": layers})
    (source / "config.json").write_text(json.dumps(described), encoding="utf-8")
    documents = _documents([_lengths(pack_tokens) for _ in range(session.world)], shape.vocab_size)
    prepare.load_documents = lambda *_: (documents, None)
    safetensors_io.draw_weights = lambda *_: None

    peaks = {}
    lap, make_optimizer = Stopwatch.lap, loop.make_optimizer

    def counted(watch: Stopwatch, phase: str) -> None:
        peaks[session.waits.phase] = session.ledger.peak, session.ledger.at_peak
        session.ledger.restart()
        lap(watch, phase)
        if phase == "report":
            raise _StepDone

    def with_moments(*args: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*args)
        if isinstance(optimizer, LowBitAdamW):
            compile_nothing()
            optimizer.make_states()
            return optimizer
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        return optimizer

    Stopwatch.lap, loop.make_optimizer = counted, with_moments  # type: ignore[method-assign]
    session.ledger.note = session.waits.place
    config = TrainConfig(
        model=str(source),
        data="",
        out=str(run / "out"),
        init="random",
        device="cuda",
        pack_tokens=pack_tokens,
        packs_per_step=session.world,
        log_every=1000,
        checkpoint_every=1000,
        **options,
    )
    config.lora = lora  # after the check that it adapts the weights of a checkpoint: there are none here
    try:
        with session.running():
            loop.train(config)
    except _StepDone:
        pass
    Stopwatch.lap, loop.make_optimizer = lap, make_optimizer  # type: ignore[method-assign]
    return {phase: peaks[phase] for phase in ("data", "forward", "backward", "optimizer")}


def _lengths(pack_tokens: int) -> list[int]:
    """Documents that fill a pack, each half as long as the one before, so that packs come out as they were meant."""
    rest = [pack_tokens // 15 * share for share in (4, 2, 1)]
    return [pack_tokens - sum(rest), *rest]


def _documents(packs: Sequence[Sequence[int]], vocabulary: int) -> Any:
    from micota_fast.data.tokenise import Documents

    lengths = np.array([length for pack in packs for length in pack])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rng = np.random.default_rng(0)
    supervised = rng.random(offsets[-1]) < 0.9
    ids = rng.integers(0, vocabulary, offsets[-1], dtype=np.int32)
    return Documents(ids, supervised, offsets, len(lengths), 0, 0, 0, None)
