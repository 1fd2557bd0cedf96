"""Makes everything the micro world ships: its problems, its tokenizer, and its pre-trained models of three sizes.

`python -m micota_fast.micro.build [--out DIR] [--work DIR] [--world N]` writes seeded corpora and trainer
configurations to the work folder, runs the production trainer (`python -m micota_fast.train`) on them, one phase after
another, and installs the results. World 0 is the one that ships; another number gives other problems and, from other
weights and texts, other models. The same machine, torch version and thread count give the same bytes.
"""

import argparse
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from micota_fast.common.files import remove_whole, whole_folder
from micota_fast.common.json_io import write_json
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.loader import dump
from micota_fast.config.train import TrainConfig
from micota_fast.micro import world
from micota_fast.micro.tokenizer import END_OF_TEXT, IM_END, QUESTION_SUFFIX, SYSTEM_PROMPT, save_tokenizer
from micota_fast.micro.tokenizer import train_tokenizer as train_bpe

HERE = Path(__file__).parent
CONTEXT = 1024
Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Phase:
    """One run of the trainer: one epoch over ``rows`` documents of one kind, one pack per step."""

    kind: str  # a key of KINDS
    rows: int
    lr: float
    min_lr_ratio: float


@dataclass(frozen=True)
class Size:
    """A model's shape, and how it comes to be."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    familiar: int  # how many pairs of buttons the writers of its text fold: what it can know by heart
    seed: int
    phases: tuple[Phase, ...]


PACK_TOKENS = 1024
SIZES: dict[str, Size] = {
    "student": Size(
        hidden=64,
        layers=3,
        heads=4,
        kv_heads=2,
        intermediate=192,
        familiar=17,
        seed=1,
        phases=(
            Phase("wide", 20000, 4e-3, 1.0),
            Phase("broad", 24000, 4e-3, 0.03),
            Phase("terse", 28000, 4e-3, 0.03),
            Phase("mostly-short", 300, 1e-3, 0.03),
        ),
    ),
    "assistant": Size(
        hidden=96,
        layers=3,
        heads=6,
        kv_heads=2,
        intermediate=256,
        familiar=22,
        seed=2,
        phases=(
            Phase("wide", 20000, 4e-3, 1.0),
            Phase("broad", 16000, 4e-3, 0.03),
            Phase("terse", 28000, 4e-3, 0.03),
            Phase("mostly-short", 300, 1e-3, 0.03),
        ),
    ),
    "teacher": Size(
        hidden=128,
        layers=3,
        heads=8,
        kv_heads=2,
        intermediate=384,
        familiar=0,
        seed=3,
        phases=(Phase("wide", 9000, 2e-3, 1.0), Phase("long", 8000, 2e-3, 0.03)),
    ),
}


def problem_rows(prefix: str, chains: list[world.Chain]) -> list[Problem]:
    """Return the rows of a problem file; ids count from ``prefix-000``."""
    return [
        Problem(f"{prefix}-{i:03d}", c.problem(), c.answer(), level=len(c.buttons), subject=world.SUBJECT)
        for i, c in enumerate(chains)
    ]


def split_seed(world_number: int) -> int:
    """Return the seed of a world's train split and benchmarks."""
    return world.SPLIT_SEED + world_number


def write_problems(out_dir: Path, world_number: int = 0) -> None:
    """Write train.jsonl and one file per benchmark."""
    out_dir.mkdir(parents=True, exist_ok=True)
    split = split_seed(world_number)
    for name, chains in {"train": world.train_problems(split), **world.benchmarks(split)}.items():
        write_rows(out_dir / f"{name}.jsonl", problem_rows(name, chains))


def question(chain: world.Chain) -> str:
    """Return the user's message of the whole pipeline: the problem and the request to reason."""
    return chain.problem() + QUESTION_SUFFIX


def chat_row(user: str, assistant: str) -> Row:
    """Return a training row: one question and its answer under the system prompt."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    }


@dataclass(frozen=True)
class Text:
    """One pre-training document's making: how its solution is written, and how many buttons its problem uses."""

    how: world.Thoroughness
    buttons: int = world.BUTTONS


def _broad(rng: random.Random, familiar: int) -> Text:
    """Half of it folds, about problems as in the benchmarks; half goes press by press, about all buttons.

    More buttons make it worth more to copy them from the problem, which small students otherwise do not learn.
    """
    if rng.random() < 0.5:
        return Text(dataclasses.replace(world.leaping_thoroughness(rng), familiar=familiar))
    return Text(world.varied_thoroughness(rng), world.ALL_BUTTONS)


def _terse(rng: random.Random, familiar: int) -> Text:
    """Two thirds of it by writers who mostly fold, so that what two presses lead to is learnt; the rest as `_broad`."""
    if rng.random() < 2 / 3:
        return Text(dataclasses.replace(world.MOSTLY_SHORT, familiar=familiar))
    return _broad(rng, familiar)


KINDS: dict[str, Callable[[random.Random, int], Text]] = {
    "wide": lambda rng, familiar: Text(world.SINGLE, world.ALL_BUTTONS),
    "broad": _broad,
    "terse": _terse,
    "mostly-short": lambda rng, familiar: Text(world.MOSTLY_SHORT),  # the style, whatever is known
    "long": lambda rng, familiar: Text(world.LONG),
}


def corpus(kind: str, rows: int, seed: int, world_number: int = 0, familiar: int = len(world.PAIRS)) -> Iterator[Row]:
    """Return ``rows`` training rows in OpenAI's chat format, over problems that are never held out in that world.

    In "broad" and "terse" text only the first ``familiar`` pairs of buttons are folded.
    """
    rng = random.Random(f"{seed}-{kind}")
    excluded = world.held_out(split_seed(world_number)) | frozenset(world.dev(split_seed(world_number)))
    for _ in range(rows):
        text = KINDS[kind](rng, familiar)
        chain = world.pretraining_chain(rng, excluded, text.buttons)
        yield chat_row(question(chain), world.write_solution(chain, text.how, rng))


def make_tokenizer() -> Tokenizer:
    """Make the tokenizer of all three models, trained on a sample of everything they will read."""
    texts = ["\n".join(m["role"] + "\n" + m["content"] for m in row["messages"]) for row in corpus("broad", 3000, 0)]
    return train_bpe(texts)


def write_blank_checkpoint(size: Size, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write a checkpoint without weights, from which the trainer starts: config.json and the tokenizer's files."""
    out_dir.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, out_dir, CONTEXT)
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.08,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": CONTEXT,
        "model_type": "qwen2",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    write_json(out_dir / "config.json", config, 2)


def train_config(model: Path, data: Path, out: Path, size: Size, number: int, world_number: int = 0) -> TrainConfig:
    """Return the trainer's options for phase ``number``: float32; the last phase stores bfloat16, as it ships."""
    phase = size.phases[number]
    return TrainConfig(
        model=str(model),
        data=str(data),
        out=str(out),
        seed=phase_seed(size, number, world_number),
        epochs=1.0,
        lr=phase.lr,
        min_lr_ratio=phase.min_lr_ratio,
        warmup_ratio=0.03,
        weight_decay=0.1,
        pack_tokens=PACK_TOKENS,
        packs_per_step=1,
        dtype="float32",
        device="cpu",
        log_every=100,
        init="random" if number == 0 else "pretrained",
        save_dtype="bfloat16" if number == len(size.phases) - 1 else "float32",
    )


def phase_seed(size: Size, number: int, world_number: int = 0) -> int:
    """Return the seed of a phase's corpus, of the order of its documents and, in the first phase, of the weights."""
    return 1000 * world_number + 100 * size.seed + number


def build_model(name: str, size: Size, tokenizer: Tokenizer, work: Path, world_number: int = 0) -> Path:
    """Run the phases of one model, skipping what ``work`` holds finished; returns the last checkpoint's folder."""
    model = work / name / "blank"
    write_blank_checkpoint(size, tokenizer, model)
    for number, phase in enumerate(size.phases):
        folder = work / name / f"{number}-{phase.kind}"
        folder.mkdir(parents=True, exist_ok=True)
        data, config, out = folder / "corpus.jsonl", folder / "config.yaml", folder / "out"
        seed = phase_seed(size, number, world_number)
        write_rows(data, corpus(phase.kind, phase.rows, seed, world_number, size.familiar))
        config.write_text(dump(train_config(model, data, out, size, number, world_number)), encoding="utf-8")
        print(f"{name}, phase {number + 1} of {len(size.phases)}: {phase.kind}, {phase.rows:,} documents", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread: the sums, and so the bytes, come out alike
        subprocess.run([sys.executable, "-m", "micota_fast.train", str(config)], check=True, env=environment)
        model = out / "model"
    return model


def main() -> int:
    """Build everything into ``--out``; returns 0, or 1 where a training run failed."""
    parser = argparse.ArgumentParser(prog="python -m micota_fast.micro.build", description=__doc__)
    parser.add_argument("--out", type=Path, help="where problems/ and checkpoints/ go (world 0: the package)")
    parser.add_argument("--work", type=Path, help="corpora and training runs; kept (default: runs/micro-build/world-N)")
    parser.add_argument("--world", type=int, default=0, help="which world: its problems and its models' seeds")
    args = parser.parse_args()
    if args.out is None and args.world != 0:
        parser.error("--out is required for another world than 0, the one that ships")
    out, work = args.out or HERE, args.work or Path(f"runs/micro-build/world-{args.world}")
    start = time.monotonic()
    write_problems(out / "problems", args.world)
    tokenizer = make_tokenizer()
    try:
        models = {name: build_model(name, size, tokenizer, work, args.world) for name, size in SIZES.items()}
    except subprocess.CalledProcessError as error:
        print(f"error: {error}; run the same command to resume", file=sys.stderr)
        return 1
    for name, model in models.items():
        install(model, out / "checkpoints" / name)
    print(f"problems and checkpoints are in {out}; the build took {time.monotonic() - start:.0f} s")
    return 0


def install(model: Path, out_dir: Path) -> None:
    """Replace the checkpoint in ``out_dir`` by ``model``, without its card, which names the folders of the build."""
    with whole_folder(out_dir) as aside:
        shutil.copytree(model, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
        remove_whole(out_dir)


if __name__ == "__main__":
    sys.exit(main())
