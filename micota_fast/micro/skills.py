"""Which elementary skills a model of the micro world has: forced through right text, does it rank each token first?

A model that answers wrongly may lack a skill (adding, copying a button, checking) or only make one mistake in a long
answer. Here the right text is given and the model predicts one token at a time, so each kind of token is judged alone.
"""

import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from micota_fast.alignment.align import token_likelihood
from micota_fast.chat.encoding import Chat
from micota_fast.common.records import write_rows
from micota_fast.config.generation import ChatConfig
from micota_fast.data.tokenise import load_documents
from micota_fast.micro import build, world
from micota_fast.model.safetensors_io import load_model

STYLES = {"short": world.SHORT, "single": world.SINGLE, "long": world.LONG}
LEAST = {"single": 0.98, "long": 0.97}  # the share of each kind of token that P5 of RULES.md asks for

_LINE = re.compile(r"^(?P<value>\d)(?P<people>(?: [A-Z][a-z]+\*\d)+)=(?P<result>\d)", re.MULTILINE)
_PERSON = re.compile(r"(?P<name> [A-Z][a-z]+)\*(?P<button>\d)")
_CHECK = re.compile(r"Check:(?P<value>\d)(?P<name> [A-Z][a-z]+)/(?P<button>\d)=(?P<result>\d),(?P<verdict> \w+)\.")
_RESTATED = re.compile(r"^Let me restate\..*", re.MULTILINE)


def kinds_of_tokens(text: str) -> dict[int, str]:
    """Return what the token that begins at a character of a solution is: start -> kind.

    Kinds are ``name``, ``button`` (both copied from the problem), ``value`` (copied from the line before), ``step``
    (the result of one press), ``leap`` (of two), and, with the part of the text before them, those of restated
    problems (``restated name``), checks (``check step``, ``check verdict``) and the last count (``verify button``).
    """
    kinds: dict[int, str] = {}
    last_count = text.find("Let me verify")
    for line in _LINE.finditer(text):
        part = "verify " if -1 < last_count < line.start() else ""
        people = list(_PERSON.finditer(text, line.start("people"), line.end("people")))
        kinds[line.start("value")] = part + "value"
        kinds[line.start("result")] = part + ("leap" if len(people) > 1 else "step")
        for person in people:
            kinds |= {person.start(group): part + group for group in ("name", "button")}
    for check in _CHECK.finditer(text):
        kinds |= {check.start(group): f"check {group}" for group in ("value", "name", "button", "verdict")}
        kinds[check.start("result")] = "check step"
    for restated in _RESTATED.finditer(text):
        for person in _PERSON.finditer(text, restated.start(), restated.end()):
            kinds |= {person.start(group): f"restated {group}" for group in ("name", "button")}
    return kinds


def skills(checkpoint: Path, chains: Sequence[world.Chain]) -> dict[str, dict[str, float]]:
    """Measure how often each kind of token is ranked first, by style: ``{"long": {"check step": 0.99}}``.

    Computed in float32 on one thread of the CPU, so that the same machine gives the same figures.

    Args:
        checkpoint: a folder of a micro model.
        chains: the problems, which the model should not have been trained on.
    """
    chat = Chat.from_checkpoint(checkpoint, ChatConfig())
    model = load_model(checkpoint, torch.float32, "cpu").eval()
    rates = {}
    for style, how in STYLES.items():
        texts = [world.write_solution(chain, how, random.Random(0)) for chain in chains]  # nothing is left to chance
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            write_rows(rows, [build.chat_row(build.question(c), t) for c, t in zip(chains, texts, strict=True)])
            documents = load_documents(str(rows), chat, build.CONTEXT, "drop")
        _, rank_N, counts_D = token_likelihood(model, documents, build.PACK_TOKENS, "sdpa")
        seen: Counter[str] = Counter()
        right: Counter[str] = Counter()
        at = 0
        for text, count in zip(texts, counts_D.tolist(), strict=True):
            kinds = kinds_of_tokens(text)
            for i, (start, _) in enumerate(chat.tokenizer.library.encode(text).offsets):
                if (kind := kinds.get(start)) is not None:
                    seen[kind] += 1
                    right[kind] += int(rank_N[at + i] == 1)
            at += count
        rates[style] = {kind: right[kind] / n for kind, n in sorted(seen.items())}
    return rates
