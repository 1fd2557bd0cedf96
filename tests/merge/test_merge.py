"""Merging from checkpoint to checkpoint: what comes out, whatever the inputs' files, types and vocabularies; killed."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.merge_reference import mask, merged
from micota_fast.config.merge import MergeConfig
from micota_fast.errors import InputError
from micota_fast.merge import tensor_merge
from micota_fast.merge.merge import merge, merge_plans
from micota_fast.merge.mergekit import MergePlan, read_mergekit
from micota_fast.merge.methods import mask_key
from micota_fast.merge.settings import depth_of
from micota_fast.merge.tensor_merge import TensorMerge

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LEFT = ".out.0123456789abcdef.partial"  # what a killed merge has left
NAME = "model.layers.1.mlp.up_proj.weight"


def merge_plan(plan: MergePlan, out: Path, **options: Any) -> None:
    merge_plans({"": plan}, out, **({"seed": 0} | options))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `a` and `b`: checkpoints of one shape, other weights."""
    from helpers.checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        make_checkpoint(folder / name, seed=seed)
    return folder


def mergekit_file(folder: Path, **changes: Any) -> Path:
    content = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.5}},
            {"model": "b", "parameters": {"weight": 0.4, "density": 0.5}},
        ],
    } | changes
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def reshard(source: Path, target: Path, files: int) -> None:
    """The same checkpoint in more files, tensors dealt out by name."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    weight_map = {name: f"part{i % files}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> None:
    """Change a checkpoint's tensors in place, and keys of its config.json."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def resize(folder: Path, rows: int) -> None:
    """As padded or cut to so many rows of the embedding; new ones are 9."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in {EMBEDDING, HEAD} & tensors.keys():
            old = tensors[name]
            tensors[name] = torch.full((rows, old.shape[1]), 9.0, dtype=old.dtype)
            tensors[name][: min(rows, len(old))] = old[:rows]

    rewrite(folder, change, vocab_size=rows)


def swap_tokens(path: Path) -> None:
    """Give two tokens of a tokenizer.json each other's id."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda token: vocabulary[token])[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


class TestResult:
    @pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
    def test_every_tensor_is_what_the_method_says(self, checkpoints: Path, tmp_path: Path, method: str) -> None:
        sparse = method in ("ties", "dare_linear", "dare_ties")
        models: list[Any] = [
            {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.6}]}},
            {"model": "b", "parameters": {"weight": 0.4}},
        ]
        changes: dict[str, Any] = {"merge_method": method, "models": models, "parameters": {"density": 0.5}}
        if not sparse:
            changes["parameters"] = {"weight": 0.5} if method == "linear" else {}
        if method == "slerp":
            changes |= {"models": [{"model": "a"}], "parameters": {"t": [0.3, 0.9]}}
        path = mergekit_file(checkpoints, **changes)
        merge(MergeConfig(config=str(path), out=str(tmp_path / "out"), seed=3))
        base, a, b, out = (tensors_of(d) for d in (*(checkpoints / n for n in ("base", "a", "b")), tmp_path / "out"))
        assert out.keys() == base.keys()
        for name, tensor in out.items():
            depth = depth_of(name, 2)
            weights = [0.2 + 0.6 * depth if "mlp" in name else 0.6, 0.4]
            tensors = [a[name], b[name]]
            if method == "linear":
                tensors, weights = [*tensors, base[name]], [*weights, 0.5]
            if method == "slerp":
                tensors, weights = tensors[:1], [0.3 + 0.6 * depth]
            wanted = merged(
                method,
                base[name],
                tensors,
                weights,
                [0.5, 0.5],
                normalize=method in ("linear", "ties"),
                rescale="l1" if method.startswith("dare") else "none",
                masks=[mask(mask_key(3, name, i), tensor.numel(), 0.5).view_as(tensor) for i in range(2)],
            )
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-6)
            assert not torch.equal(tensor, base[name]), name

    def test_opens_in_transformers_and_keeps_the_tokenizer(self, checkpoints: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from micota_fast.model.safetensors_io import load_model

        merge(MergeConfig(config=str(mergekit_file(checkpoints, out_dtype="bfloat16")), out=str(tmp_path / "out")))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert model.dtype == torch.bfloat16
        ours = dict(load_model(tmp_path / "out").named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, ours[name]), name
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
        for name in ("tokenizer.json", "generation_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (checkpoints / "base" / name).read_bytes()

    @pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
    def test_the_config_names_one_type_under_both_keys(
        self, checkpoints: Path, tmp_path: Path, out_dtype: str | None
    ) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        config = json.loads((models / "base" / "config.json").read_text())
        # As our own trainer writes it, for transformers 4 and 5.
        changed = config | {"dtype": "float16", "torch_dtype": "float16"}
        (models / "base" / "config.json").write_text(json.dumps(changed))
        merge_plan(read_mergekit(mergekit_file(models, out_dtype=out_dtype)), tmp_path / "out")
        merged = json.loads((tmp_path / "out" / "config.json").read_text())
        (stored,) = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()}
        assert (
            merged["dtype"] == merged["torch_dtype"] == (out_dtype or "float32") == str(stored).removeprefix("torch.")
        )
        assert merged["rope_theta"] == config["rope_parameters"]["rope_theta"], "written by ModelConfig.to_dict"

    def test_equal_bytes_however_the_inputs_are_sharded(self, checkpoints: Path, tmp_path: Path) -> None:
        plan = read_mergekit(mergekit_file(checkpoints))
        merge_plan(plan, tmp_path / "one")
        for name, files in (("base", 3), ("a", 2), ("b", 5)):
            reshard(checkpoints / name, tmp_path / "sharded" / name, files)
        sharded = read_mergekit(mergekit_file(tmp_path / "sharded"))
        merge_plan(sharded, tmp_path / "two")
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        merge_plan(plan, tmp_path / "other", seed=1)
        assert contents(tmp_path / "one")["model.safetensors"] != contents(tmp_path / "other")["model.safetensors"]

    def test_equal_bytes_whatever_the_number_of_threads(
        self, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tensor_merge, "CHUNK", 512)
        for method in ("ties", "dare_ties"):
            plan = read_mergekit(mergekit_file(checkpoints, merge_method=method, parameters={"rescale": True}))
            for threads in (1, 7):
                monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
                merge_plan(plan, tmp_path / f"{method}-{threads}")
            assert contents(tmp_path / f"{method}-1") == contents(tmp_path / f"{method}-7")

    def test_output_shards_hold_the_same_tensors(self, checkpoints: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        plan = read_mergekit(mergekit_file(checkpoints))
        merge_plan(plan, tmp_path / "whole")
        merge_plan(plan, tmp_path / "shards", max_shard_bytes=60_000)
        index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
        whole = load_file(tmp_path / "whole" / "model.safetensors")
        assert len(set(index["weight_map"].values())) > 2
        assert index["weight_map"].keys() == whole.keys()
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "shards" / file, framework="pt") as shard:
                assert torch.equal(shard.get_tensor(name), whole[name])
        for file in set(index["weight_map"].values()):
            tensors = load_file(tmp_path / "shards" / file)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 60_000
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
        assert all(torch.equal(p, whole[n]) for n, p in model.named_parameters())

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
    def test_halves_in_float32_arithmetic(self, checkpoints: Path, tmp_path: Path, stored: torch.dtype) -> None:
        for name in ("base", "a", "b"):
            shutil.copytree(checkpoints / name, tmp_path / name)
            rewrite(tmp_path / name, lambda tensors: tensors.update({n: t.to(stored) for n, t in tensors.items()}))
        models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")]
        plan = read_mergekit(mergekit_file(tmp_path, merge_method="linear", base_model=None, models=models))
        merge_plan(plan, tmp_path / "out")
        a, b, out = (tensors_of(tmp_path / name) for name in ("a", "b", "out"))
        for name, tensor in out.items():
            assert tensor.dtype == stored
            assert torch.equal(tensor, ((a[name].float() + b[name].float()) / 2).to(stored))

    def test_inputs_of_several_types_give_one_that_holds_them_all(self, checkpoints: Path, tmp_path: Path) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        for name, dtype in (("base", torch.bfloat16), ("a", torch.float16)):
            rewrite(models / name, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))  # noqa: B023
        path = mergekit_file(models, models=[{"model": "a", "parameters": {"weight": 0.5}}])
        merge_plan(read_mergekit(path), tmp_path / "out")
        base, a, out = (tensors_of(d) for d in (models / "base", models / "a", tmp_path / "out"))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
        for name, tensor in out.items():
            start = base[name].float()
            assert torch.equal(tensor, start + (a[name].float() - start) * torch.tensor(0.5))

    def test_a_file_whose_data_is_not_aligned(self, checkpoints: Path, tmp_path: Path) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        file = models / "a" / "model.safetensors"
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        file.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
        merge_plan(read_mergekit(mergekit_file(checkpoints)), tmp_path / "one")
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "two")
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def test_the_report_names_what_went_in(self, checkpoints: Path, tmp_path: Path) -> None:
        merge_plan(read_mergekit(mergekit_file(checkpoints)), tmp_path / "out", seed=5)
        report = json.loads((tmp_path / "out" / "merge.json").read_text())
        assert report["seed"] == 5
        assert [(i["model"], i["weight"], i["density"]) for i in report["plan"]["inputs"]] == [
            ("a", 0.6, 0.5),
            ("b", 0.4, 0.5),
        ]
        prints = {report["base_fingerprint"], *(i["fingerprint"] for i in report["plan"]["inputs"])}
        assert len(prints) == 3
        assert str(tmp_path) not in json.dumps(report)
        models = shutil.copytree(checkpoints, tmp_path / "models")

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[NAME][0, 0] += 0.01

        rewrite(models / "b", change)
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "changed", seed=5)
        changed = json.loads((tmp_path / "changed" / "merge.json").read_text())
        one, other = ([i["fingerprint"] for i in r["plan"]["inputs"]] for r in (report, changed))
        assert (one[0] == other[0], one[1] == other[1]) == (True, False)

    def test_a_filter_that_fits_nothing_is_told(
        self, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weight = [{"filter": "q_porj", "value": 0.1}, {"filter": "q_proj", "value": 0.2}, {"value": 0.3}]
        path = mergekit_file(checkpoints, models=[{"model": "a", "parameters": {"weight": weight}}])
        merge_plan(read_mergekit(path), tmp_path / "out")
        assert capsys.readouterr().err == "merge: the filter 'q_porj' fits no tensor's name\n"


class TestVocabularies:
    """The tokenizer of these checkpoints uses ids up to VOCAB_SIZE - 1 = 319 at most."""

    @pytest.fixture
    def models(self, checkpoints: Path, tmp_path: Path) -> Path:
        return shutil.copytree(checkpoints, tmp_path / "models")

    @pytest.mark.parametrize("method", ["linear", "slerp", "dare_ties", "ties"])
    @pytest.mark.parametrize("rows", [(330, 352, 320), (320, 352, 330), (352, 320, 330)])
    def test_of_different_sizes(self, models: Path, tmp_path: Path, rows: tuple[int, ...], method: str) -> None:
        changes: dict[str, Any] = {"merge_method": method}
        if method == "linear":
            changes["models"] = [{"model": m, "parameters": {"weight": 0.5}} for m in ("a", "base", "b")]
        if method == "slerp":
            changes |= {"models": [{"model": "a"}], "parameters": {"t": 0.5}}
        merge_plan(read_mergekit(mergekit_file(models, **changes)), tmp_path / "same")
        for name, count in zip(("base", "a", "b"), rows, strict=True):
            resize(models / name, count)
        merge_plan(read_mergekit(mergekit_file(models, **changes)), tmp_path / "out")
        one, other = tensors_of(tmp_path / "same"), tensors_of(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows[0]
        common = min(rows) if method != "slerp" else min(rows[:2])
        embedding, base = other.pop(EMBEDDING), tensors_of(models / "base")[EMBEDDING]
        assert embedding.shape == base.shape
        assert torch.equal(embedding[common:], base[common:]), "padding is the base's"
        if common == 320:
            assert torch.equal(embedding[:320], one.pop(EMBEDDING))
        assert all(torch.equal(tensor, one[name]) for name, tensor in other.items())

    def test_padding_that_is_copied_is_part_of_the_fingerprint(self, models: Path, tmp_path: Path) -> None:
        resize(models / "base", 352)
        reports = []
        for value in (9.0, 8.0):
            rewrite(models / "base", lambda tensors: tensors[EMBEDDING][351].fill_(value))  # noqa: B023
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
            reports.append(json.loads((tmp_path / "out" / "merge.json").read_text()))
        assert reports[0]["base_fingerprint"] != reports[1]["base_fingerprint"]
        assert reports[0]["plan"] == reports[1]["plan"], "the others' are the same"

    def test_a_token_that_would_be_cut(self, models: Path, tmp_path: Path) -> None:
        from tokenizers import Tokenizer

        used = Tokenizer.from_file(str(models / "base" / "tokenizer.json")).get_vocab_size()
        resize(models / "b", used)
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        resize(models / "b", used - 1)
        with pytest.raises(InputError, match=rf"base: token .* has the id {used - 1}.*{used - 1} rows"):
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")

    def test_of_another_tokenizer(self, models: Path, tmp_path: Path) -> None:
        resize(models / "b", 352)
        path = models / "b" / "tokenizer.json"
        swap_tokens(path)
        with pytest.raises(InputError, match="not of one tokenizer: token"):
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        path.unlink()
        with pytest.raises(InputError, match=r"b/tokenizer\.json is missing"):
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")

    @pytest.mark.parametrize("key", [{"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}}])
    def test_a_file_that_names_a_tokenizer_wants_one_for_all(
        self, models: Path, tmp_path: Path, key: dict[str, Any]
    ) -> None:
        plan = read_mergekit(mergekit_file(models, **key))
        merge_plan(plan, tmp_path / "out")
        path = models / "b" / "tokenizer.json"
        swap_tokens(path)
        with pytest.raises(InputError, match="not of one tokenizer: token"):
            merge_plan(plan, tmp_path / "out")

    def test_swapped_tokens_are_warned_of(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """mergekit merges two embeddings of one size element by element, whatever their tokens are."""
        path = models / "b" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text())))  # other bytes, the same tokens
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        assert capsys.readouterr().err == ""
        swap_tokens(path)
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        warning = capsys.readouterr().err
        assert warning.startswith("merge: warning: ")
        assert warning.count("\n") == 1
        for part in (f"{models / 'b'} and {models / 'base'} are not of one tokenizer", "`tokenizer_source: base`"):
            assert part in warning
        path.unlink()
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        assert capsys.readouterr().err == ""

    def test_added_tokens_may_go_by_other_names(self, models: Path, tmp_path: Path) -> None:
        resize(models / "b", 352)
        path = models / "b" / "tokenizer.json"
        path.write_text(path.read_text().replace("<|im_start|>", "<|User|>"))
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")

    def test_tied_matrices_may_be_stored_twice(self, models: Path, tmp_path: Path) -> None:
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "one")
        rewrite(models / "a", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "two")
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        rewrite(models / "a", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].double()}))
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "two")
        assert contents(tmp_path / "one") == contents(tmp_path / "two"), "the same numbers in another dtype"
        rewrite(models / "a", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
        with pytest.raises(InputError, match=r"a/model.safetensors: tensor lm_head.weight differs"):
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "two")

    @pytest.mark.parametrize("untied", ["base", "b"])
    def test_one_model_with_a_head_of_its_own_gives_the_result_one(
        self, models: Path, tmp_path: Path, untied: str
    ) -> None:
        from micota_fast.model.safetensors_io import load_model

        head = {"tie_word_embeddings": False}
        rewrite(models / untied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * 2}), **head)
        plan = read_mergekit(mergekit_file(models, merge_method="task_arithmetic", models=PLAIN))
        merge_plan(plan, tmp_path / "out")
        out = tensors_of(tmp_path / "out")
        heads = [(2 if name == untied else 1) * tensors_of(models / name)[EMBEDDING] for name in ("base", "a", "b")]
        assert torch.equal(out[HEAD], merged("task_arithmetic", heads[0], heads[1:], [0.6, 0.4]))
        assert not load_model(tmp_path / "out").config.tie_word_embeddings


PLAIN = [{"model": "a", "parameters": {"weight": 0.6}}, {"model": "b", "parameters": {"weight": 0.4}}]


class TestSweep:
    def test_shares_the_reading_and_gives_the_same(
        self, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = [{"model": "a", "parameters": {"weight": 0.1, "density": 0.5}}]
        path, reads = mergekit_file(checkpoints, models=models), []
        passes = TensorMerge.passes
        monkeypatch.setattr(TensorMerge, "passes", lambda tensor: (reads.append(tensor.name), passes(tensor))[1])
        merge(MergeConfig(config=str(path), out=str(tmp_path / "one"), seed=2))
        once = len(reads)
        reads.clear()
        merge(MergeConfig(config=str(path), out=str(tmp_path / "sweep"), seed=2, weights=[0.1, 0.5, 1]))
        assert len(reads) == once
        assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["weight-0.1", "weight-0.5", "weight-1"]
        assert contents(tmp_path / "sweep" / "weight-0.1") == contents(tmp_path / "one")
        models[0]["parameters"]["weight"] = 0.5  # type: ignore[index]
        path = mergekit_file(checkpoints, models=models)
        merge(MergeConfig(config=str(path), out=str(tmp_path / "other"), seed=2))
        assert contents(tmp_path / "sweep" / "weight-0.5") == contents(tmp_path / "other")

    def test_from_the_command_line_and_again(self, checkpoints: Path, tmp_path: Path) -> None:
        from micota_fast.cli import main

        path = mergekit_file(checkpoints, merge_method="slerp", models=[{"model": "a"}], parameters={"t": 0.5})
        out = tmp_path / "out"
        assert main(["merge", str(path), str(out), "--weights", "0.25", "0.75"]) == 0
        assert main(["merge", str(path), str(out), "--weights", "0.5"]) == 0
        assert [path.name for path in out.iterdir()] == ["weight-0.5"]
        assert json.loads((out / "weight-0.5" / "merge.json").read_text())["plan"]["inputs"][0]["weight"] == 0.5
        (out / "notes.txt").write_text("keep")
        assert main(["merge", str(path), str(out), "--weights", "0.5"]) == 2
        assert main(["merge", str(path), str(tmp_path / "twice"), "--weights", "0.5", "0.50"]) == 2
        assert main(["merge", str(path), str(tmp_path / "near"), "--weights", "0.1234567", "0.1234568"]) == 0
        assert len(list((tmp_path / "near").iterdir())) == 2
        assert not (tmp_path / "twice").exists()


# A merge that is killed so many seconds after an operation on files.
DYING = """
import sys
from helpers import moments
from micota_fast.cli import main
moment, seconds, config, out = sys.argv[1:]
kill = moments.die if float(seconds) == 0 else lambda: moments.die_in(float(seconds))
moments.at_file(None, moment, kill, my_rank=0)
main(["merge", config, out])
"""


class TestWholeOrNotAtAll:
    def test_everything_is_on_the_disk_before_the_merge_appears(
        self, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fsync, synced = os.fsync, []

        def note(fd: int) -> None:
            synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, (tmp_path / "out").exists()))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", note)
        merge_plan(read_mergekit(mergekit_file(checkpoints)), tmp_path / "out", max_shard_bytes=60_000)
        files = {path.name for path in (tmp_path / "out").iterdir()}
        hidden = {name for name, visible in synced if not visible and not name.endswith(".tmp")}
        assert hidden >= files
        assert [bool(re.fullmatch(r"\.out\.\w+\.partial", name)) for name in hidden - files] == [True]
        assert synced[-1] == (tmp_path.name, True)

    def test_killed_at_any_time(self, checkpoints: Path, tmp_path: Path) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        for name in ("base", "a", "b"):
            generator = torch.Generator().manual_seed(len(name))
            big = torch.randn((8_000_000 // 64, 64), generator=generator).to(torch.bfloat16)
            rewrite(models / name, lambda tensors: tensors.update({EMBEDDING: big}), vocab_size=len(big))  # noqa: B023
        config = mergekit_file(models, dtype="bfloat16")
        out, partial = tmp_path / "out", ".out.*.partial"
        command = [sys.executable, "-m", "micota_fast", "merge", str(config), str(out)]
        merge(MergeConfig(config=str(config), out=str(tmp_path / "whole")))
        whole = contents(tmp_path / "whole")
        chance, cut = random.Random(0), 0
        # A while after it has opened the weights, and right before they appear: that is never too late.
        for moment, delay_s in (
            (r"open .*partial/model\.safetensors ", 0.05),
            (r"os\.rename .*\.out\.\w+\.partial ", 0.0),
        ):
            for _ in range(2):
                shutil.rmtree(out, ignore_errors=True)
                dying = [sys.executable, "-c", DYING, moment, str(chance.uniform(0, delay_s)), str(config), str(out)]
                killed = subprocess.run(dying, check=False)
                if out.exists():
                    assert contents(out) == whole
                else:
                    cut += 1
                    assert killed.returncode == -signal.SIGKILL
        assert cut >= 2
        subprocess.run(command, check=True)
        assert contents(out) == whole
        assert not list(tmp_path.glob(partial))

    def test_a_former_merge_is_replaced_but_nothing_else(self, checkpoints: Path, tmp_path: Path) -> None:
        plan = read_mergekit(mergekit_file(checkpoints))
        out = tmp_path / "out"
        merge_plan(plan, out)
        first = contents(out)
        (tmp_path / LEFT).mkdir()  # as a killed merge leaves it
        (tmp_path / LEFT / "model.safetensors").write_bytes(b"torn")
        merge_plan(plan, out, seed=1)
        assert contents(out).keys() == first.keys()
        assert contents(out) != first
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        with pytest.raises(InputError, match="mine is not of a former merge"):
            merge_plan(plan, tmp_path / "mine")
        assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
        with pytest.raises(InputError, match="is not of a former merge"):
            merge_plan(plan, tmp_path)  # holds a merge, but is none
        with pytest.raises(InputError, match="cannot write"):
            merge_plan(plan, tmp_path / "mine" / "notes.txt" / "out")

    @pytest.mark.parametrize("place", ["/", "..", "."])
    def test_places_without_a_name(
        self, checkpoints: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(shutil.copytree(checkpoints, tmp_path / "models"))
        with pytest.raises(InputError, match="place"):
            merge_plan(read_mergekit(mergekit_file(Path())), Path(place))

    def test_what_was_put_beside_a_former_merge_is_not_deleted_with_it(self, checkpoints: Path, tmp_path: Path) -> None:
        plan, out = read_mergekit(mergekit_file(checkpoints)), tmp_path / "out"
        merge_plan(plan, out)
        before = contents(out)
        (out / "scores").mkdir()
        with pytest.raises(InputError, match=r"out/scores is not of a former merge"):
            merge_plan(plan, out, seed=1)
        (out / "scores").rmdir()
        assert contents(out) == before
        merge_plan(plan, out, max_shard_bytes=60_000)
        merge_plan(plan, out)  # shards are of a former merge, too
        assert contents(out) == before

    def test_one_merge_at_a_time(self, checkpoints: Path, tmp_path: Path) -> None:
        plan, out, lock = read_mergekit(mergekit_file(checkpoints)), tmp_path / "out", tmp_path / ".out.lock"
        (tmp_path / LEFT).mkdir()
        with lock.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(InputError, match=r"another merge holds .*out\.lock"):
                merge_plan(plan, out)
            assert (tmp_path / LEFT).exists(), "it is the other's"
        assert lock.exists()  # as a killed merge leaves it, held by nobody
        merge_plan(plan, out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_former_merge_comes_back_when_the_new_one_fails(
        self, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan, out = read_mergekit(mergekit_file(checkpoints)), tmp_path / "out"
        merge_plan(plan, out)
        before = contents(out)

        def fail(aside: Path, out: Path) -> None:
            raise OSError(16, os.strerror(16))

        monkeypatch.setattr("micota_fast.common.files.publish", fail)
        with pytest.raises(InputError, match="cannot write"):
            merge_plan(plan, out, seed=1)
        assert contents(out) == before
        out.rename(tmp_path / ".out.former")  # killed between the two renames
        with pytest.raises(InputError, match="cannot write"):
            merge_plan(plan, out, seed=1)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert contents(out) == before

    def test_a_limit_on_the_size_of_files(self, checkpoints: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        config = mergekit_file(checkpoints)
        merge(MergeConfig(config=str(config), out=str(out)))
        before = contents(out)
        micota = f"'{sys.executable}' -m micota_fast merge {config} {out} --seed 1"
        done = subprocess.run(["sh", "-c", f"ulimit -f 50; exec {micota}"], capture_output=True, text=True)
        assert done.returncode == 2
        assert f"cannot write {out}: File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert contents(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_full_disk(self, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(fd: int, offset: int, size: int) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(InputError, match=r"cannot write .*out: No space left"):
            merge_plan(read_mergekit(mergekit_file(checkpoints)), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("change", ["random", "the same everywhere"])
    def test_memory_is_bounded_by_blocks(self, checkpoints: Path, tmp_path: Path, change: str) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        for name in ("base", "a"):
            big = torch.full((500_000, 64), float(name == "a"), dtype=torch.bfloat16)  # 64 MB; 128 in float32
            if change == "random":
                big.normal_()
            rewrite(models / name, lambda tensors: tensors.update({EMBEDDING: big}), vocab_size=len(big))  # noqa: B023
        config = mergekit_file(models, merge_method="ties", models=[{"model": "a", "parameters": {"weight": 1}}])
        config.write_text(config.read_text() + "parameters: {density: 0.3}\n")
        with subprocess.Popen([sys.executable, "-m", "micota_fast", "merge", str(config), str(tmp_path / "out")]) as p:
            own = 0
            while p.poll() is None:
                try:
                    status = Path(f"/proc/{p.pid}/status").read_text()
                    own = max(
                        own, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
                    )
                except (OSError, TypeError):
                    pass
                time.sleep(0.002)
        assert p.returncode == 0
        assert 10_000 < own < 160_000, "kB"


class TestDamage:
    def broken(self, checkpoints: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> MergePlan:
        shutil.copytree(checkpoints, folder)
        rewrite(folder / "b", change)
        return read_mergekit(mergekit_file(folder))

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("nan", "holds NaN"),
            ("inf", "holds infinity"),
            ("gone", "is missing"),
            ("cut", "shape"),
            ("int", "type I32"),
            ("more", "extra.weight is missing"),
        ],
    )
    def test_a_bad_tensor_is_named_with_its_file(
        self, checkpoints: Path, tmp_path: Path, value: str, said: str
    ) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            if value in ("nan", "inf"):
                tensors[NAME][3, 4] = float(value)
            elif value == "gone":
                del tensors[NAME]
            elif value == "cut":
                tensors[NAME] = tensors[NAME][:-1].clone()
            elif value == "int":
                tensors[NAME] = tensors[NAME].to(torch.int32)
            else:
                tensors["extra.weight"] = torch.ones(2)

        plan = self.broken(checkpoints, tmp_path / "models", change)
        with pytest.raises(InputError) as error:
            merge_plan(plan, tmp_path / "out")
        assert said in str(error.value)
        assert str(tmp_path / "models" / ("base" if value == "more" else "b")) in str(error.value)
        assert "extra.weight" in str(error.value) if value == "more" else NAME in str(error.value)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out.*"))

    @pytest.mark.parametrize("tied", [True, False])
    def test_what_no_model_has_is_missing_all_the_same(self, checkpoints: Path, tmp_path: Path, tied: bool) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        gone = EMBEDDING if tied else HEAD
        for name in ("base", "a", "b"):
            rewrite(
                models / name,
                lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)} if tied else {}),
                tie_word_embeddings=tied,
            )
        with pytest.raises(InputError, match=rf"models/base: tensor {gone} is missing"):
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_tensors_and_files_that_hold_nothing(self, checkpoints: Path, tmp_path: Path) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        for name in ("base", "a", "b"):
            rewrite(models / name, lambda tensors: tensors.update({NAME: torch.ones(0, 4)}))
        with pytest.raises(InputError, match=rf"base/model\.safetensors: tensor {NAME} has no elements"):
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        for name in ("base", "a", "b"):
            rewrite(models / name, lambda tensors: tensors.clear())
        with pytest.raises(InputError, match=f"tensor {EMBEDDING} is missing"):
            merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")

    def test_not_a_number_in_tied_matrices_that_are_stored_twice(self, checkpoints: Path, tmp_path: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[EMBEDDING][1, 2] = float("nan")
            tensors[HEAD] = tensors[EMBEDDING].clone()

        plan = self.broken(checkpoints, tmp_path / "models", change)
        with pytest.raises(InputError, match=rf"b/model\.safetensors: tensor {EMBEDDING} holds NaN"):
            merge_plan(plan, tmp_path / "out")

    def test_a_truncated_file_is_named(self, checkpoints: Path, tmp_path: Path) -> None:
        plan = self.broken(checkpoints, tmp_path / "models", lambda tensors: None)
        file = tmp_path / "models" / "b" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"b/model\.safetensors: damaged.*within tensor"):
            merge_plan(plan, tmp_path / "out")

    def test_an_input_that_cannot_be_read_is_not_called_an_output(self, checkpoints: Path, tmp_path: Path) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        path = models / "base" / "generation_config.json"
        plan = read_mergekit(mergekit_file(models))
        path.unlink()
        path.symlink_to("/proc/self/mem")  # a file whose first page nobody can read
        with pytest.raises(InputError, match=rf"{path}: cannot be read"):
            merge_plan(plan, tmp_path / "out")

    def test_other_architectures(self, checkpoints: Path, llama_checkpoint: Path, tmp_path: Path) -> None:
        models = [{"model": str(llama_checkpoint), "parameters": {"weight": 1}}]
        with pytest.raises(InputError, match=r"is a LlamaForCausalLM, but .*base a Qwen2ForCausalLM"):
            merge_plan(read_mergekit(mergekit_file(checkpoints, models=models)), tmp_path / "out")

    @pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("bfloat16", 3e38), ("float32", 3e38)])
    def test_overflow_is_an_error(self, checkpoints: Path, tmp_path: Path, dtype: Any, value: float) -> None:
        plan = self.broken(checkpoints, tmp_path / "models", lambda tensors: tensors[NAME].fill_(value))
        rewrite(tmp_path / "models" / "base", lambda tensors: tensors[NAME].fill_(-value))
        with pytest.raises(InputError, match=f"{NAME}: the result overflows {dtype}"):
            merge_plan(replace(plan, method="task_arithmetic", dtype=dtype), tmp_path / "out")

    def test_buffers_that_the_config_determines_are_left_out(self, checkpoints: Path, tmp_path: Path) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        rewrite(models / "a", lambda tensors: tensors.update({name: torch.ones(8)}))
        merge_plan(read_mergekit(mergekit_file(models)), tmp_path / "out")
        assert name not in tensors_of(tmp_path / "out")
