"""`micota score`: what a model finds likely at each position of answers that somebody else has written.

It leaves the model's log-probabilities of the answer's own tokens and of its likeliest ones there.

A row is cut into prompt and answer as `micota train` cuts it, and put to servers by SGLang's native /generate, which
returns the log-probabilities of the text's own tokens and generates none. Scores are written to OUT.parts as they
arrive, and a run that was killed resumes from there. OUT is a store that training reads (`sources.top_logprobs`).

Whether the finished OUT has the same bytes as an uninterrupted run's depends on the server, as in `micota generate`.
The embedded engine in float64 gives the same bytes; in lower precision the batch that a request shares decides the last
bits.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micota_fast.chat.encoding import Chat
from micota_fast.common.fingerprint import Fingerprints
from micota_fast.common.json_io import parse_json, write_json
from micota_fast.config import loader
from micota_fast.config.generation import GenerateConfig
from micota_fast.config.scoring import ScoreConfig
from micota_fast.errors import InputError
from micota_fast.generation.client import Client
from micota_fast.generation.journal import Journal
from micota_fast.generation.model_identity import model_fingerprints
from micota_fast.generation.scores import decode_scores
from micota_fast.generation.servers import named_urls, servers_for
from micota_fast.model.folder import resolve_checkpoint, resolve_model
from micota_fast.scoring.rows import load_rows
from micota_fast.scoring.scoring_api import ScoringApi
from micota_fast.sources.top_logprobs import FORMAT, TopLogprobs, TopLogprobsWriter


def run(config: ScoreConfig) -> None:
    """Score all rows of a file. A finished store with the same fingerprint is left as it is.

    Raises:
        InputError: bad input, tokenizers that disagree on an answer, an output that belongs to another run, a request
            that a server refuses, or no server answers any more (what was scored until then is kept).
    """
    requests = _requests(config)
    named_urls(requests)
    scoring = Scoring(config)
    if scoring.is_finished():
        print(f"{config.out}: done already")
        return
    for teachers, students in scoring.agreement.special.items():
        print(f"{teachers!r} of the scoring model is taken for {students!r} of the student", flush=True)
    with servers_for(requests, f"{config.out}.server.log") as urls:
        scoring.run(urls, requests)
    print(f"{config.out}: {len(scoring.rows)} rows, {len(scoring.rows.answer_ids):,} tokens with {config.top_k} each")


class Scoring:
    """One model's scores of the rows of one file, at one place.

    Args:
        config: of the verb.

    Attributes:
        rows: what is scored.
        agreement: between the two tokenizers.

    Raises:
        InputError: see `load_rows`.
    """

    def __init__(self, config: ScoreConfig) -> None:
        self._config, self._out = config, Path(config.out)
        self._parts = Path(f"{config.out}.parts")
        self._checkpoint, _ = resolve_model(config.model)
        self._teacher = Chat.from_checkpoint(self._checkpoint, config.chat)
        student = None
        if config.student is not None:
            student = Chat.from_checkpoint(resolve_checkpoint(config.student), config.student_chat)
        self.rows, self.agreement = load_rows(config.completions, self._teacher, student)
        self._vocab_size = (student or self._teacher).vocab_size
        self._made_by: dict[str, Any] = {
            **model_fingerprints(config.model, Fingerprints(None)),
            "serve": loader.identity(config.serve),
            "rows": self.rows.sha256,
            "special_tokens": self.agreement.special,
            "student_ids": self.agreement.sha256,
        }

    def is_finished(self) -> bool:
        """Return whether OUT is complete, undamaged and the answer to this request.

        Raises:
            InputError: it is damaged, or belongs to another request.
        """
        if not self._out.exists():
            return False
        with self._store():  # refuses what another run has made
            TopLogprobs(self._out).verify()
        if self._parts.exists():  # killed between its last file and its end
            self._journal().discard()
        return True

    def run(self, urls: Sequence[str], requests: GenerateConfig) -> None:
        """Score what the journal lacks, and write the store.

        Calls `asyncio.run`, so it must not be called from a running event loop.

        Args:
            urls: of the servers, without a slash at the end.
            requests: how they are asked.

        Raises:
            InputError: see the verb's `run`.
        """
        config, rows = self._config, self.rows
        with self._journal() as journal:
            if len(journal) < len(rows):
                known = self._teacher.vocab_size
                model = config.model
                timeout_s = config.request_timeout_s
                api = ScoringApi(rows, self.agreement, config.top_k, known, model, self._checkpoint, timeout_s)
                client = Client(rows, requests, api, urls, journal, judge=None, enough=None)
                try:
                    asyncio.run(client.run())
                finally:
                    with contextlib.suppress(InputError):  # a full disk: the error under way says more
                        write_json(Path(f"{config.out}.meters.json"), client.summary(), 2)
            order = np.argsort(journal.entries["problem"])
            with self._store() as store:
                for row, line in enumerate(journal.rows(order)):
                    key = rows.keys[row]
                    if key in store:  # a run killed while it wrote the store has left it
                        continue
                    answer = rows.answer(row)
                    scores = parse_json(line, f"{self._parts}, row {row}")["scores"]
                    store.append(key, answer, *decode_scores(scores, len(answer), config.top_k))
            journal.discard()

    def _journal(self) -> Journal:
        return Journal(self._parts, {"scores": FORMAT, "top_k": self._config.top_k, **self._made_by})

    def _store(self) -> TopLogprobsWriter:
        return TopLogprobsWriter(self._out, self._config.top_k, self._made_by, vocab_size=self._vocab_size)


def _requests(config: ScoreConfig) -> GenerateConfig:
    """How the client of `micota generate` is to ask the servers."""
    return GenerateConfig(
        model=config.model,
        problems=config.completions,
        out=config.out,
        url=config.url,
        serve=config.serve,
        chat=config.chat,
        concurrency=config.concurrency,
        request_timeout_s=config.request_timeout_s,
        wait_for_server_s=config.wait_for_server_s,
    )
