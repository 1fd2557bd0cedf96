"""mergekit's files: defaults, precedence, gradients and filters as mergekit 0.1.5 has them; the rest is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from micota_fast.errors import InputError
from micota_fast.merge.mergekit import MergePlan, read_mergekit
from micota_fast.merge.settings import depth_of

MLP, ATTENTION = "model.layers.3.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"


def write(tmp_path: Path, content: str | dict[str, Any]) -> Path:
    path = tmp_path / "merge.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def plan_of(tmp_path: Path, method: str = "ties", models: Any = None, **changes: Any) -> MergePlan:
    own = {"slerp": {}}.get(method, {"parameters": {"weight": 1}})
    content = {"merge_method": method, "base_model": "b", "models": models or [{"model": "a", **own}]} | changes
    if method == "linear":
        del content["base_model"]
    return read_mergekit(write(tmp_path, content))


class TestDefaults:
    @pytest.mark.parametrize(
        ("method", "normalize", "rescale"),
        [
            ("linear", True, "none"),
            ("task_arithmetic", False, "none"),
            ("ties", True, "none"),
            ("dare_linear", False, "l1"),
            ("dare_ties", False, "l1"),
        ],
    )
    def test_of_each_method(self, tmp_path: Path, method: str, normalize: bool, rescale: str) -> None:
        plan = plan_of(tmp_path, method)
        at = plan.at(MLP, 0.5)
        assert (at.normalize, at.rescale, at.lambda_, plan.dtype) == (normalize, rescale, 1.0, None)
        assert (at.weights, at.densities) == ((1.0,), (1.0,))
        assert [entry.model for entry in plan.inputs] == ["a"]

    def test_a_whole_file(self, tmp_path: Path) -> None:
        (tmp_path / "assistant").mkdir()
        plan = read_mergekit(
            write(
                tmp_path,
                """
                merge_method: dare_ties
                base_model: org/base
                models:
                  - model: org/base
                  - model: assistant
                    parameters: {weight: 0.6}
                  - model: org/b
                    parameters: {weight: 1e-1, density: 0.25}
                parameters: {density: 0.5, normalize: 1.0, lambda: 0.9, rescale: density, int8_mask: true}
                dtype: float32
                out_dtype: bfloat16
                tokenizer: {source: base}
                """,
            )
        )
        assert (plan.base, plan.dtype) == ("org/base", "bfloat16")
        assert [entry.model for entry in plan.inputs] == [str(tmp_path / "assistant"), "org/b"]
        at = plan.at(MLP, 0)
        assert (at.weights, at.densities) == ((0.6, 0.1), (0.5, 0.25))
        assert (at.normalize, at.rescale, at.lambda_) == (True, "density", 0.9)

    @pytest.mark.parametrize(
        ("value", "wanted"),
        [(True, "l1"), (1.0, "l1"), (False, "none"), (0, "none"), ("l1", "l1"), ("density", "density")],
    )
    def test_rescale(self, tmp_path: Path, value: Any, wanted: str) -> None:
        assert plan_of(tmp_path, "dare_ties", parameters={"rescale": value}).at(MLP, 0).rescale == wanted

    def test_slerp_has_t_for_all_models(self, tmp_path: Path) -> None:
        plan = plan_of(tmp_path, "slerp", [{"model": "b"}, {"model": "a"}], parameters={"t": [0, 1]})
        assert plan.at(MLP, 0.25).weights == (0.25,)
        assert [entry.model for entry in plan.inputs] == ["a"]

    def test_linear_counts_the_base_and_needs_its_weight(self, tmp_path: Path) -> None:
        text = "merge_method: linear\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        with pytest.raises(InputError, match=r"b has no `weight`"):
            read_mergekit(write(tmp_path, text))
        plan = read_mergekit(write(tmp_path, text + "parameters: {weight: 0.5}"))
        assert [entry.model for entry in plan.inputs] == ["a", "b"]
        assert plan.at(MLP, 0).weights == (1.0, 0.5)


class TestPlaces:
    def weight(self, tmp_path: Path, own: Any, tensor: str, depth: float, **changes: Any) -> float:
        parameters = {} if own is None else {"parameters": {"weight": own}}
        return plan_of(tmp_path, models=[{"model": "a", **parameters}], **changes).at(tensor, depth).weights[0]

    @pytest.mark.parametrize(
        ("depth", "wanted"), [(0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.6), (1, 0.2), (0.1, 0.2)]
    )
    def test_a_gradient_is_interpolated_between_points_at_equal_distances(
        self, tmp_path: Path, depth: float, wanted: float
    ) -> None:
        assert self.weight(tmp_path, [0, 1, 0.2], MLP, depth) == pytest.approx(wanted)

    def test_words_and_truth_values_go_in_steps(self, tmp_path: Path) -> None:
        steps = {"rescale": ["density", False, True], "normalize": [True, False]}
        plan = plan_of(tmp_path, "dare_ties", parameters=steps)
        found = [(plan.at(MLP, depth).rescale, plan.at(MLP, depth).normalize) for depth in (0, 0.49, 0.5, 0.99, 1)]
        assert found == [("density", True), ("density", True), ("none", True), ("none", True), ("l1", False)]

    def test_the_first_case_that_fits_holds(self, tmp_path: Path) -> None:
        cases = [{"filter": "mlp", "value": [0.1, 0.3]}, {"filter": "up_proj", "value": 7}, {"value": 0.5}]
        assert self.weight(tmp_path, cases, MLP, 0.5) == pytest.approx(0.2)
        assert self.weight(tmp_path, cases, ATTENTION, 0.5) == 0.5
        assert self.weight(tmp_path, [{"filter": "*", "value": 3}, {"value": 4}], ATTENTION, 0) == 3
        assert self.weight(tmp_path, {"filter": "mlp", "value": 2}, MLP, 0) == 2

    def test_a_models_own_goes_before_the_files(self, tmp_path: Path) -> None:
        of_file = {"parameters": {"weight": [{"filter": "q_proj", "value": 0.4}, {"value": 0.9}]}}
        own = [{"filter": "mlp", "value": 0.1}]
        assert self.weight(tmp_path, own, MLP, 0, **of_file) == 0.1
        assert self.weight(tmp_path, own, ATTENTION, 0, **of_file) == 0.4
        assert self.weight(tmp_path, own, "model.norm.weight", 0, **of_file) == 0.9
        assert self.weight(tmp_path, 0.2, ATTENTION, 0, **of_file) == 0.2
        assert self.weight(tmp_path, None, ATTENTION, 0, **of_file) == 0.4

    def test_a_tensor_without_a_weight_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=rf"a: no `weight` applies to tensor {ATTENTION}"):
            self.weight(tmp_path, [{"filter": "mlp", "value": 0.1}], ATTENTION, 0)

    def test_linear_weights_that_cancel(self, tmp_path: Path) -> None:
        models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", [1, 2]), ("c", -1))]
        plan = plan_of(tmp_path, "linear", models)
        assert plan.at(MLP, 1).weights == (2, -1)
        with pytest.raises(InputError, match=rf"{MLP}: the weights sum to 0"):
            plan.at(MLP, 0)

    def test_depth(self) -> None:
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 3, 12)]
        assert [depth_of(name, 13) for name in names] == [0, 0.25, 1]
        assert depth_of(names[0], 1) == 1
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert depth_of(name, 13) == 0


class TestSweep:
    def test_another_weight(self, tmp_path: Path) -> None:
        plan = plan_of(tmp_path, models=[{"model": "a", "parameters": {"weight": [0, 1], "density": 0.5}}])
        assert plan.with_weight(0.3).at(MLP, 0.9).weights == (0.3,)
        assert plan.with_weight(0.3).at(MLP, 0.9).densities == (0.5,)
        slerp = plan_of(tmp_path, "slerp", parameters={"t": 0.9})
        assert slerp.with_weight(0.25).at(MLP, 0).weights == (0.25,)

    def test_where_one_weight_says_nothing(self, tmp_path: Path) -> None:
        two = [{"model": m, "parameters": {"weight": 1}} for m in ("a", "c")]
        with pytest.raises(InputError, match="not 2 by ties"):
            plan_of(tmp_path, models=two).with_weight(0.5)
        with pytest.raises(InputError, match="not 1 by linear"):
            plan_of(tmp_path, "linear").with_weight(0.5)
        with pytest.raises(InputError, match="out of range"):
            plan_of(tmp_path).with_weight(1e9)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"merge_method": "passthrough"}, ("merge_method", "passthrough", "line 1")),
        ({"slices": []}, ("slices", "unknown key", "line")),
        ({"modules": {}}, ("modules", "unknown key", "line")),
        ({"chat_template": "auto"}, ("chat_template", "unknown key", "line")),
        ({"tokenizer_source": "union"}, ("tokenizer_source", "union")),
        ({"tokenizer": {"source": "base", "tokens": {}}}, ("tokenizer.tokens", "unknown key")),
        ({"dtype": "int8"}, ("dtype", "int8")),
        ({"base_model": None}, ("base_model", "ties")),
        ({"parameters": {"denisty": 0.1}}, ("parameters.denisty", "unknown key")),
        ({"parameters": {"t": 0.1}}, ("parameters.t", "no meaning", "ties")),
        ({"parameters": {"normalize": 2}}, ("parameters.normalize", "true or false")),
        ({"parameters": {"density": []}}, ("parameters.density", "empty list")),
        ({"parameters": {"density": [0.1, "x"]}}, ("parameters.density.1", "a number")),
        ({"parameters": {"density": [0.1, {"value": 1}]}}, ("parameters.density.1", "a number")),
        ({"parameters": {"density": [{"filter": "mlp"}]}}, ("parameters.density.0", "no `value`")),
        ({"parameters": {"density": [{"value": 1, "then": 2}]}}, ("parameters.density.0.then", "unknown key")),
        ({"parameters": {"density": [{"value": 1, "filter": 2}]}}, ("parameters.density.0.filter", "2")),
        ({"parameters": {"density": 1.5}}, ("parameters.density", "between 0 and 1")),
        ({"parameters": {"rescale": "l2"}}, ("parameters.rescale", "l2")),
        ({"parameters": {"int8_mask": "maybe"}}, ("parameters.int8_mask", "maybe")),
        ({"models": [{"model": "a"}]}, ("`weight`", "a")),
        ({"models": [{"model": "a", "parameters": {"gamma": 1}}]}, ("models.0", "gamma")),
        ({"models": [{"model": "a", "parameters": {"normalize": True}}]}, ("models.0", "normalize")),
        ({"models": [{"model": "a", "parameters": {"weight": {"filter": "x"}}}]}, ("weight", "no `value`")),
        ({"models": [{"model": "a", "parameters": {"weight": True}}]}, ("models.0.parameters.weight", "a number")),
        ({"models": [{"model": "a", "weight": 1}]}, ("models.0.weight", "unknown key")),
        ({"models": [{"model": "b", "parameters": {}}]}, ("only the base model",)),
        (
            {"models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]},
            ("models.1.parameters", "base model"),
        ),
        ({"models": [{"model": "a", "parameters": {"weight": 1}}] * 2}, ("'a' twice",)),
        ({"models": []}, ("nothing to merge",)),
        ({"merge_method": "linear", "parameters": {"rescale": True}}, ("parameters.rescale", "linear")),
        ({"merge_method": "task_arithmetic", "parameters": {"density": 1}}, ("parameters.density", "task_arithmetic")),
        ({"merge_method": "slerp", "parameters": {"t": 1}}, ("models.0.parameters.weight", "slerp")),
        ({"merge_method": "slerp", "models": [{"model": "a"}]}, ("`t`", "slerp")),
        ({"merge_method": "slerp", "models": [{"model": "a"}, {"model": "c"}]}, ("2 others",)),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, Any], named: tuple[str, ...]) -> None:
    good = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    assert read_mergekit(write(tmp_path, good)).method == "ties"
    with pytest.raises(InputError) as error:
        read_mergekit(write(tmp_path, good | change))
    for name in ("merge.yaml", *named):
        assert name in str(error.value)


def test_a_file_is_checked_without_numba() -> None:
    """A recipe's merges are checked when `micota run --dry-run` reads it; compiling kernels can wait."""
    check = "import sys, micota_fast.merge.mergekit; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
