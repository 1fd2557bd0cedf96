"""Makes everything the micro world ships: its problems, its tokenizer, and its pre-trained models of three sizes.

`python -m micota_fast.micro.build [--out DIR] [--work DIR]` writes seeded corpora and trainer configurations to the work
folder, runs the production trainer (`python -m micota_fast.train`) on them, one phase after the other, and installs the
results. The same machine, torch version and thread count give the same bytes.
"""

from __future__ import annotations

import argparse
import json
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

from micota_fast.micro import world
from micota_fast.micro.tokenizer import END_OF_TEXT, IM_END, QUESTION_SUFFIX, SYSTEM_PROMPT, save_tokenizer
from micota_fast.micro.tokenizer import train_tokenizer as train_bpe
from micota_fast.records import Problem, write_rows

HERE = Path(__file__).parent
CONTEXT = 1024
DRILL_REQUEST = "Write some sums modulo 10."
Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Phase:
    """One run of the trainer: ``rows`` documents of a kind, in packs of ``pack_tokens``, one pack a step, one epoch."""

    name: str
    kind: str  # a key of WRITERS
    rows: int
    lr: float
    min_lr_ratio: float
    pack_tokens: int = 1024


@dataclass(frozen=True)
class Size:
    """A model's shape, and how it comes to be."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    seed: int
    phases: tuple[Phase, ...]


SIZES: dict[str, Size] = {
    "student": Size(64, 3, 4, 2, 192, 1, ()),
    "assistant": Size(64, 3, 4, 2, 192, 2, ()),
    "teacher": Size(64, 3, 4, 2, 192, 3, ()),
}


def problem_rows(prefix: str, chains: list[world.Chain]) -> list[Problem]:
    """Rows of a problem file; ids count from ``prefix-000``."""
    return [
        Problem(f"{prefix}-{i:03d}", c.problem(), c.answer(), level=len(c.steps), subject=world.SUBJECT)
        for i, c in enumerate(chains)
    ]


def write_problems(out_dir: Path) -> None:
    """Write train.jsonl and one file a benchmark."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, chains in {"train": world.train_problems(), **world.benchmarks()}.items():
        write_rows(out_dir / f"{name}.jsonl", problem_rows(name, chains))


def question(chain: world.Chain) -> str:
    """The user's message of the whole pipeline: the problem and the request to reason."""
    return chain.problem() + QUESTION_SUFFIX


def _chat(user: str, assistant: str) -> Row:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    }


Writer = Callable[[world.Chain, random.Random], Row]


def _solved(how: Callable[[random.Random], world.Thoroughness]) -> Writer:
    return lambda chain, rng: _chat(question(chain), world.write_solution(chain, how(rng), rng))


WRITERS: dict[str, Writer] = {
    "short": _solved(lambda rng: world.SHORT),
    "long": _solved(lambda rng: world.LONG),
    "mixture": _solved(lambda rng: world.random_thoroughness(rng, slip=0.1)),
}


def corpus(kind: str, rows: int, seed: int) -> Iterator[Row]:
    """``rows`` training rows in OpenAI's chat format, over problems that are never held out."""
    rng = random.Random(f"{seed}-{kind}")
    for _, chain in zip(range(rows), world.pretraining_chains(rng), strict=False):
        yield WRITERS[kind](chain, rng)


def make_tokenizer() -> Tokenizer:
    """The tokenizer of all three models, trained on a sample of everything they will read."""
    texts = ["\n".join(m["role"] + "\n" + m["content"] for m in row["messages"]) for row in corpus("mixture", 3000, 0)]
    return train_bpe(texts)


def write_blank_checkpoint(size: Size, tokenizer: Tokenizer, out_dir: Path) -> None:
    """A checkpoint folder without weights: config.json and the tokenizer's files, from which the trainer starts."""
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
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
