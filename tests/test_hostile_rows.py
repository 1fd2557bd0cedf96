"""A row that would do harm later is refused by every verb that reads rows, by file and line, and nothing is written."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from micota_fast.cli import main
from micota_fast.common.records import Completion

ROW = Completion(
    id="a",
    sample=0,
    problem="1 + 2?",
    answer="3",
    completion="\\boxed{3}",
    finish_reason="stop",
    prompt_tokens=9,
    completion_tokens=100,
    seed=None,
)
TEXT = json.dumps(asdict(ROW))
BAD: dict[str, str | bytes] = {
    "half a character in an id": TEXT.replace('"a"', r'"a\ud801"'),
    "half a character in a text": TEXT.replace("1 + 2?", r"1 + 2?\udfff"),
    "half a character in a key": TEXT.replace('"seed"', r'"seed\ud800": 1, "seed"'),
    "half a character in UTF-8": TEXT.encode().replace(b"1 + 2?", b"1 + 2?\xed\xa0\x80"),
    "Latin-1": TEXT.encode().replace(b"1 + 2?", b"1 + 2?\xe9"),
    "deep lists": TEXT.replace("null", "[" * 100_000 + "]" * 100_000),
    "deep objects in a key that is not ours": TEXT.replace(
        '"seed"', '"more": ' + '{"a":' * 200 + "1" + "}" * 200 + ', "seed"'
    ),
    "an endless whole number": TEXT.replace("100,", "1" * 10_000 + ","),
    "NaN": TEXT.replace('"seed"', '"more": NaN, "seed"'),
    "a list": f"[{TEXT}]",
}
ONLY_COMPLETIONS: dict[str, str | bytes] = {"a whole number of 70 bits": TEXT.replace("100,", f"{2**70},")}


def refused(arguments: list[str], path: Path, line: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file for file in path.parent.rglob("*") if file.is_file()}
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"{path}:{line}: " in said
    assert len(said) < 1000, "what is endless is not printed"
    assert {file for file in path.parent.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("verb", ["filter", "mix", "export", "contamination", "generate", "evaluate"])
@pytest.mark.parametrize("case", BAD | ONLY_COMPLETIONS)
def test_a_hostile_row_is_refused(
    verb: str, case: str, tmp_path: Path, qwen2_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case in ONLY_COMPLETIONS and verb not in ("filter", "export"):
        pytest.skip("this verb does not read the number")
    bad = (BAD | ONLY_COMPLETIONS)[case]
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    other = tmp_path / "other.jsonl"
    other.write_text(TEXT + "\n")
    path.write_bytes(TEXT.encode() + b"\n\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    model = f"model={qwen2_checkpoint}"
    benchmarks = [f"benchmarks=[{{name: set, path: {path}}}]", f"out={out}"]
    options = {
        "filter": [f"completions={path}", f"out={out}"],
        "mix": [f"parts={{{other}: 1, {path}: 1}}", f"out={out}"],
        "export": [],
        "contamination": [f"corpora={{c: {other}}}", *benchmarks],
        "generate": [model, f"problems={path}", f"out={out}", "url=http://localhost:9"],
        "evaluate": [model, "url=http://localhost:9", *benchmarks],
    }[verb]
    arguments = [verb, str(path), str(out)] if verb == "export" else [verb]
    refused([*arguments, *(word for option in options for word in ("--set", option))], path, 3, capsys)


def test_ids_that_differ_in_half_a_character_are_never_made_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(TEXT.replace('"a"', id_) + "\n" for id_ in (r'"a\ud800"', r'"a\ud801"')))
    refused(["filter", "--set", f"completions={path}", "--set", f"out={tmp_path / 'out'}"], path, 1, capsys)
