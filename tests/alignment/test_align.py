"""Alignment against transformers' own likelihood of each document, one at a time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.schemas import check_schema
from micota_fast.alignment.align import run
from micota_fast.alignment.results import Alignment
from micota_fast.chat.encoding import Chat
from micota_fast.common.records import Completion, write_rows
from micota_fast.config.evaluation import AlignConfig
from micota_fast.config.generation import ChatConfig
from micota_fast.data.tokenise import load_documents
from micota_fast.errors import InputError


def corpus(folder: Path, sizes: list[int]) -> Path:
    rows = [
        {"id": str(i), "problem": f"What is {i} + {n}?", "completion": "so we get " * n + f"\\boxed{{{i + n}}}"}
        for i, n in enumerate(sizes)
    ]
    path = folder / f"corpus{sum(sizes)}.jsonl"
    write_rows(path, rows)
    return path


def config(model: Path, out: Path, **corpora: Path) -> AlignConfig:
    paths = {name: str(path) for name, path in corpora.items()}
    return AlignConfig(
        model=str(model),
        out=str(out),
        corpora=paths,
        dtype="float32",
        device="cpu",
        pack_tokens=400,
        max_doc_tokens=300,
    )


def test_equals_transformers_document_by_document(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = corpus(tmp_path, [1, 9, 3, 14, 2, 5, 100])  # the last is above max_doc_tokens
    run(config(qwen2_checkpoint, tmp_path / "out", mid=path))
    result = json.loads((tmp_path / "out" / "mid.json").read_text())

    documents = load_documents(path, Chat.from_checkpoint(qwen2_checkpoint, ChatConfig()), 300)
    model = AutoModelForCausalLM.from_pretrained(qwen2_checkpoint).double().eval()
    nll, tokens, ranks = [], [], []
    for d in range(len(documents)):
        piece = slice(documents.offsets[d], documents.offsets[d + 1])
        ids = torch.from_numpy(documents.input_ids[piece].astype(np.int64))
        mask = torch.from_numpy(documents.supervised[piece])
        with torch.no_grad():
            every_log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
            log_p = every_log_p.gather(1, ids[1:, None])[:, 0]
        nll.append(-float(log_p[mask[1:]].sum()))
        tokens.append(int(mask[1:].sum()))
        ranks.append(1 + (every_log_p > log_p[:, None]).sum(1)[mask[1:]].numpy())
    means = np.array(nll) / np.array(tokens)
    assert result["documents"] == 6
    assert result["dropped"] == 1
    assert result["lengths"] == tokens
    assert result["perplexity"] == pytest.approx(math.exp(sum(nll) / sum(tokens)), rel=1e-5)
    assert result["document_nll"]["p50"] == pytest.approx(np.quantile(means, 0.5), rel=1e-5)
    assert result["document_nll"]["p90"] == pytest.approx(np.quantile(means, 0.9), rel=1e-5)
    assert result["tokens"]["total"] == sum(tokens)
    assert result["tokens"]["mean"] == pytest.approx(np.mean(tokens))
    learnability = result["learnability"]
    assert learnability["nats_per_answer"]["mean"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert learnability["nats_per_answer"]["p90"] == pytest.approx(np.quantile(nll, 0.9), rel=1e-5)
    assert learnability["departures_per_answer"]["mean"] == np.mean([(r > 1).sum() for r in ranks])
    clipped = sum(int(np.minimum(r, 100).sum()) for r in ranks)
    assert any((r > 100).any() for r in ranks)
    assert learnability["rank_surprisal_ratio"] == pytest.approx(clipped / sum(nll), rel=1e-5)


def test_each_corpus_its_file_and_equal_bytes_again(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    paths = {"long": corpus(tmp_path, [9, 8]), "short": corpus(tmp_path, [1, 2])}
    run(config(qwen2_checkpoint, tmp_path / "one", **paths))
    run(config(qwen2_checkpoint, tmp_path / "two", **paths))
    for name in ("long", "short"):
        assert (tmp_path / "one" / f"{name}.json").read_bytes() == (tmp_path / "two" / f"{name}.json").read_bytes()
        check_schema(Alignment, tmp_path / "one" / f"{name}.json")
    long, short = (json.loads((tmp_path / "one" / f"{name}.json").read_text()) for name in ("long", "short"))
    assert long["tokens"]["mean"] > short["tokens"]["mean"]


def test_a_bad_row_is_named(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    path = corpus(tmp_path, [1, 2])
    path.write_bytes(path.read_bytes() + b'{"problem": "no completion"}\n')
    with pytest.raises(InputError, match=r"corpus3\.jsonl:3"):
        run(config(qwen2_checkpoint, tmp_path / "out", x=path))


def test_a_device_that_is_not_there(qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = config(qwen2_checkpoint, tmp_path / "out", x=corpus(tmp_path, [1, 2]))
    settings.device = "cuda"
    with pytest.raises(InputError, match="torch sees no CUDA device"):
        run(settings)


def test_own_answers_to_other_problems_are_told_of(
    qwen2_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Completion("elsewhere", 0, "?", "1", "an answer", "stop", 1, 1, None)
    write_rows(tmp_path / "own.jsonl", [row])
    settings = config(qwen2_checkpoint, tmp_path / "out", x=corpus(tmp_path, [1, 2]))
    settings.student_answers = str(tmp_path / "own.jsonl")
    run(settings)
    assert "own.jsonl holds no answer to any problem of" in capsys.readouterr().out
