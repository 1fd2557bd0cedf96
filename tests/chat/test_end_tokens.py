"""generation_config.json of what is trained and merged names every token that ends an answer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from helpers.speaking import CHAT, END_OF_TEXT, END_OF_TURN, name_ends, speaking_base
from helpers.training_runs import train_config
from micota_fast.chat.encoding import Chat
from micota_fast.chat.end_tokens import end_token_file, shared_end_tokens
from micota_fast.cli import main
from micota_fast.common.records import Completion, write_rows
from micota_fast.train.loop import train

PROBLEM, WORDS = "1 + 1 =", 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    return speaking_base(tmp_path_factory.mktemp("base"), PROBLEM, WORDS)


def ends(folder: Path) -> object:
    return json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")


@pytest.fixture
def folder(qwen2_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose config.json names END_OF_TURN alone as its end."""
    return Path(shutil.copytree(qwen2_checkpoint, tmp_path / "folder"))


def without_template(source: Path, folder: Path) -> Path:
    """A copy that ends with END_OF_TEXT alone."""
    shutil.copytree(source, folder)
    name_ends(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def made(folder: Path, eos_ids: list[int]) -> Any:
    return json.loads(end_token_file(folder, eos_ids)["generation_config.json"])


def test_files_that_name_all_ends_are_left_as_they_are(folder: Path) -> None:
    assert end_token_file(folder, [END_OF_TURN, END_OF_TEXT]) == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert end_token_file(folder, [END_OF_TURN]) == {}
    (folder / "generation_config.json").unlink()
    assert end_token_file(folder, [END_OF_TURN]) == {}


@pytest.mark.parametrize("named", [{}, {"eos_token_id": None}, {"eos_token_id": 0}, {"eos_token_id": [0]}])
def test_what_else_generation_config_holds_stays_as_it_is(named: dict[str, Any], folder: Path) -> None:
    """Also what transformers loads and refuses to save: a temperature, and no sampling."""
    own = {"do_sample": False, "temperature": 0.6, "top_k": 20, "transformers_version": "4.51.0"}
    (folder / "generation_config.json").write_text(json.dumps(own | named))
    assert made(folder, [0, 2]) == own | {"eos_token_id": [0, 2]}


def test_a_checkpoint_without_generation_config_gets_what_transformers_would_take_from_its_config(folder: Path) -> None:
    from transformers import GenerationConfig

    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(end_token_file(folder, [2, 0])["generation_config.json"])
    read = GenerationConfig.from_pretrained(folder)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, [2, 0], 0)


def test_the_ends_of_several_models_are_joined(folder: Path, tmp_path: Path) -> None:
    base = without_template(folder, tmp_path / "base")
    assert shared_end_tokens([base]) == ([END_OF_TEXT], [])
    assert shared_end_tokens([folder, base]) == ([END_OF_TURN, END_OF_TEXT], [])
    told = f"{folder} ends an answer with '<|im_end|>', the id 2, too"
    assert shared_end_tokens([base, folder, folder]) == ([END_OF_TEXT, END_OF_TURN], [told])


def test_an_id_that_is_another_token_in_the_base_is_left_out(folder: Path, tmp_path: Path) -> None:
    base = without_template(folder, tmp_path / "base")
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>"))
    other = f"{folder} ends an answer with '<|im_end|>', the id 2, which {base} calls '<|other|>': left out"
    assert shared_end_tokens([base, folder]) == ([END_OF_TEXT], [other])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    new = tokenizer.token_to_id("<|end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": new}))
    added = f"{folder} ends an answer with '<|end|>', the id {new}, which {base} does not have: left out"
    assert shared_end_tokens([base, folder]) == ([END_OF_TEXT], [other, added])


def generated(folder: Path) -> list[int]:
    """What transformers makes of the folder alone."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([Chat.from_checkpoint(folder, CHAT).encode_prompt(PROBLEM)])
    out = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=60, do_sample=False)
    return list(out[0, ids.shape[1] :].tolist())


def test_a_base_model_trained_on_chats_stops_in_transformers(base: tuple[Path, list[int]], tmp_path: Path) -> None:
    model, ids = base
    assert len(generated(model)) == 60
    write_rows(
        tmp_path / "corpus.jsonl",
        [Completion(str(i), 0, f"{i} + 1?", "", f"It is {i + 1}.", "stop", 1, 1, None) for i in range(8)],
    )
    config = train_config(model, tmp_path, chat=CHAT, max_steps=1, lr=1e-9)
    assert train(config)
    assert ends(tmp_path / "out" / "model") == [END_OF_TEXT, END_OF_TURN]
    assert generated(tmp_path / "out" / "model") == ids


def test_a_merge_of_base_models_stops_in_transformers(base: tuple[Path, list[int]], tmp_path: Path) -> None:
    model, ids = base
    plan = {"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": 1.0}}]}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(plan))
    assert main(["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "merged")]) == 0
    assert ends(tmp_path / "merged") == [END_OF_TEXT, END_OF_TURN]
    assert generated(tmp_path / "merged") == ids


def test_a_tokenizer_that_cannot_be_read_does_not_stop_a_merge(
    base: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(base[0], tmp_path / "model"))
    (model / "tokenizer.json").write_text("{}")
    plan = {"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": 1.0}}]}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(plan))
    assert main(["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "merged")]) == 0
    assert "without further end tokens: " in capsys.readouterr().err
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == (
        model / "generation_config.json"
    ).read_bytes()


def test_a_merge_names_the_ends_of_all_models_and_says_so(
    base: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base ends with one token and has no template; the other model ends its turn with another."""
    plain = without_template(base[0], tmp_path / "plain")
    models = [{"model": str(base[0]), "parameters": {"weight": 0.5}}]
    plan = {"merge_method": "task_arithmetic", "base_model": str(plain), "models": models}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(plan))
    assert main(["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "merged"), "--weights", "0.5", "1"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"merge: {base[0]} ends an answer with '<|im_end|>', the id 2, too",
        "merge: generation_config.json names the end tokens 0, 2",
    ]
    for merged in ("weight-0.5", "weight-1"):
        assert ends(tmp_path / "merged" / merged) == [END_OF_TEXT, END_OF_TURN]
