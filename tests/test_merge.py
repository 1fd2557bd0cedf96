"""Merging: each method against arithmetic done by hand, the properties they share, and checkpoints in and out."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from micota_fast.errors import InputError
from micota_fast.merge.mergekit import MergeInput, MergePlan, read_mergekit
from micota_fast.merge.methods import Array, counter_mask, largest, merge_tensors
from micota_fast.merge.stream import merge, merge_plan
from micota_fast.recipe import MergeConfig

DELTA_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def plan_of(method: str, inputs: list[tuple[float, float]], **changes: Any) -> MergePlan:
    entries = tuple(MergeInput(f"m{i}", weight, density) for i, (weight, density) in enumerate(inputs))
    defaults: dict[str, Any] = {"normalize": False, "rescale": None, "lambda_": 1.0, "dtype": None}
    return MergePlan(method=method, base="base", inputs=entries, **(defaults | changes))  # type: ignore[arg-type]


def keep_of(*masks: list[int]) -> Callable[[int, int, float], Any]:
    return lambda index, size, density: np.array(masks[index], dtype=bool)


def f32(*values: float) -> Array:
    return np.array(values, dtype=np.float32)


# multiples of 1/64: float32 sums and halves of them are exact, so equality can be asked for exactly
ELEMENTS = st.integers(-512, 512).map(lambda n: n / 64)
tensors_st = hnp.arrays(np.float32, st.integers(1, 40), elements=ELEMENTS)


@st.composite
def models_st(draw: Any, count: int = 3) -> list[Array]:
    size = draw(st.integers(1, 40))
    array = hnp.arrays(np.float32, size, elements=ELEMENTS)
    return [draw(array) for _ in range(count)]


class TestArithmetic:
    BASE = f32(1, 1, 1, 1)

    def test_linear_normalizes_by_the_weights(self) -> None:
        plan = plan_of("linear", [(3, 1), (1, 1)], normalize=True)
        result = merge_tensors(plan, self.BASE, [f32(0, 4, 8, -4), f32(4, 0, 0, 4)], keep_of())
        assert result.tolist() == [1, 3, 6, -2]

    def test_task_arithmetic_adds_weighted_task_vectors_times_lambda(self) -> None:
        plan = plan_of("task_arithmetic", [(0.5, 1), (2, 1)], lambda_=3.0)
        result = merge_tensors(plan, self.BASE, [f32(3, 1, 1, 1), f32(1, 2, 1, 0)], keep_of())
        assert result.tolist() == [1 + 3 * 1, 1 + 3 * 2, 1, 1 - 3 * 2]

    def test_ties_trims_elects_a_sign_and_averages_who_agrees(self) -> None:
        # task vectors: (4, -3, 1, 0) and (2, 6, -1, 5); the two largest of each: (4, -3, 0, 0) and (0, 6, 0, 5)
        plan = plan_of("ties", [(1, 0.5), (1, 0.5)], normalize=True)
        result = merge_tensors(plan, self.BASE, [self.BASE + f32(4, -3, 1, 0), self.BASE + f32(2, 6, -1, 5)], keep_of())
        assert result.tolist() == [5, 7, 1, 6]

    def test_sign_consensus_weighs_and_a_tie_goes_to_plus(self) -> None:
        # weighted task vectors: (2, -2) and (-1, 2): sums 1 and 0, so plus in both places
        plan = plan_of("dare_ties", [(1, 1), (0.5, 1)])
        result = merge_tensors(plan, f32(0, 0), [f32(2, -2), f32(-2, 4)], keep_of())
        assert result.tolist() == [2, 2]

    def test_dare_masks_then_rescales_then_weighs(self) -> None:
        tensors = [self.BASE + f32(1, 2, 3, 4)]
        for rescale, factor in ((None, 1.0), ("density", 2.0), ("l1", 10 / 5)):
            plan = plan_of("dare_linear", [(0.5, 0.5)], rescale=rescale)
            result = merge_tensors(plan, self.BASE, tensors, keep_of([1, 0, 0, 1]))
            assert result == pytest.approx(self.BASE + 0.5 * factor * f32(1, 0, 0, 4)), rescale
        plan = plan_of("dare_linear", [(0.5, 0.25)], rescale="density")
        result = merge_tensors(plan, self.BASE, tensors, keep_of([0, 0, 1, 0]))
        assert result == pytest.approx(self.BASE + 0.5 * f32(0, 0, 12, 0))

    def test_dare_ties_normalizes_by_the_weights_that_were_kept(self) -> None:
        plan = plan_of("dare_ties", [(1, 0.5), (3, 0.5)], normalize=True)
        result = merge_tensors(plan, f32(0, 0, 0), [f32(4, 4, 4), f32(8, 8, 8)], keep_of([1, 1, 0], [1, 0, 0]))
        assert result.tolist() == [(4 + 24) / 4, 4, 0]

    def test_trim_takes_the_first_of_equals(self) -> None:
        assert largest(f32(1, -1, 1, 1), 0.5).tolist() == [True, True, False, False]
        assert largest(f32(1, -2, 1, 3), 0.75).tolist() == [True, True, False, True]
        assert not largest(f32(1, 2), 0.4).any()


class TestProperties:
    @given(models_st(), st.sampled_from(("ties", "dare_linear", "dare_ties")))
    @settings(max_examples=60, deadline=None)
    def test_density_one_is_the_plain_method(self, models: list[Array], method: str) -> None:
        base, *tensors = models
        plain = {"dare_linear": "task_arithmetic", "dare_ties": "ties"}.get(method, method)
        got = merge_tensors(plan_of(method, [(0.5, 1), (0.25, 1)], rescale="l1"), base, tensors, keep_of())
        assert np.array_equal(got, merge_tensors(plan_of(plain, [(0.5, 1), (0.25, 1)]), base, tensors, keep_of()))

    @given(models_st(), st.sampled_from(DELTA_METHODS), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_weight_zero_is_the_base(self, models: list[Array], method: str, normalize: bool) -> None:
        base, *tensors = models
        plan = plan_of(method, [(0, 0.5), (0, 0.5)], rescale="l1", normalize=normalize)
        assert np.array_equal(merge_tensors(plan, base, tensors, counter_mask(0, "w")), base)

    @given(tensors_st, st.sampled_from(("linear", *DELTA_METHODS)), st.floats(0.1, 2))
    @settings(max_examples=60, deadline=None)
    def test_a_model_merged_with_itself_is_that_model(self, tensor: Array, method: str, weight: float) -> None:
        plan = plan_of(method, [(weight, 0.5), (1, 0.5)], rescale="l1", normalize=True)
        got = merge_tensors(plan, tensor, [tensor, tensor], counter_mask(0, "w"))
        np.testing.assert_allclose(got, tensor, rtol=3e-7)

    @given(models_st(4), st.permutations(range(3)), st.sampled_from(("linear", "task_arithmetic", "ties")))
    @settings(max_examples=60, deadline=None)
    def test_the_order_of_models_does_not_matter(self, models: list[Array], order: list[int], method: str) -> None:
        # weights and elements with few bits: float32 sums of them are exact, so equality is exact too
        base, *tensors = models
        weights = [(0.5, 0.5), (0.25, 0.75), (1.0, 0.5)]
        first = merge_tensors(plan_of(method, weights), base, tensors, keep_of())
        permuted = plan_of(method, [weights[i] for i in order])
        assert np.array_equal(merge_tensors(permuted, base, [tensors[i] for i in order], keep_of()), first)

    def test_the_mask_keeps_the_stated_share_independently(self) -> None:
        n = 1_000_000
        for density in (0.1, 0.5, 0.9):
            masks = [
                counter_mask(seed, name)(index, n, density)
                for seed, name, index in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
            ]
            sd = (density * (1 - density) / n) ** 0.5
            for i, one in enumerate(masks):
                assert abs(one.mean() - density) < 5 * sd
                for other in masks[:i]:  # independent: both keep with probability density^2
                    assert abs((one & other).mean() - density**2) < 5 * (density**2 * (1 - density**2) / n) ** 0.5

    def test_the_mask_is_a_function_of_the_element(self) -> None:
        whole = counter_mask(7, "w")(0, 1001, 0.3)
        assert np.array_equal(whole[:500], counter_mask(7, "w")(0, 500, 0.3))
        assert np.array_equal(whole[:501], counter_mask(7, "w")(0, 501, 0.3))
        # Fixed values: the mask of a published merge must come out the same with any later version.
        assert np.flatnonzero(whole[:24]).tolist() == PINNED

    def test_expectation_over_seeds_is_the_unmasked_merge(self) -> None:
        rng = np.random.default_rng(0)
        base, tensor = (rng.normal(size=200).astype(np.float32) for _ in range(2))
        plan = plan_of("dare_linear", [(0.7, 0.4)], rescale="density")
        runs = np.stack([merge_tensors(plan, base, [tensor], counter_mask(seed, "w")) for seed in range(3000)])
        wanted = merge_tensors(plan_of("task_arithmetic", [(0.7, 1)]), base, [tensor], keep_of())
        sd = 0.7 * np.abs(tensor - base) * np.sqrt((1 - 0.4) / 0.4)  # of one entry of one run
        assert np.abs((runs.mean(0) - wanted) / sd).max() < 5 / np.sqrt(3000)
        assert np.allclose(runs.std(0), sd, rtol=0.1)


PINNED = [1, 8, 9, 10, 13, 15, 16, 18, 19, 22, 23]


class TestMergekitFile:
    def write(self, tmp_path: Path, text: str) -> Path:
        path = tmp_path / "merge.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def test_defaults_of_each_method(self, tmp_path: Path) -> None:
        wanted = {
            "linear": (True, None),
            "task_arithmetic": (False, None),
            "ties": (True, None),
            "dare_linear": (False, "l1"),
            "dare_ties": (False, "l1"),
        }
        for method, (normalize, rescale) in wanted.items():
            base = "" if method == "linear" else "base_model: org/base\n"
            text = f"merge_method: {method}\n{base}models:\n- model: org/a\n  parameters: {{weight: 1}}\n"
            plan = read_mergekit(self.write(tmp_path, text))
            assert (plan.normalize, plan.rescale, plan.lambda_, plan.dtype) == (normalize, rescale, 1.0, None)
            assert plan.inputs == (MergeInput("org/a", 1.0, 1.0),)

    def test_a_whole_file(self, tmp_path: Path) -> None:
        (tmp_path / "assistant").mkdir()
        plan = read_mergekit(
            self.write(
                tmp_path,
                """
                merge_method: dare_ties
                base_model: org/base
                models:
                  - model: org/base
                  - model: assistant
                    parameters: {weight: 0.6}
                  - model: org/b
                    parameters: {weight: 1, density: 0.25}
                parameters: {density: 0.5, normalize: true, lambda: 0.9, rescale: density, int8_mask: true}
                dtype: float32
                out_dtype: bfloat16
                tokenizer_source: base
                """,
            )
        )
        assert plan == MergePlan(
            "dare_ties",
            "org/base",
            (MergeInput(str(tmp_path / "assistant"), 0.6, 0.5), MergeInput("org/b", 1.0, 0.25)),
            normalize=True,
            rescale="density",
            lambda_=0.9,
            dtype="bfloat16",
        )

    @pytest.mark.parametrize("value", [("true", "l1"), ("false", None), ("l1", "l1"), ("density", "density")])
    def test_rescale(self, tmp_path: Path, value: tuple[str, str | None]) -> None:
        text = "merge_method: dare_ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        assert read_mergekit(self.write(tmp_path, text + f"parameters: {{rescale: {value[0]}}}")).rescale == value[1]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"merge_method": "slerp"}, ("merge_method", "slerp", "line 1")),
            ({"slices": []}, ("slices", "unknown key", "line")),
            ({"tokenizer_source": "union"}, ("tokenizer_source", "union")),
            ({"dtype": "int8"}, ("dtype", "int8")),
            ({"base_model": None}, ("base_model", "ties")),
            ({"parameters": {"epsilon": 0.1}}, ("parameters.epsilon", "unknown key")),
            ({"parameters": {"normalize": 1}}, ("parameters.normalize", "true or false")),
            ({"parameters": {"density": [0.1, 0.9]}}, ("parameters.density", "not supported yet")),
            ({"parameters": {"density": 1.5}}, ("parameters.density", "between 0 and 1")),
            ({"parameters": {"rescale": "l2"}}, ("parameters.rescale", "l2")),
            ({"models": [{"model": "a"}]}, ("`weight`", "a")),
            ({"models": [{"model": "a", "parameters": {"gamma": 1}}]}, ("models.0", "gamma")),
            ({"models": [{"model": "a", "parameters": {"weight": {"value": 1}}}]}, ("weight", "not supported yet")),
            ({"models": [{"model": "a", "parameters": {"weight": "x"}}]}, ("weight", "a number")),
            ({"models": [{"model": "a", "weight": 1}]}, ("models.0.weight", "unknown key")),
            ({"models": [{"model": "b", "parameters": {"weight": 1}}]}, ("only the base model",)),
            ({"models": [{"model": "a", "parameters": {"weight": 1}}] * 2}, ("'a' twice",)),
            ({"models": []}, ("nothing to merge",)),
        ],
    )
    def test_what_it_refuses(self, tmp_path: Path, change: dict[str, Any], named: tuple[str, ...]) -> None:
        good = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a", "parameters": {"weight": 1}}]}
        assert read_mergekit(self.write(tmp_path, yaml.safe_dump(good, sort_keys=False))).method == "ties"
        path = self.write(tmp_path, yaml.safe_dump(good | change, sort_keys=False))
        with pytest.raises(InputError) as error:
            read_mergekit(path)
        for name in ("merge.yaml", *named):
            assert name in str(error.value)

    def test_linear_counts_the_base_and_needs_its_weight(self, tmp_path: Path) -> None:
        text = "merge_method: linear\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        with pytest.raises(InputError, match=r"b has no `weight`"):
            read_mergekit(self.write(tmp_path, text))
        plan = read_mergekit(self.write(tmp_path, text + "parameters: {weight: 0.5}"))
        assert [(i.model, i.weight) for i in plan.inputs] == [("b", 0.5), ("a", 1.0)]

    def test_linear_weights_that_cancel(self, tmp_path: Path) -> None:
        models = "[{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]"
        with pytest.raises(InputError, match="sum to 0"):
            read_mergekit(self.write(tmp_path, f"merge_method: linear\nmodels: {models}"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `a` and `b`: checkpoints of one shape, other weights."""
    from checkpoints import make_checkpoint

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


class TestCheckpoints:
    def test_every_tensor_is_what_the_method_says(self, checkpoints: Path, tmp_path: Path) -> None:
        path = mergekit_file(checkpoints)
        merge(MergeConfig(config=str(path), out=str(tmp_path / "out"), seed=3))
        plan = read_mergekit(path)
        base, a, b, out = (
            load_file(d / "model.safetensors")
            for d in (checkpoints / "base", checkpoints / "a", checkpoints / "b", tmp_path / "out")
        )
        assert out.keys() == base.keys()
        for name, tensor in out.items():
            wanted = merge_tensors(plan, base[name].numpy(), [a[name].numpy(), b[name].numpy()], counter_mask(3, name))
            assert np.array_equal(tensor.numpy(), wanted), name
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
        merge_plan(read_mergekit(mergekit_file(models, out_dtype=out_dtype)), tmp_path / "out", seed=0)
        merged = json.loads((tmp_path / "out" / "config.json").read_text())
        (stored,) = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()}
        assert (
            merged["dtype"] == merged["torch_dtype"] == (out_dtype or "float32") == str(stored).removeprefix("torch.")
        )
        assert merged["rope_theta"] == config["rope_parameters"]["rope_theta"], "written by ModelConfig.to_dict"

    def test_everything_is_on_the_disk_before_the_merge_appears(
        self, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fsync, synced = os.fsync, []

        def note(fd: int) -> None:
            synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, (tmp_path / "out").exists()))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", note)
        merge_plan(read_mergekit(mergekit_file(checkpoints)), tmp_path / "out", seed=0, max_shard_bytes=60_000)
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert {name for name, visible in synced if not visible} == files | {".out.partial"}
        assert synced[-1] == (tmp_path.name, True)

    def test_an_input_that_cannot_be_read_is_not_called_an_output(self, checkpoints: Path, tmp_path: Path) -> None:
        models = shutil.copytree(checkpoints, tmp_path / "models")
        path = models / "base" / "generation_config.json"
        plan = read_mergekit(mergekit_file(models))
        path.unlink()
        path.symlink_to("/proc/self/mem")  # a file whose first page nobody can read
        with pytest.raises(InputError, match=rf"{path}: cannot be read"):
            merge_plan(plan, tmp_path / "out", seed=0)
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot write"):
            merge_plan(read_mergekit(mergekit_file(checkpoints)), tmp_path / "file" / "out", seed=0)

    def test_equal_bytes_however_the_inputs_are_sharded(self, checkpoints: Path, tmp_path: Path) -> None:
        plan = read_mergekit(mergekit_file(checkpoints))
        merge_plan(plan, tmp_path / "one", seed=0)
        for name in ("base", "a", "b"):
            reshard(checkpoints / name, tmp_path / "sharded" / name, 3)
        sharded = read_mergekit(mergekit_file(tmp_path / "sharded"))
        merge_plan(sharded, tmp_path / "two", seed=0)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        merge_plan(plan, tmp_path / "other", seed=1)
        assert contents(tmp_path / "one")["model.safetensors"] != contents(tmp_path / "other")["model.safetensors"]

    def test_output_shards_hold_the_same_tensors(self, checkpoints: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        plan = read_mergekit(mergekit_file(checkpoints))
        merge_plan(plan, tmp_path / "whole", seed=0)
        merge_plan(plan, tmp_path / "shards", seed=0, max_shard_bytes=60_000)
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

    def test_bfloat16_in_float32_arithmetic(self, checkpoints: Path, tmp_path: Path) -> None:
        for name in ("base", "a", "b"):
            shutil.copytree(checkpoints / name, tmp_path / name)
            file = tmp_path / name / "model.safetensors"
            save_file({n: t.to(torch.bfloat16) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        plan = read_mergekit(
            mergekit_file(
                tmp_path,
                merge_method="linear",
                base_model=None,
                models=[{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")],
            )
        )
        merge_plan(plan, tmp_path / "out", seed=0)
        a, b, out = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
        for name, tensor in out.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, ((a[name].float() + b[name].float()) / 2).to(torch.bfloat16))

    def test_the_report_names_what_went_in(self, checkpoints: Path, tmp_path: Path) -> None:
        merge_plan(read_mergekit(mergekit_file(checkpoints)), tmp_path / "out", seed=5)
        report = json.loads((tmp_path / "out" / "merge.json").read_text())
        assert report["seed"] == 5
        assert [i["model"] for i in report["plan"]["inputs"]] == ["a", "b"]
        prints = {report["base_fingerprint"], *(i["fingerprint"] for i in report["plan"]["inputs"])}
        assert len(prints) == 3
        assert str(tmp_path) not in json.dumps(report)

    def test_a_former_merge_is_replaced_but_nothing_else(self, checkpoints: Path, tmp_path: Path) -> None:
        plan = read_mergekit(mergekit_file(checkpoints))
        out = tmp_path / "out"
        merge_plan(plan, out, seed=0)
        first = contents(out)
        (tmp_path / ".out.partial").mkdir()  # as a killed merge leaves it
        (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"torn")
        merge_plan(plan, out, seed=1)
        assert contents(out).keys() == first.keys()
        assert contents(out) != first
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        with pytest.raises(InputError, match="exists"):
            merge_plan(plan, tmp_path / "mine", seed=0)
        assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"

    def break_tensor(
        self, checkpoints: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
    ) -> MergePlan:
        shutil.copytree(checkpoints, folder)
        file = folder / "b" / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return read_mergekit(mergekit_file(folder))

    NAME = "model.layers.1.mlp.up_proj.weight"

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
                tensors[self.NAME][3, 4] = float(value)
            elif value == "gone":
                del tensors[self.NAME]
            elif value == "cut":
                tensors[self.NAME] = tensors[self.NAME][:-1].clone()
            elif value == "int":
                tensors[self.NAME] = tensors[self.NAME].to(torch.int32)
            else:
                tensors["extra.weight"] = torch.ones(2)

        plan = self.break_tensor(checkpoints, tmp_path / "models", change)
        with pytest.raises(InputError) as error:
            merge_plan(plan, tmp_path / "out", seed=0)
        assert said in str(error.value)
        assert str(tmp_path / "models" / ("base" if value == "more" else "b")) in str(error.value)
        assert "extra.weight" in str(error.value) if value == "more" else self.NAME in str(error.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.partial").exists()

    def test_a_truncated_file_is_named(self, checkpoints: Path, tmp_path: Path) -> None:
        plan = self.break_tensor(checkpoints, tmp_path / "models", lambda tensors: None)
        file = tmp_path / "models" / "b" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"b/model\.safetensors"):
            merge_plan(plan, tmp_path / "out", seed=0)

    def test_float16_overflow_is_an_error(self, checkpoints: Path, tmp_path: Path) -> None:
        plan = replace(read_mergekit(mergekit_file(checkpoints)), lambda_=1e6, dtype="float16")
        with pytest.raises(InputError, match="overflows float16"):
            merge_plan(plan, tmp_path / "out", seed=0)
