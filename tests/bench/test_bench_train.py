"""bench/train.py: the contestants train on the same tokens, and what fails or is absent is said."""

import json
import sys
from pathlib import Path

import pytest

from helpers.bench_runs import CPU_ALONE
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import train as bench
import train_contestants
from train_contestants import Contestant, Prepared

from micota_fast.chat.encoding import Chat
from micota_fast.config.generation import ChatConfig
from micota_fast.data.tokenise import load_documents

MICOTA, PLAIN = Contestant("micota", "float32", None, {}), Contestant("plain loop", "float32", "plain", {})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return train_contestants.prepare(bench.TINY_CASE, tmp_path_factory.mktemp("bench") / "case")


def test_the_text_and_the_token_ids_are_the_same_documents(prepared: Prepared) -> None:
    chat = Chat.from_checkpoint(
        prepared.folder / "model", ChatConfig(use_template=False, system=None, prompt="{problem}")
    )
    read = load_documents(prepared.folder / "corpus.jsonl", chat, bench.TINY_CASE.pack_tokens)
    ids = json.loads((prepared.folder / "documents.json").read_text())
    assert read.input_ids.tolist() == [token for document in ids for token in document]
    assert read.lengths.tolist() == list(prepared.lengths)
    assert read.supervised.all()
    assert sorted(d for pack in prepared.packs for d in pack) == list(range(len(ids)))
    assert max(sum(prepared.lengths[d] for d in pack) for pack in prepared.packs) <= bench.TINY_CASE.pack_tokens


@pytest.mark.slow
def test_contestants_train_alike_and_a_broken_one_is_a_row(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(key, CPU_ALONE[key])
    broken = Contestant("broken", "float32", "plain", {"model": str(prepared.folder / "nowhere")})
    rows = bench.measure(prepared, [MICOTA, broken, PLAIN], "cpu", sys.executable, runs=1)
    assert rows[broken.label]["status"] == "failed"
    assert "nowhere" in rows[broken.label]["reason"]
    ours, plain = rows[MICOTA.label], rows[PLAIN.label]
    # Each pass has its own order of the documents, so equal up to that; random weights have a loss of 6.2.
    assert ours["loss"] == pytest.approx(plain["loss"], abs=0.05)
    assert ours["loss"] < 6
    for row in (ours, plain):
        assert row["status"] == "measured"
        assert row["tokens_per_s"] * row["pass_s"][0] == pytest.approx(prepared.tokens)
        assert row["supervised_per_s"] * row["pass_s"][0] == pytest.approx(prepared.supervised)
        assert row["peak_bytes"] > 100 << 20  # torch alone takes that
        # One thread: no more work than time, up to the clock's ticks and what passes until the end of a pass is seen.
        assert 0 < row["pass_cpu_s"][0] < row["pass_s"][0] + 0.2
    assert ours["attention"] == "sdpa"
    assert not (prepared.folder / "run").exists()


@pytest.mark.slow
def test_ours_is_refused_where_it_does_not_train_on_everything(prepared: Prepared, tmp_path: Path) -> None:
    short = Contestant("micota", "float32", None, {"max_doc_tokens": 100})  # longer ones are dropped
    with pytest.raises(RuntimeError, match="of 10 steps"):
        train_contestants.run(short, prepared, "cpu", sys.executable, tmp_path / "run")


def test_what_cannot_be_imported_is_absent_with_the_reason(tmp_path: Path) -> None:
    present, absent = train_contestants.contestants("cpu", str(tmp_path / "no-python"))
    assert "no-python" in absent["trl packed, float32"]
    assert not [c for c in present if c.program == "trl"]
    assert MICOTA in present
    present, absent = train_contestants.contestants("cpu", str(tmp_path / "no-python"), lora=True)
    assert [c.label for c in present] == ["micota, float32", "micota, LoRA, float32"]
    assert list(absent) == ["trl packed, float32", "trl packed, peft, float32"]
    assert train_contestants._import_error(sys.executable, "no_such_module") == (
        "ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert train_contestants._rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_the_models_are_those_named() -> None:
    parameters = {case.model: bench.decoder(case).num_params() for case in (bench.CPU_CASE, *bench.GPU_CASES)}
    assert parameters == {
        "Qwen2-8M": 8_001_792,
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-1.5B": 1_543_714_304,
        "Qwen2.5-3B": 3_085_938_688,
    }
