"""Which completions enter a corpus: the rules of `accept` applied to a finished file, every reject kept."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from micota_fast.common.files import open_atomic, refuse_to_overwrite
from micota_fast.common.json_io import write_json
from micota_fast.common.records import Completion, encode_row
from micota_fast.common.schema import to_json
from micota_fast.config.corpus import FilterConfig
from micota_fast.corpus.results import AcceptedTokens, CorpusCounts
from micota_fast.corpus.rules import REASONS, SELDOM, reject_at_once, reject_graded
from micota_fast.errors import InputError
from micota_fast.grading.gold import GoldCheck
from micota_fast.grading.grader import Grader
from micota_fast.sources.completions import iter_completions
from micota_fast.statistics.quantiles import quantiles

QUANTILES = (1, 10, 25, 50, 75, 90, 99)
ROWS_AT_ONCE = 2048  # held, and graded together


def run(config: FilterConfig) -> None:
    """Split completions into `out` (accepted) and `out`.rejects.jsonl, and write `out`.counts.json.

    Rules, in this order: the answer ended by itself (finish_reason "stop"); it has fewer than `max_tokens` tokens; it
    holds a complete final box, where `require_boxed` or `require_correct` asks for one; it keeps to its problem's
    scripts and does not repeat itself, where limits are set; the boxed answer equals the problem's, where
    `require_correct` asks. A comparison that hit its limit rejects as `timeout` or `crashed`.

    Equal input gives equal bytes. `out` appears last, so its presence means that all three files are whole. Holds
    ROWS_AT_ONCE rows, and 24 bytes per row of the file; at the end also the text of the counts, with all lengths.

    Raises:
        InputError: the completions cannot be read, none of their gold answers can (see `GoldCheck`), a file cannot be
            written, or none is accepted and `allow_empty` is false.
    """
    out, tally = Path(config.out), _Tally()
    golds = GoldCheck(config.completions)
    refuse_to_overwrite(out, config.completions)
    rows = iter_completions(config.completions)
    with open_atomic(out) as accepted, Grader(config.workers, config.timeout_s) as grader:
        with open_atomic(out.with_name(f"{out.name}.rejects.jsonl")) as rejected:
            while some := list(islice(rows, ROWS_AT_ONCE)):
                for row, reason in _judged(some, config, grader):
                    golds.take(row.id, row.answer)
                    tally.take(row, reason)
                    if reason is None:
                        accepted.write(encode_row(row))
                    else:
                        rejected.write(encode_row(asdict(row) | {"reason": reason}))
            if config.require_correct:
                golds.finish()
        counts = tally.counts(config)
        if not counts.total:
            raise InputError(f"{config.completions}: no completions")
        write_json(out.with_name(f"{out.name}.counts.json"), to_json(counts))
        why = ", ".join(f"{number} {reason}" for reason, number in counts.rejected.items() if number)
        if not counts.accepted and not config.allow_empty:
            raise InputError(
                f"{config.completions}: none of {counts.total} answers is accepted ({why}; each with its reason in "
                f"{out}.rejects.jsonl), so the round has nothing to learn; ask more problems (`problems_per_round`), "
                f"allow longer answers (`generate.max_new_tokens`, `filter.max_tokens`), or keep wrong ones "
                f"(`keep: all`)"
            )
    print(f"{config.out}: {counts.accepted} of {counts.total} accepted" + (f"; rejected: {why}" if why else ""))


def _judged(rows: list[Completion], config: FilterConfig, grader: Grader) -> Sequence[tuple[Completion, str | None]]:
    """Yield each row, with `correct` set if it was graded, and why it is rejected."""
    judged = [(row, reject_at_once(row, config)) for row in rows]
    if config.require_correct:
        open_ = [i for i, (_, reason) in enumerate(judged) if reason is None]
        verdicts = grader.grade([(rows[i].completion, rows[i].answer) for i in open_])
        for i, verdict in zip(open_, verdicts, strict=True):
            known = verdict.status in ("correct", "wrong")
            row = replace(rows[i], correct=verdict.status == "correct") if known else rows[i]
            judged[i] = row, reject_graded(verdict)
    return judged


class _Tally:
    """Numbers by reason, and the lengths (tokens) of what was accepted."""

    def __init__(self) -> None:
        self._total = 0
        self._rejected: Counter[str] = Counter()
        self._problems, self._lengths = array("q"), array("q")  # of accepted rows; of ids the hashes

    def take(self, row: Completion, reason: str | None) -> None:
        self._total += 1
        if reason is None:
            self._problems.append(hash(row.id))
            self._lengths.append(row.completion_tokens)
        else:
            self._rejected[reason] += 1

    def counts(self, config: FilterConfig) -> CorpusCounts:
        """Return the content of counts.json."""
        lengths = np.array(self._lengths, np.int64)
        measured = lengths if len(lengths) else np.zeros(1, np.int64)
        rules = ("max_tokens", "require_correct", "require_boxed", "max_foreign", "max_repeated")
        return CorpusCounts(
            total=self._total,
            accepted=len(lengths),
            problems=len(np.unique(np.array(self._problems, np.int64))),
            rejected={
                reason: self._rejected[reason] for reason in REASONS if reason not in SELDOM or self._rejected[reason]
            },
            tokens=AcceptedTokens(
                mean=float(measured.mean()),
                min=int(measured.min()),
                max=int(measured.max()),
                **quantiles(measured, QUANTILES),
            ),
            lengths=tuple(lengths.tolist()),
            rules={rule: getattr(config, rule) for rule in rules},
        )
