"""An answer ends where the model ends its turn, whichever engine answers and whatever the checkpoint's files name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from helpers.servers import Server, http_server, sglang_config
from helpers.speaking import CHAT, END_OF_TEXT, END_OF_TURN, speaking_base
from micota_fast.chat.encoding import Chat
from micota_fast.chat.end_tokens import end_token_file
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.generation import GenerateConfig, ServeConfig
from micota_fast.generation import generate
from micota_fast.serve.serve import serving
from micota_fast.sources.completions import read_completions

PROBLEM, WORDS = "1 + 1 =", 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    return speaking_base(tmp_path_factory.mktemp("base"), PROBLEM, WORDS)


def answered(model: Path, folder: Path, url: str | None, **more: Any) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens of the answer to PROBLEM."""
    write_rows(folder / "problems.jsonl", [Problem("p", PROBLEM, "2")])
    request = GenerateConfig(
        model=str(model),
        problems=str(folder / "problems.jsonl"),
        out=str(folder / "out.jsonl"),
        url=url,
        chat=CHAT,
        max_new_tokens=60,
        **more,
    )
    generate.run(request)
    [row] = read_completions(request.out)
    sampling = json.loads(Path(f"{request.out}.meta.json").read_bytes())["fingerprint"]["sampling"]
    assert sampling == {"max_new_tokens": 60, "temperature": 0.0}  # as in runs made before they were sent
    return row.completion, row.finish_reason, row.completion_tokens


def text_of(model: Path, ids: list[int]) -> str:
    return Chat.from_checkpoint(model, CHAT).decode(ids)


def test_a_server_that_knows_only_what_the_files_name_is_told_the_rest(
    base: tuple[Path, list[int]], tmp_path: Path
) -> None:
    """As SGLang does, it stops at generation_config.json's tokens and at those of the request."""
    from transformers import AutoModelForCausalLM

    model, ids = base
    reference = AutoModelForCausalLM.from_pretrained(model)
    told: list[list[int]] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        params = body["sampling_params"]
        told.append(params.get("stop_token_ids", []))
        prompt = torch.tensor([body["input_ids"]])
        stops = [reference.generation_config.eos_token_id, *told[-1]]
        out = reference.generate(prompt, max_new_tokens=params["max_new_tokens"], do_sample=False, eos_token_id=stops)
        new = out[0, prompt.shape[1] :].tolist()
        reason = {"type": "stop", "matched": new[-1]} if new[-1] in stops else {"type": "length"}
        meta = {"finish_reason": reason, "completion_tokens": len(new), "prompt_tokens": prompt.shape[1]}
        return web.json_response({"text": text_of(model, new), "output_ids": new, "meta_info": meta})

    with http_server(handler) as url:
        assert answered(model, tmp_path, url) == (text_of(model, ids), "stop", WORDS + 1)
    assert told == [[END_OF_TEXT, END_OF_TURN]]


def test_the_embedded_engine_ends_at_the_same_place(base: tuple[Path, list[int]], tmp_path: Path) -> None:
    model, ids = base
    serve = ServeConfig(dtype="float64", device="cpu")
    assert answered(model, tmp_path, None, serve=serve) == (text_of(model, ids), "stop", WORDS + 1)


@pytest.mark.slow
def test_sglang_ends_at_the_same_place(
    base: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, ids = base
    with serving(model, sglang_config(), tmp_path / "server.log") as (url,):
        assert answered(model, tmp_path, url) == (text_of(model, ids), "stop", WORDS + 1)
        assert asked_plainly(url, model)[0] == "length"
    # As training and merging save it, it ends there also for whoever names no token.
    saved = Path(shutil.copytree(model, tmp_path / "saved"))
    for name, text in end_token_file(model, Chat.from_checkpoint(model, CHAT).eos_ids).items():
        (saved / name).write_text(text)
    with serving(saved, sglang_config(), tmp_path / "saved.log") as (url,):
        assert asked_plainly(url, saved) == ("stop", text_of(model, ids))


def asked_plainly(url: str, model: Path) -> tuple[str, str]:
    """Finish reason and text of a greedy answer to PROBLEM by a request that names no end."""
    prompt = Chat.from_checkpoint(model, CHAT).encode_prompt(PROBLEM)
    reply = Server(url).generate(input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": 60})
    return reply["meta_info"]["finish_reason"]["type"], reply["text"]
