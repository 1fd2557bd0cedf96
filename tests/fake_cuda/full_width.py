"""`train()` of a model at its full width, until its second step is done: documents and weights are made up."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fake_cuda.session import Session

STEPS = 2  # in the first one the optimizer has no moments yet


class _StepsDone(Exception):
    """Raised where the real run would go on to write checkpoints of gigabytes."""


def train_steps(
    session: Session, model: str, folder: str, pack_tokens: int, layers: int | None, **options: Any
) -> None:
    """Run two steps of one full pack per process; afterwards the ledger has the peak of the second.

    Args:
        session: this process.
        model: a hub name that `planning.shapes` knows by its shapes; nothing is asked of the hub.
        folder: for files.
        pack_tokens: of each pack, all of them filled by documents of different lengths.
        layers: of the model; None: as many as it has.
        options: further ones of training.
    """
    from micota_fast.config.train import TrainConfig
    from micota_fast.model import safetensors_io
    from micota_fast.planning.shapes import known_shapes
    from micota_fast.train import loop, prepare
    from micota_fast.train.stopwatch import Stopwatch

    shape = known_shapes(model)
    assert shape is not None
    source = Path(folder) / "checkpoint"
    source.mkdir(exist_ok=True)
    described = shape.to_dict("bfloat16") | ({} if layers is None else {"num_hidden_layers": layers})
    (source / "config.json").write_text(json.dumps(described), encoding="utf-8")
    packs = int(session.world * STEPS)
    documents = _documents([_lengths(pack_tokens) for _ in range(packs)], shape.vocab_size)
    prepare.load_documents = lambda *_: (documents, None)
    safetensors_io.draw_weights = lambda *_: None

    begun = 0
    lap = Stopwatch.lap

    def counted(watch: Stopwatch, phase: str) -> None:
        nonlocal begun
        lap(watch, phase)
        if phase == "data":
            begun += 1
            session.ledger.restart()
        if phase == "report" and begun == STEPS:
            raise _StepsDone

    Stopwatch.lap = counted  # type: ignore[method-assign]
    session.ledger.note = session.waits.place
    config = TrainConfig(
        model=str(source),
        data="",
        out=f"{folder}/out",
        init="random",
        device="cuda",
        pack_tokens=pack_tokens,
        packs_per_step=session.world,
        log_every=1000,
        checkpoint_every=1000,
        **options,
    )
    try:
        with session.running():
            loop.train(config)
    except _StepsDone:
        pass
    Stopwatch.lap = lap  # type: ignore[method-assign]


def _lengths(pack_tokens: int) -> list[int]:
    """Documents that fill a pack: the longest takes half of it, and the lengths are no multiples of anything."""
    long = pack_tokens // 2 - 3
    short = pack_tokens // 7 - 2
    return [long, short, short, pack_tokens - long - 2 * short]


def _documents(packs: Sequence[Sequence[int]], vocabulary: int) -> Any:
    from micota_fast.data.tokenise import Documents

    lengths = np.array([length for pack in packs for length in pack])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rng = np.random.default_rng(0)
    supervised = rng.random(offsets[-1]) < 0.9
    ids = rng.integers(0, vocabulary, offsets[-1], dtype=np.int32)
    return Documents(ids, supervised, offsets, len(lengths), 0, 0, 0, None)
