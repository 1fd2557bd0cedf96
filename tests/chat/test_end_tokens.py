"""generation_config.json of what is trained and merged names every token that ends an answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

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


def test_files_that_name_all_ends_are_left_as_they_are(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    named = Chat.from_checkpoint(qwen2_checkpoint, CHAT).eos_ids
    assert end_token_file(qwen2_checkpoint, named) == {}
    folder = Path(shutil.copytree(qwen2_checkpoint, tmp_path / "copy"))
    (folder / "generation_config.json").unlink()
    assert end_token_file(folder, [2]) == {}  # which is config.json's
    made = json.loads(end_token_file(folder, named)["generation_config.json"])
    assert made == {"eos_token_id": list(named)}
    own = {"do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(own))
    made = json.loads(end_token_file(folder, [2])["generation_config.json"])
    assert made == own | {"eos_token_id": [2]}


def test_ends_of_several_models_are_joined_unless_the_id_is_another_token(
    qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(qwen2_checkpoint, tmp_path / "base"))
    name_ends(base)
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": None}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert shared_end_tokens([base]) == [END_OF_TEXT]
    assert shared_end_tokens([base, qwen2_checkpoint]) == [END_OF_TEXT, END_OF_TURN]
    tokenizer = (base / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>")
    (base / "tokenizer.json").write_text(tokenizer)
    assert shared_end_tokens([base, qwen2_checkpoint]) == [END_OF_TEXT]


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
