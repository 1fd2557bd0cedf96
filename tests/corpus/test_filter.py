"""Rejection and mixing: each rule, each reject kept, equal bytes again."""

import json
import tracemalloc
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from helpers.schemas import check_schema
from micota_fast.common.records import Completion, write_rows
from micota_fast.config.corpus import FilterConfig, MixConfig
from micota_fast.corpus import mix
from micota_fast.corpus.filter import run
from micota_fast.corpus.mix import apportion
from micota_fast.corpus.results import CorpusCounts
from micota_fast.errors import InputError
from micota_fast.sources.completions import read_completions

GOOD = Completion(
    id="good",
    sample=0,
    problem="What is 3 + 4?",
    answer="7",
    completion="It is \\boxed{7}.",
    finish_reason="stop",
    prompt_tokens=9,
    completion_tokens=100,
    seed=None,
    model="teacher",
)
ROWS = [
    GOOD,
    replace(GOOD, id="equal", answer="\\frac{1}{2}", completion="\\boxed{0.5}", completion_tokens=15_999),
    replace(GOOD, id="second", sample=1, completion="\\boxed{1} no, \\boxed{7}", completion_tokens=300),
    replace(GOOD, id="cut", finish_reason="length"),
    replace(GOOD, id="gone", finish_reason="abort"),
    replace(GOOD, id="limit", completion_tokens=16_000),
    replace(GOOD, id="bare", completion="It is 7."),
    replace(GOOD, id="torn", completion="\\boxed{1} or \\boxed{7"),
    replace(GOOD, id="empty", completion="\\boxed{}"),
    replace(GOOD, id="off", completion="\\boxed{8}"),
    replace(GOOD, id="endless", completion="\\boxed{99999999!}"),
]
REASON = {
    "cut": "truncated",
    "gone": "aborted",
    "limit": "too_long",
    "bare": "no_answer",
    "torn": "no_answer",
    "empty": "no_answer",
    "off": "wrong",
    "endless": "timeout",
}


def filtered(tmp_path: Path, rows: list[Completion] = ROWS, **rules: object) -> FilterConfig:
    write_rows(tmp_path / "completions.jsonl", rows)
    config = FilterConfig(
        completions=str(tmp_path / "completions.jsonl"),
        out=str(tmp_path / "corpus.jsonl"),
        workers=1,
        **{"timeout_s": 1.0, **rules},  # type: ignore[arg-type]
    )
    run(config)
    return config


def test_an_empty_corpus_is_an_error_where_it_is_not_allowed(tmp_path: Path) -> None:
    rows = [replace(GOOD, id="cut", finish_reason="length"), replace(GOOD, id="bare", completion="It is 7.")]
    assert Path(filtered(tmp_path, rows).out).read_bytes() == b""
    Path(tmp_path / "corpus.jsonl").unlink()
    told = r"none of 2 answers is accepted \(1 truncated, 1 no_answer; .*`problems_per_round`.*`keep: all`"
    with pytest.raises(InputError, match=told):
        filtered(tmp_path, rows, allow_empty=False)
    assert not (tmp_path / "corpus.jsonl").exists()
    assert len((tmp_path / "corpus.jsonl.rejects.jsonl").read_text().splitlines()) == 2
    assert len(read_completions(filtered(tmp_path, allow_empty=False).out)) == 3


def test_every_rule_and_every_reject(tmp_path: Path) -> None:
    config = filtered(tmp_path)
    accepted = read_completions(config.out)
    assert [row.id for row in accepted] == ["good", "equal", "second"]
    assert [asdict(replace(row, correct=None)) for row in accepted] == [asdict(row) for row in ROWS[:3]]
    assert all(row.correct is True for row in accepted)

    rejects = [json.loads(line) for line in (tmp_path / "corpus.jsonl.rejects.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in rejects} == REASON
    assert [row["completion"] for row in rejects] == [row.completion for row in ROWS[3:]]
    assert {row["id"]: row["correct"] for row in rejects if row["correct"] is not None} == {"off": False}

    counts = json.loads((tmp_path / "corpus.jsonl.counts.json").read_text())
    assert (counts["total"], counts["accepted"], counts["problems"]) == (11, 3, 3)
    assert {reason: n for reason, n in counts["rejected"].items() if n} == Counter(REASON.values())
    assert counts["lengths"] == [100, 15_999, 300]
    check_schema(CorpusCounts, tmp_path / "corpus.jsonl.counts.json")
    assert (counts["tokens"]["p50"], counts["tokens"]["max"]) == (300, 15_999)
    assert counts["tokens"]["mean"] == pytest.approx(16_399 / 3)


def test_equal_bytes_again(tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.glob("corpus*")}

    filtered(tmp_path, ROWS[:10])
    first = files()
    filtered(tmp_path, ROWS[:10])
    assert files() == first
    assert len(first) == 3


def test_rules_can_be_relaxed(tmp_path: Path) -> None:
    ungraded = filtered(tmp_path, require_correct=False)
    assert [row.id for row in read_completions(ungraded.out)] == ["good", "equal", "second", "off", "endless"]
    assert {row.correct for row in read_completions(ungraded.out)} == {None}
    anything = filtered(tmp_path, require_correct=False, require_boxed=False, max_tokens=200)
    assert [row.id for row in read_completions(anything.out)] == ["good", "bare", "torn", "empty", "off", "endless"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    text = "word " * 2000 + "\\boxed{7}"
    rows = (replace(GOOD, id=f"p{i // 2}", sample=i % 2, completion=text) for i in range(6 * 2048))
    write_rows(tmp_path / "completions.jsonl", rows)
    config = FilterConfig(
        completions=str(tmp_path / "completions.jsonl"), out=str(tmp_path / "corpus.jsonl"), require_correct=False
    )
    tracemalloc.start()
    try:
        run(config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "completions.jsonl").stat().st_size > 120e6
    assert peak < 60e6
    counts = json.loads((tmp_path / "corpus.jsonl.counts.json").read_text())
    assert (counts["accepted"], counts["problems"]) == (6 * 2048, 3 * 2048)


def test_nothing_accepted(tmp_path: Path) -> None:
    config = filtered(tmp_path, [ROWS[3]])
    assert read_completions(config.out) == []
    assert json.loads(Path(f"{config.out}.counts.json").read_text())["tokens"]["mean"] == 0


def test_gold_answers_that_cannot_be_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = replace(GOOD, id="told", answer="The answer is 7.")
    filtered(tmp_path, [GOOD, sentence, replace(sentence, sample=1)])
    assert "1 of 2 gold answers cannot be read" in capsys.readouterr().err  # of two problems, not of three rows
    filtered(tmp_path, [sentence], require_correct=False)
    assert "gold" not in capsys.readouterr().err


def test_nothing_is_written_if_no_gold_answer_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"completions\.jsonl: 1 of 1 gold answers cannot be read.* 'good' .*is empty"):
        filtered(tmp_path, [replace(GOOD, answer="")])
    assert not list(tmp_path.glob("corpus*"))


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "completions.jsonl", [GOOD, {"id": "x"}])
    with pytest.raises(InputError, match=r"completions\.jsonl:2"):
        run(FilterConfig(completions=str(tmp_path / "completions.jsonl"), out=str(tmp_path / "corpus.jsonl")))
    assert not (tmp_path / "corpus.jsonl").exists()


def corpora(tmp_path: Path) -> tuple[str, str]:
    """long: p0 to p59, with two samples of each; short: p10 to p99."""
    long = [replace(GOOD, id=f"p{i}", sample=s, completion=f"long {i} {s}") for i in range(60) for s in (0, 1)]
    short = [replace(GOOD, id=f"p{i}", completion=f"short {i}") for i in range(10, 100)]
    write_rows(tmp_path / "long.jsonl", long)
    write_rows(tmp_path / "short.jsonl", short)
    return str(tmp_path / "long.jsonl"), str(tmp_path / "short.jsonl")


def test_mix_shares_out_the_common_problems(tmp_path: Path) -> None:
    long, short = corpora(tmp_path)
    mix.run(MixConfig(parts={long: 1, short: 4}, out=str(tmp_path / "mix.jsonl"), seed=0))
    rows = read_completions(tmp_path / "mix.jsonl")
    assert [row.id for row in rows] == [f"p{i}" for i in range(10, 60)]  # each once, in the first part's order
    assert Counter(row.completion.split()[0] for row in rows) == {"long": 10, "short": 40}
    assert all(row.completion in (f"long {row.id[1:]} 0", f"short {row.id[1:]}") for row in rows)


def test_mix_depends_on_the_seed_alone(tmp_path: Path) -> None:
    long, short = corpora(tmp_path)

    def mixed(seed: int) -> bytes:
        mix.run(MixConfig(parts={long: 1, short: 4}, out=str(tmp_path / "mix.jsonl"), seed=seed))
        return (tmp_path / "mix.jsonl").read_bytes()

    assert mixed(0) == mixed(0)
    assert mixed(0) != mixed(1)


def test_apportion() -> None:
    assert apportion(50, {"a": 1, "b": 4}) == {"a": 10, "b": 40}
    assert apportion(11, {"a": 1, "b": 4}) == {"a": 2, "b": 9}
    assert apportion(2, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 0}
    for total in range(40):
        sizes = apportion(total, {"a": 3, "b": 2, "c": 7})
        assert sum(sizes.values()) == total
        assert all(abs(sizes[name] - total * share / 12) < 1 for name, share in {"a": 3, "b": 2, "c": 7}.items())


def test_mix_refuses(tmp_path: Path) -> None:
    long, _ = corpora(tmp_path)
    write_rows(tmp_path / "other.jsonl", [replace(GOOD, id="elsewhere")])
    write_rows(tmp_path / "chat.jsonl", [{"messages": []}])
    write_rows(tmp_path / "mix.jsonl", [GOOD])
    for parts, said in (
        ({}, "at least one corpus"),
        ({long: 1, str(tmp_path / "mix.jsonl"): 1}, "mix.jsonl is also read"),
        ({long: 0}, "share of at least 1"),
        ({long: 1, str(tmp_path / "other.jsonl"): 1}, "nothing to mix"),
        ({long: 1, str(tmp_path / "chat.jsonl"): 1}, r"chat\.jsonl:1"),
        ({long: 1, str(tmp_path / "absent.jsonl"): 1}, "absent"),
    ):
        with pytest.raises(InputError, match=said):
            mix.run(MixConfig(parts=parts, out=str(tmp_path / "mix.jsonl")))


def test_filter_refuses_to_write_over_what_it_reads_and_to_filter_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [GOOD])
    with pytest.raises(InputError, match="is also read"):
        run(FilterConfig(completions=str(path), out=str(path)))
    assert read_completions(path) == [GOOD]
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no completions"):
        run(FilterConfig(completions=str(path), out=str(tmp_path / "out.jsonl")))
    assert not (tmp_path / "out.jsonl").exists()
