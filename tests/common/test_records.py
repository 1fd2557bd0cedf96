"""Rows on disk: bad input is named by file and line, equal rows are equal bytes."""

from dataclasses import replace

from micota_fast.common.records import Completion, encode_row


def row(problem: str = "p0", sample: int = 0) -> Completion:
    return Completion(
        id=problem,
        sample=sample,
        problem="1 + 1 = ?",
        answer="2",
        completion="so \u2028 \\boxed{2} ½",  # a line separator in Unicode is not one in JSONL
        finish_reason="stop",
        prompt_tokens=5,
        completion_tokens=7,
        seed=None,
    )


def test_rows_are_the_same_bytes_every_time() -> None:
    assert encode_row(row()) == encode_row(replace(row()))
    assert b"\\u" not in encode_row(row())  # text as it is
