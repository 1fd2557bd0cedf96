"""What is generated with `top_logprobs` is trained on as it stands, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from helpers.servers import http_server
from helpers.training_runs import train_config
from micota_fast.chat.encoding import Chat
from micota_fast.common.json_io import write_json
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.corpus import FilterConfig
from micota_fast.config.generation import ChatConfig, GenerateConfig
from micota_fast.config.train import SoftConfig
from micota_fast.corpus import filter as corpus_filter
from micota_fast.errors import InputError
from micota_fast.generation import generate
from micota_fast.train.loop import train

CHAT = ChatConfig(system=None, prompt="{problem}")
PROBLEMS = 12


def test_what_a_filter_leaves_is_trained_on_with_the_store_of_all(
    qwen2_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows are found by id and sample; the end of turn is scored, as the template ends a turn with it."""
    chat = Chat.from_checkpoint(qwen2_checkpoint, CHAT)
    texts = [f"{i} + {i} =" for i in range(PROBLEMS)]
    number = {tuple(chat.encode_prompt(text)): i for i, text in enumerate(texts)}
    answers = [f"so we get {2 * i} and the answer is \\boxed{{{2 * i + i % 2}}}." for i in range(PROBLEMS)]
    ends = [chat.end_of_turn_id, next(i for i in chat.eos_ids if i != chat.end_of_turn_id)]

    async def answer(http: web.Request) -> web.StreamResponse:
        i = number[tuple((await http.json())["input_ids"])]
        ids = [*chat.tokenizer.encode([answers[i]])[0].tolist(), ends[i == 0]]  # another end is not in training text
        meta = {
            "finish_reason": {"type": "stop", "matched": ids[-1]},
            "prompt_tokens": 9,
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "output_top_logprobs": [[[-0.5, t, None], [-1.5, (t + 1) % 320, None]] for t in ids],
        }
        return web.json_response({"text": answers[i], "output_ids": ids, "meta_info": meta})

    write_rows(tmp_path / "problems.jsonl", [Problem(f"p{i}", text, str(2 * i)) for i, text in enumerate(texts)])
    out = tmp_path / "corpus-of-all.jsonl"
    options: dict[str, Any] = {"model": str(qwen2_checkpoint), "problems": str(tmp_path / "problems.jsonl")}
    with http_server(answer) as url:
        generate.run(GenerateConfig(**options, out=str(out), url=url, chat=CHAT, top_logprobs=2, max_new_tokens=200))
    corpus_filter.run(FilterConfig(completions=str(out), out=str(tmp_path / "corpus.jsonl")))
    soft = {"soft": SoftConfig(), "top_logprobs": f"{out}.top_logprobs", "chat": CHAT, "max_steps": 1}
    config = train_config(qwen2_checkpoint, tmp_path, **soft)
    capfd.readouterr()
    train(config)
    said = capfd.readouterr().out
    kept = [len(chat.tokenizer.encode([text])[0]) + 1 for text in answers[::2]]
    assert f"data: {config.data}: {PROBLEMS // 2} documents" in said
    assert f"soft targets: {sum(kept) - 1:,} of {sum(kept):,} supervised tokens" in said
    line = (tmp_path / "corpus.jsonl").read_text()
    (tmp_path / "corpus.jsonl").write_text(line.replace("so we get 4 ", "so we got 4 "))
    with pytest.raises(InputError, match=r"corpus\.jsonl:2: \('p2', sample 0\) was scored in .* as another text"):
        train(config)


@pytest.mark.parametrize("left", ["store", "journal", "damaged"])
def test_a_store_of_other_answers_is_refused_before_any_is_asked_for(
    left: str, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "problems.jsonl", [Problem("p", "1 + 1 =", "2")])
    out = tmp_path / "out.jsonl"
    options: dict[str, Any] = {"model": str(qwen2_checkpoint), "problems": str(tmp_path / "problems.jsonl")}
    config = GenerateConfig(**options, out=str(out), url="http://127.0.0.1:9", chat=CHAT, top_logprobs=2)
    store = tmp_path / f"out.jsonl.top_logprobs{'.journal' * (left == 'journal')}"
    store.mkdir()
    if left == "damaged":
        fingerprint = generate.Generation(config.problems, config, out).fingerprint
        write_json(Path(f"{out}.meta.json"), {"fingerprint": fingerprint, "sha256": "0" * 64, "completions": 1})
        out.write_text("{}\n")
    with pytest.raises(InputError, match=rf"{store} belongs to another run: .* delete it to start over"):
        generate.run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "`top_logprobs` with `temperature` 0.7: .* set it to 0 or 1"),
        ({"stop": ["\n"]}, "`top_logprobs` with `stop`: "),
    ],
)
def test_options_under_which_scores_are_not_the_texts_are_refused(options: dict[str, Any], message: str) -> None:
    for top_logprobs in (0, 3):
        settings = {"model": "m", "problems": "p", "out": "o", "top_logprobs": top_logprobs, **options}
        if top_logprobs:
            with pytest.raises(InputError, match=message):
                GenerateConfig(**settings)
        else:
            GenerateConfig(**settings)
