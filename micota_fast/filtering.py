"""Which completions enter a corpus: the rules of `accept` applied to a finished file, every reject kept."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from micota_fast.accept import REASONS, reject_at_once, reject_graded
from micota_fast.grade import Grader, Verdict
from micota_fast.recipe import FilterConfig
from micota_fast.records import Completion, encode_row, read_completions, write_atomic, write_rows

QUANTILES = (1, 10, 25, 50, 75, 90, 99)


def run(config: FilterConfig) -> None:
    """Split completions into `out` (accepted) and `out`.rejects.jsonl, and write `out`.counts.json.

    Rules, in this order: the answer ended by itself (finish_reason "stop"); it has fewer than `max_tokens` tokens; it
    holds a complete final box, where `require_boxed` or `require_correct` asks for one; it keeps to its problem's
    scripts and does not repeat itself, where limits are set; the boxed answer equals the problem's, where
    `require_correct` asks. A comparison that hit its limit rejects as `timeout` or `crashed`.

    Equal input gives equal bytes. `out` is written last, so its presence means that all three files are whole.

    Raises:
        InputError: the completions cannot be read, or a file cannot be written.
    """
    rows = read_completions(config.completions)
    reasons = [reject_at_once(row, config) for row in rows]
    if config.require_correct:
        open_ = [i for i, reason in enumerate(reasons) if reason is None]
        with Grader(config.workers, config.timeout_s) as grader:
            verdicts = grader.grade([(rows[i].completion, rows[i].answer) for i in open_])
        for i, verdict in zip(open_, verdicts, strict=True):
            reasons[i], rows[i] = reject_graded(verdict), _graded(rows[i], verdict)
    accepted = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    rejected = [asdict(row) | {"reason": reason} for row, reason in zip(rows, reasons, strict=True) if reason]

    out = Path(config.out)
    counts = _counts(rows, accepted, [reason for reason in reasons if reason], config)
    write_rows(out.with_name(f"{out.name}.rejects.jsonl"), rejected)
    write_atomic(out.with_name(f"{out.name}.counts.json"), [json.dumps(counts, indent=1).encode() + b"\n"])
    write_atomic(out, map(encode_row, accepted))
    why = ", ".join(f"{number} {reason}" for reason, number in counts["rejected"].items() if number)
    print(f"{config.out}: {len(accepted)} of {len(rows)} accepted" + (f"; rejected: {why}" if why else ""))


def _graded(row: Completion, verdict: Verdict) -> Completion:
    return replace(row, correct=verdict.status == "correct") if verdict.status in ("correct", "wrong") else row


def _counts(
    rows: Sequence[Completion], accepted: Sequence[Completion], reasons: Sequence[str], config: FilterConfig
) -> dict[str, Any]:
    """Numbers by reason and the lengths (tokens) of what was accepted; quantiles are interpolated linearly."""
    number = Counter(reasons)
    lengths = np.array([row.completion_tokens for row in accepted], dtype=np.int64)
    tokens = {"mean": 0.0, "min": 0, "max": 0} | {f"p{q}": 0.0 for q in QUANTILES}
    if accepted:
        tokens = {"mean": float(lengths.mean()), "min": int(lengths.min()), "max": int(lengths.max())}
        tokens |= {f"p{q}": float(np.quantile(lengths, q / 100)) for q in QUANTILES}
    return {
        "total": len(rows),
        "accepted": len(accepted),
        "problems": len({row.id for row in accepted}),
        "rejected": {reason: number[reason] for reason in REASONS},
        "tokens": tokens,
        "lengths": lengths.tolist(),
        "rules": {
            "max_tokens": config.max_tokens,
            "require_correct": config.require_correct,
            "require_boxed": config.require_boxed,
            "max_foreign": config.max_foreign,
            "max_repeated": config.max_repeated,
        },
    }
