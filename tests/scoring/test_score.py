"""Scoring a corpus: the model's own distribution on exactly the tokens of training, whoever is killed in between."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web

from helpers.servers import http_server
from helpers.waiting import rows_in
from micota_fast.chat.encoding import Chat
from micota_fast.cli import main
from micota_fast.common.records import Completion, write_rows
from micota_fast.config.generation import ChatConfig, ServeConfig
from micota_fast.config.scoring import ScoreConfig
from micota_fast.data.tokenise import load_documents
from micota_fast.errors import InputError
from micota_fast.generation import fleet
from micota_fast.generation.endpoint import RetryableError
from micota_fast.generation.scores import Scores, decode_scores, encode_scores
from micota_fast.scoring import score
from micota_fast.scoring.agreement import ABSENT
from micota_fast.scoring.reply import read_scores
from micota_fast.scoring.rows import load_rows
from micota_fast.scoring.scoring_api import SPARE, ScoringApi
from micota_fast.serve.serve import serving
from micota_fast.sources.top_logprobs import TopLogprobs

ROWS, K = 24, 5
SERVE = ServeConfig(dtype="float64")
CHAT = ChatConfig(system=None, prompt="{problem}")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def url(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(qwen2_checkpoint, SERVE, tmp_path_factory.mktemp("server") / "log.txt") as [url]:
        yield url


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completions") / "completions.jsonl"
    write_rows(path, map(row, range(ROWS)))
    return path


def row(i: int, **more: Any) -> Completion:
    text = f"so we get {i} + {i * i} = {i + i * i} " * (1 + i % 5) + f"the answer is \\boxed{{{i + i * i}}}."
    known = {"prompt_tokens": 9, "completion_tokens": 9, "seed": None}
    values = {"id": f"p{i // 2}", "sample": i % 2, "problem": f"{i // 2} + {i} =", "answer": "0", "completion": text}
    return Completion(**{**known, **values, "finish_reason": "stop", **more})


def config(checkpoint: Path, completions: Path, out: Path, url: str | list[str] | None, **more: Any) -> ScoreConfig:
    return ScoreConfig(
        model=str(checkpoint),
        completions=str(completions),
        out=str(out),
        url=url,
        **{"top_k": K, "chat": CHAT, "student_chat": CHAT, "serve": SERVE, "concurrency": 6, **more},
    )


@pytest.fixture(scope="module")
def scored(url: str, qwen2_checkpoint: Path, completions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("scored") / "scores"
    score.run(config(qwen2_checkpoint, completions, out, url))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_scores_are_the_models_on_the_tokens_that_training_learns(
    scored: Path, qwen2_checkpoint: Path, completions: Path
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(qwen2_checkpoint, dtype=torch.float64)
    store = TopLogprobs(scored)
    store.verify()
    documents = load_documents(completions, Chat.from_checkpoint(qwen2_checkpoint, CHAT), 512)
    assert len(store) == len(documents) == ROWS
    for i in range(ROWS):
        part = slice(*documents.offsets[i : i + 2])
        ids, supervised = documents.input_ids[part], documents.supervised[part]
        found = store[row(i).id, row(i).sample]
        assert found.token_ids_T.tolist() == ids[supervised].tolist()
        with torch.no_grad():
            logits_TV = reference(torch.tensor(ids[None].astype(np.int64))).logits[0]
        logprobs_TV = logits_TV.log_softmax(-1)[np.flatnonzero(supervised) - 1]
        own = logprobs_TV.gather(1, torch.tensor(ids[supervised].astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(found.token_logprobs_T, own.numpy(), rtol=1e-6)
        assert not np.isin(found.token_ids_T, found.top_ids_TK).all()  # and those that are not among the K as well
        want = logprobs_TV.topk(K)
        assert found.top_ids_TK.tolist() == want.indices.tolist()
        assert found.top_logprobs_TK.tolist() == want.values.numpy().astype(np.float16).tolist()
    assert not Path(f"{scored}.parts").exists()


def test_finished_scores_are_left_alone_and_others_are_refused(
    scored: Path, qwen2_checkpoint: Path, completions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(scored)
    score.run(config(qwen2_checkpoint, completions, scored, NOBODY, concurrency=1))
    assert "done already" in capsys.readouterr().out
    assert contents(scored) == before
    with pytest.raises(InputError, match=r"belongs to another run \(it differs in: top_k\)"):
        score.run(config(qwen2_checkpoint, completions, scored, NOBODY, top_k=4))
    other = scored.parent / "other.jsonl"
    write_rows(other, map(row, range(3)))
    with pytest.raises(InputError, match=r"it differs in: made_by\.rows"):
        score.run(config(qwen2_checkpoint, other, scored, NOBODY))


# -- killed and resumed ----------------------------------------------------------------------------------------------

CLIENT = """
import os, signal, sys
from micota_fast.generation.journal import Journal
from micota_fast.scoring.score import run
from micota_fast.sources.top_logprobs import TopLogprobsWriter
from micota_fast.config import loader
from micota_fast.config.scoring import ScoreConfig

name, calls, options = sys.argv[1], int(sys.argv[2]), sys.argv[3]
cls, method = {"answer": (Journal, "append"), "store": (TopLogprobsWriter, "append"), "end": (Journal, "discard")}[name]
real = getattr(cls, method)

def killed(*args):
    global calls
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    calls -= 1
    return real(*args)

setattr(cls, method, killed)
run(loader.load(ScoreConfig, options))
"""


def test_sigkill_at_any_moment_leaves_a_run_that_ends_with_the_same_bytes(
    tmp_path: Path, url: str, scored: Path, qwen2_checkpoint: Path, completions: Path
) -> None:
    """Killed with a third of the answers there, then in the middle of writing the store, then when only it is whole."""
    out, parts, options = tmp_path / "scores", tmp_path / "scores.parts", tmp_path / "score.json"
    asked = config(qwen2_checkpoint, completions, out, url)
    options.write_text(json.dumps(dataclasses.asdict(asked)))
    for moment, calls in (("answer", ROWS // 3), ("store", ROWS // 2), ("end", 0)):
        client = subprocess.run([sys.executable, "-c", CLIENT, moment, str(calls), options], capture_output=True)
        assert client.returncode == -signal.SIGKILL, client.stderr
        assert rows_in(parts) == (ROWS // 3 if moment == "answer" else ROWS)
        assert out.exists() == (moment == "end")
    score.run(asked)
    assert contents(out) == contents(scored)
    assert not parts.exists()


def test_a_server_that_fails_leaves_its_rows_to_the_other(
    tmp_path: Path, url: str, scored: Path, qwen2_checkpoint: Path, completions: Path
) -> None:
    refused = 0

    async def failing(_: web.Request) -> web.StreamResponse:
        nonlocal refused
        refused += 1
        return web.json_response({"error": {"message": "broken"}}, status=500)

    with http_server(failing, {"context_length": 512}, healthy=True) as other:
        score.run(config(qwen2_checkpoint, completions, tmp_path / "scores", [other, url]))
    assert refused > 0
    assert contents(tmp_path / "scores") == contents(scored)


def test_it_starts_a_server_of_its_own_and_the_command_line_reads_the_options(
    tmp_path: Path, scored: Path, qwen2_checkpoint: Path, completions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tmp_path / "score.json"
    values = dataclasses.asdict(config(qwen2_checkpoint, completions, tmp_path / "scores", None))
    options.write_text(json.dumps(values))
    assert main(["score", str(options)]) == 0
    assert contents(tmp_path / "scores") == contents(scored)
    assert f"{ROWS} rows, " in capsys.readouterr().out


# -- what is refused -------------------------------------------------------------------------------------------------


def test_rows_that_no_server_takes_are_named_before_any_is_scored(
    tmp_path: Path, url: str, qwen2_checkpoint: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [row(0), row(1, completion="so we get " * 300)])
    with pytest.raises(InputError, match=r"1 of 2 rows are longer .* row 2 \('p0', sample 1\) of \d+ tokens"):
        score.run(config(qwen2_checkpoint, rows, tmp_path / "scores", url))
    assert rows_in(tmp_path / "scores.parts") == 0


def test_a_row_that_only_fails_ends_the_run_and_is_named(
    tmp_path: Path, qwen2_checkpoint: Path, completions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.001, 0.001))
    poison: list[int] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        poison[:] = poison or body["input_ids"]
        if body["input_ids"] == poison:
            return web.json_response({"error": {"message": "broken"}}, status=500)
        return web.json_response(reply(body))

    served = http_server(handler, {"context_length": 512}, healthy=True)
    with served as url, pytest.raises(InputError, match=r"row \d+ \('p\d+', sample \d\) was never scored"):
        score.run(config(qwen2_checkpoint, completions, tmp_path / "scores", url, concurrency=2))
    assert rows_in(tmp_path / "scores.parts") > 0


def reply(body: dict[str, Any]) -> dict[str, Any]:
    """A good answer to a request for scores, in SGLang's shape."""
    ids, top = body["input_ids"][body["logprob_start_len"] :], body["top_logprobs_num"]
    meta = {
        "finish_reason": {"type": "length", "length": 0},
        "completion_tokens": 0,
        "input_token_logprobs": [[None if n == 0 else -1.0, i, None] for n, i in enumerate(ids)],
        "input_top_logprobs": [None, *([[-0.5 * k - 1.5, k, None] for k in range(top)] for _ in ids[1:])],
    }
    return {"text": "", "output_ids": [], "meta_info": meta | ({"id": body["rid"]} if "rid" in body else {})}


BODY = {"input_ids": [7, 8, 9, 10], "logprob_start_len": 1, "top_logprobs_num": 3}


def changed(**meta: Any) -> dict[str, Any]:
    answer = reply(BODY)
    answer["meta_info"] |= meta
    return answer


def top(*place: Any) -> dict[str, Any]:
    return changed(input_top_logprobs=[None, list(place), list(place)])


def own(logprob: Any) -> dict[str, Any]:
    return changed(input_token_logprobs=[[None, 8, None], [-1.0, 9, None], [logprob, 10, None]])


A, B, C = [-0.5, 1, None], [-1.0, 2, None], [-1.5, 3, None]


def test_an_answer_is_read_as_it_stands() -> None:
    scores = read_scores(reply(BODY), [9, 10], 3, 320)
    assert scores.token_logprobs.tolist() == [-1.0, -1.0]
    assert scores.ids.tolist() == [[0, 1, 2]] * 2
    assert scores.logprobs.tolist() == [[-1.5, -2.0, -2.5]] * 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "without the log-probabilities"),
        ({"meta_info": []}, "without the log-probabilities"),
        (changed(input_top_logprobs=None), "without the log-probabilities"),
        (changed(input_top_logprobs=[None, 3, 4]), "without the log-probabilities"),
        (changed(finish_reason={"type": "abort"}), "ended the answer with 'abort'"),
        (changed(input_token_logprobs=[[None, 8, None], [-1.0, 9, None]]), "1 tokens that are not the 2"),
        (changed(input_token_logprobs=[[None, 8], [-1.0, 9], [-1.0, 11]]), "2 tokens that are not"),
        (own(None), "an impossible log-probability of the text's token 10: None"),
        (own(float("-inf")), "an impossible log-probability of the text's token 10: -inf"),
        (own(-1e300), r"token 10: -1e\+300"),
        (own(0.1), "an impossible log-probability of the text's token 10"),
        (own(True), "an impossible log-probability of the text's token 10"),
        (changed(input_top_logprobs=[None, [A, B, C]]), "without 3 log-probabilities at each"),
        (top(A, B, C), "probabilities that sum to more than 1: "),
        (top(A, B), "without 3 log-probabilities at each"),
        (top(A, B, [-2.0, 320, None]), "cannot be the likeliest of 320"),
        (top(A, B, [-2.0, -1, None]), "cannot be the likeliest"),
        (top(A, B, [-2.0, 2, None]), "cannot be the likeliest"),
        (top(A, B, [-2.0, "3", None]), "cannot be the likeliest"),
        (top(A, B, [-2.0, True, None]), "cannot be the likeliest"),
        (top(A, B, [None, 3, None]), "an impossible log-probability: "),
        (top(A, B, [float("nan"), 3, None]), "an impossible log-probability: "),
        (top([0.1, 1, None], B, C), "an impossible log-probability: "),
        (top(A, C, B), "not in falling order"),
    ],
)
def test_an_answer_that_cannot_be_is_asked_for_again(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(RetryableError, match=message):
        read_scores(answer, [9, 10], 3, 320)


# -- two tokenizers --------------------------------------------------------------------------------------------------


def student_of(checkpoint: Path, folder: Path, **changes: tuple[str, str]) -> Path:
    """A checkpoint whose files named in `changes` have one text in place of another."""
    shutil.copytree(checkpoint, folder)
    for name, (old, new) in changes.items():
        file = folder / f"{name}.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
    return folder


def test_scores_get_the_students_ids_and_its_end_of_turn(
    tmp_path: Path,
    url: str,
    scored: Path,
    qwen2_checkpoint: Path,
    completions: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The student ends turns with another token: the teacher's is taken for it, and its own is no longer scored."""
    student = student_of(qwen2_checkpoint, tmp_path / "student", tokenizer_config=("<|im_end|>", "<|endoftext|>"))
    out = tmp_path / "scores"
    score.run(config(qwen2_checkpoint, completions, out, url, student=str(student), top_k=K))
    assert "'<|im_end|>' of the scoring model is taken for '<|endoftext|>' of the student" in capsys.readouterr().out
    end, students_end = 2, 0
    chat = Chat.from_checkpoint(student, CHAT)
    documents = load_documents(completions, chat, 512)
    tokens = chat.tokenizer.library.get_vocab_size(with_added_tokens=True)  # the model has a few more rows
    score.run(config(qwen2_checkpoint, completions, tmp_path / "more", url, top_k=K + SPARE))
    found, teachers = TopLogprobs(out), TopLogprobs(tmp_path / "more")
    replaced = 0
    for i in range(ROWS):
        part = slice(*documents.offsets[i : i + 2])
        key = row(i).id, row(i).sample
        assert found[key].token_ids_T.tolist() == documents.input_ids[part][documents.supervised[part]].tolist()
        assert found[key].token_ids_T[-1] == students_end
        assert teachers[key].token_ids_T[-1] == end
        for t, (ids, logprobs) in enumerate(zip(teachers[key].top_ids_TK, teachers[key].top_logprobs_TK, strict=True)):
            kept = np.flatnonzero((ids < tokens) & (ids != students_end))[:K]
            replaced += kept[-1] >= K
            assert found[key].top_ids_TK[t].tolist() == np.where(ids == end, students_end, ids)[kept].tolist()
            assert found[key].top_logprobs_TK[t].tolist() == logprobs[kept].tolist()
    assert replaced > 0


def test_a_text_that_is_cut_differently_is_refused_by_row_position_and_tokens(
    tmp_path: Path, qwen2_checkpoint: Path, completions: Path
) -> None:
    merges = json.loads((qwen2_checkpoint / "tokenizer.json").read_text())["model"]["merges"]
    student = tmp_path / "student"
    shutil.copytree(qwen2_checkpoint, student)
    content = json.loads((student / "tokenizer.json").read_text())
    content["model"]["merges"] = [merge for merge in merges if "".join(merge) not in ("so", "Ġso", "Ġwe")]
    (student / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"completions\.jsonl:1: token \d+ of the answer is '.+' \(id \d+\) to the"
    ) as e:
        score.run(config(qwen2_checkpoint, completions, tmp_path / "scores", NOBODY, student=str(student)))
    assert "to the student" in str(e.value)


def test_what_is_left_of_k_is_absent(tmp_path: Path, qwen2_checkpoint: Path, completions: Path) -> None:
    chat = Chat.from_checkpoint(qwen2_checkpoint, CHAT)
    rows, agreement = load_rows(str(completions), chat, chat)
    lacked = [i for i in range(chat.vocab_size) if agreement.to_student(np.array([i], np.int32)) == ABSENT]
    assert len(lacked) == agreement.unknown == chat.vocab_size - len(chat.tokenizer.library.get_vocab())
    assert agreement.sha256 != load_rows(str(completions), chat, None)[1].sha256  # which other scores would be for
    api = ScoringApi(rows, agreement, 3, chat.vocab_size, "m", qwen2_checkpoint, 1.0)
    given = Scores(
        np.array([-9.3]), np.array([[lacked[0], 7, lacked[1], 8]], np.int32), np.array([[-0.1, -3.0, -4.0, -5.0]])
    )
    text = encode_scores(api.known_to_student(given))
    own, ids, logprobs = decode_scores(text, 1, 3)
    assert own.tolist() == [np.float32(-9.3)]
    assert ids.tolist() == [[7, 8, ABSENT]]
    assert logprobs.tolist() == [[-3.0, -5.0, -np.inf]]
