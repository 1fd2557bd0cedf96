"""Stores of a made-up teacher's log-probabilities for a training corpus."""

import json
from pathlib import Path

import numpy as np

from micota_fast.chat.encoding import Chat
from micota_fast.config.train import TrainConfig
from micota_fast.sources.top_logprobs import TopLogprobsWriter


def write_scores(config: TrainConfig, folder: Path, top_k: int | None, peaked: float = 2.0) -> Path:
    """Score the completions of `config.data` by a random teacher, without the ends of turns.

    Args:
        top_k: entries of a row; None: the whole vocabulary; 0: one, the text's own token with a probability of 1.
        peaked: deviation of the teacher's logits.
    """
    chat = Chat.from_checkpoint(config.model, config.chat)
    columns = chat.vocab_size if top_k is None else max(top_k, 1)
    numbers = np.random.default_rng(0)
    with TopLogprobsWriter(folder, columns) as writer:
        for line in Path(config.data).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            (ids,) = chat.tokenizer.encode([row["completion"]])
            if top_k == 0:
                own, top_ids, logprobs = np.zeros(len(ids)), ids[:, None], np.zeros((len(ids), 1))
            else:
                logits = numbers.normal(0, peaked, (len(ids), chat.vocab_size))
                logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
                own = logprobs[np.arange(len(ids)), ids]
                top_ids = np.argsort(-logprobs, axis=1)[:, :columns]
                logprobs = np.take_along_axis(logprobs, top_ids, 1)
            writer.append((row["id"], 0), ids, own, top_ids, logprobs)
    return folder
