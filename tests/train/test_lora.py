"""LoRA: trained as peft trains it, saved as peft saves it, merged, resumed, and refused where it cannot be meant."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.ranks import run_ranks
from helpers.training_runs import (
    checkpoint_steps,
    finish,
    kill,
    metrics,
    start_training,
    train_config,
    wait_until,
    weights_of,
    write_corpus,
)
from micota_fast.config.loader import build, identity
from micota_fast.config.train import LoraConfig, TrainConfig
from micota_fast.data.batches import PackedBatch
from micota_fast.errors import InputError
from micota_fast.model.adapter import save_adapter, save_merged
from micota_fast.model.decoder import Decoder
from micota_fast.model.safetensors_io import load_model
from micota_fast.train.loop import train
from micota_fast.train.lora import LoraLinear, adapted_modules, add_adapters, draw_adapters
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.parallel import local_part, parallelize
from micota_fast.train.prepare import build_model, load_initial_weights
from micota_fast.train.world import World

CPU = World(0, 1, torch.device("cpu"))
LORA = LoraConfig(rank=4, alpha=6.0, targets=["q_proj", "v_proj", "down_proj"], merged=True)


def lora_config(checkpoint: Path, folder: Path, **options: Any) -> TrainConfig:
    return train_config(checkpoint, folder, **{"lora": LORA, "lr": 3e-3, **options})


def with_adapters(checkpoint: Path, lora: LoraConfig) -> Decoder:
    """The checkpoint in float32 with the adapters that seed 0 gives."""
    decoder = load_model(checkpoint, torch.float32)
    add_adapters(decoder, lora)
    draw_adapters(decoder, seed=0)
    return decoder


def adapters_of(config: TrainConfig) -> dict[str, Tensor]:
    return load_file(Path(config.out) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two epochs of five steps."""
    config = lora_config(qwen2_checkpoint, tmp_path_factory.mktemp("lora"))
    train(config)
    return config


class ByHand(nn.Module):
    """The paper's formula."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.A, self.B, self.scale = base, nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.scale * (x @ self.A.T @ self.B.T)
        return result


def adapted_by_hand(base: nn.Module, folder: Path) -> nn.Module:
    base.requires_grad_(False)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if ".lora_A." in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        module = base.get_submodule(name)
        assert isinstance(module, nn.Linear)
        base.set_submodule(name, ByHand(module, tensors[key], tensors[key.replace("_A", "_B")], LORA.alpha / LORA.rank))
    return base


def adapted_by_peft(base: nn.Module, folder: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    model: nn.Module = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    return model


@pytest.mark.parametrize("adapted", [adapted_by_hand, adapted_by_peft])
def test_ten_steps_equal_those_of_others_from_the_same_adapters(
    adapted: Any, llama_checkpoint: Path, tmp_path: Path
) -> None:
    import transformers
    from torch.utils.data import SequentialSampler

    from micota_fast.chat.encoding import Chat
    from micota_fast.data.batches import PackedSteps
    from micota_fast.data.tokenise import load_documents

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    def as_transformers_wants(pack: PackedBatch) -> dict[str, Tensor]:
        labels_T = pack.targets.roll(1)
        labels_T[0] = -100
        return {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "labels": labels_T}

    write_corpus(tmp_path / "corpus.jsonl", rows=70)
    config = lora_config(llama_checkpoint, tmp_path, max_steps=10, warmup_ratio=0.0, weight_decay=0.1)
    decoder = with_adapters(llama_checkpoint, LORA)
    initial = {name: p.detach() for name, p in decoder.named_parameters() if p.requires_grad}
    save_adapter(initial, LORA, str(llama_checkpoint), tmp_path / "initial", {})
    theirs = adapted(transformers.AutoModelForCausalLM.from_pretrained(llama_checkpoint), tmp_path / "initial")
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    train(config)
    documents = load_documents(config.data, Chat.from_checkpoint(config.model, config.chat), config.pack_tokens)
    steps = PackedSteps(documents, config.pack_tokens, config.packs_per_step, seed=config.seed)
    packs = [pack for step in range(10) for pack in steps.step(step).batches]
    assert len(packs) == 20
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=10,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.eps,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(theirs, arguments, train_dataset=[as_transformers_wants(pack) for pack in packs])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    for a, b in zip(metrics(config), rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert rows[0]["loss"] - rows[-1]["loss"] > 0.2, "it should have learned something"
    ours = adapters_of(config)
    changed = 0
    for name, parameter in theirs.named_parameters():
        half = re.search(r"(model\.layers\..*)\.(?:lora_)?([AB])\b", name)
        if half is None:
            assert torch.equal(parameter, before[name]), name
        else:
            mine = ours[f"base_model.model.{half[1]}.lora_{half[2]}.weight"]
            torch.testing.assert_close(mine, parameter.detach(), rtol=0, atol=2e-4)
            changed += not torch.equal(parameter, before[name])
    assert changed == len(ours) == 2 * 3 * 2


def test_what_is_saved_has_pefts_names_and_shapes(trained: TrainConfig) -> None:
    folder = Path(trained.out) / "adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, LORA.targets)
    assert config["base_model_name_or_path"] == trained.model
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in adapters_of(trained).items()}
    expected = {}
    for layer in range(2):
        for module, (rows, columns) in {
            "self_attn.q_proj": (64, 64),
            "self_attn.v_proj": (32, 64),
            "mlp.down_proj": (64, 96),
        }.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            expected[f"{name}.lora_A.weight"] = (torch.float32, (4, columns))
            expected[f"{name}.lora_B.weight"] = (torch.float32, (rows, 4))
    assert shapes == expected
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "A LoRA adapter of 3,072 parameters" in card


def test_peft_opens_the_adapter_unchanged(trained: TrainConfig) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, Path(trained.out) / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(Path(trained.out) / "model", dtype=torch.float32)
    with torch.no_grad():
        with model.disable_adapter():
            untrained = model(ids).logits
        theirs, ours = model(ids).logits, merged(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (theirs - untrained).abs().max() > 0.1


def test_the_merged_model_is_the_base_with_the_products_added(trained: TrainConfig, tmp_path: Path) -> None:
    base, adapters = load_file(Path(trained.model) / "model.safetensors"), adapters_of(trained)
    merged = weights_of(trained)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if (A := adapters.get(f"{module}.lora_A.weight")) is None:
            assert torch.equal(tensor, base[name]), name
        else:
            expected = base[name].double() + 1.5 * adapters[f"{module}.lora_B.weight"].double() @ A.double()
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
            assert not torch.equal(tensor, base[name])
    save_merged(Path(trained.model), Path(trained.out) / "adapter", tmp_path / "later")
    for name, tensor in load_file(tmp_path / "later" / "model.safetensors").items():
        assert torch.equal(tensor, merged[name])


def test_without_merged_there_is_an_adapter_alone_and_the_run_is_finished(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(trained, out=str(tmp_path / "out"), lora=replace(LORA, merged=False))
    train(config)
    assert adapters_of(config).keys() == adapters_of(trained).keys()
    assert all(torch.equal(tensor, adapters_of(trained)[name]) for name, tensor in adapters_of(config).items())
    assert not (tmp_path / "out" / "model").exists()
    capsys.readouterr()
    assert train(config)
    assert "already contains the finished result" in capsys.readouterr().out


def _draws(world: World, checkpoint: Path, out: Path) -> None:
    """Save the adapters that this rank begins with, whole."""
    settings = TrainConfig(model=str(checkpoint), data="", out="", device="cpu", lora=LORA, seed=3)
    model = build_model(settings, checkpoint, world)
    parallelize(model, settings, world)
    load_initial_weights(model, settings, checkpoint, world)
    for module in adapted_modules(model.decoder).values():
        assert local_part(module.weight).dtype == torch.bfloat16
    whole = {n: p.full_tensor().detach() for n, p in model.decoder.named_parameters() if p.requires_grad}
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    if world.is_main:
        torch.save(whole, out)


def test_initial_adapters_do_not_depend_on_the_number_of_ranks(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    for ranks in (1, 3):
        run_ranks(ranks, _draws, tmp_path / f"log-{ranks}", qwen2_checkpoint, tmp_path / f"{ranks}.pt")
    one, three = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 3))
    assert one.keys() == three.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, three[name])
        if "lora_B" in name:
            assert not tensor.any()
        else:  # Kaiming's uniform distribution with a = sqrt(5)
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "activation_checkpointing": "selective"},
        {"lora": replace(LORA, dropout=0.1), "freeze": ["*.lora_A.*"], "activation_checkpointing": "full"},
    ],
    ids=["bfloat16", "dropout"],
)
def test_two_killed_ranks_resume_bit_for_bit(options: dict[str, Any], qwen2_checkpoint: Path, tmp_path: Path) -> None:
    two, killed = (lora_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / n), **options) for n in ("two", "killed"))
    killed = replace(killed, checkpoint_every=2)
    finish(start_training(two, world=2), two)
    processes = start_training(killed, world=2)
    wait_until(lambda: len(metrics(killed)) >= 5, processes)
    kill(processes[::-1])
    folder = Path(killed.out) / "checkpoints" / f"step-{checkpoint_steps(killed)[0]:08d}"
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert all(".lora_" in name or name.startswith("rng.") for name in names), "the base is not written again"
    finish(start_training(killed, world=2), killed)
    assert "resuming after step" in Path(f"{killed.out}.log").read_text()
    assert metrics(killed) == metrics(two)
    for folder in ("adapter", "model"):
        one, other = (
            {file.name: file.read_bytes() for file in (Path(run.out) / folder).iterdir()} for run in (two, killed)
        )
        assert one == other


def test_two_ranks_equal_one(trained: TrainConfig, tmp_path: Path) -> None:
    two = replace(trained, out=str(tmp_path / "two"))
    finish(start_training(two, world=2), two)
    for a, b in zip(metrics(trained), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    for name, tensor in adapters_of(two).items():
        torch.testing.assert_close(tensor, adapters_of(trained)[name], rtol=0, atol=5e-5)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activation_checkpointing_repeats_dropout_bit_for_bit(how: str, trained: TrainConfig, tmp_path: Path) -> None:
    lora = replace(LORA, dropout=0.2, merged=False)
    plain, again = (
        replace(trained, out=str(tmp_path / name), lora=lora, max_steps=3, activation_checkpointing=name)
        for name in ("none", how)
    )
    train(plain)
    train(again)
    assert metrics(again) == metrics(plain)
    assert metrics(plain)[1]["loss"] != metrics(trained)[1]["loss"]


class Gradients(TorchDispatchMode):
    """Notes the shapes of products' results and what the loss returns."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []
        self.loss: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm"):
            self.products.append(tuple(result.shape))
        if name == "micota::linear_cross_entropy":
            self.loss = [tuple(tensor.shape) for tensor in result]
        return result


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # tied embeddings, and not
def test_frozen_weights_cost_no_product(family: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    model = PackedLoss(with_adapters(checkpoint, LoraConfig(rank=3)), "sdpa")
    lengths = [30, 11]
    ids = torch.arange(41) % 300
    cu_seqlens = torch.tensor([0, 30, 41], dtype=torch.int32)
    with Gradients() as seen:
        loss = model(ids, ids % 20, ids.roll(-1), None, cu_seqlens, lengths, 41, 41.0)
        loss.backward()
    nll, _, hidden, head = seen.loss
    assert (nll, hidden, head) == ((41,), (41, 64), (0,)), "no gradient of the output matrix"
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    wide = {tuple(p.shape) for p in frozen} | {tuple(p.shape)[::-1] for p in frozen}
    assert seen.products
    assert not wide & set(seen.products)


def mistake(checkpoint: Path, tmp_path: Path, **options: Any) -> str:
    config = replace(train_config(checkpoint, tmp_path, **options), data=str(tmp_path / "is not there"))
    with pytest.raises(InputError) as error:
        train(config)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora": LoraConfig(targets=["q_proj", "gate"])},
            r"`lora\.targets`: 'gate' names no module .* there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            r"down_proj, and .*from model\.layers\.0\.self_attn\.q_proj to model\.layers\.1\.mlp\.down_proj",
        ),
        ({"lora": LoraConfig(targets=["lm_head"])}, r"'lm_head' names no module"),
        ({"lora": LoraConfig(rank=33)}, r"`lora\.rank` 33 exceeds the smaller dimension of .*k_proj, which is 32 x 64"),
        (
            {"lora": LORA, "freeze": ["*.q_proj.weight"]},
            r"`freeze`: '\*\.q_proj\.weight' matches model\.layers\.0\.self_attn\.q_proj\.weight, which an adapter",
        ),
        ({"lora": LORA, "freeze": ["*.lora_B.*"]}, r"leaves model\.layers\.0.*lora_A to train without its lora_B"),
        ({"lora": LORA, "freeze": ["*.lora_?.*"]}, r"leaves no parameter to train"),
        ({"freeze": ["model.embed_token"]}, r"matches no parameter"),
    ],
    ids=["target", "head", "rank", "freeze weight", "freeze B", "freeze all", "freeze without lora"],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    assert re.search(message, mistake(qwen2_checkpoint, tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"rank": 0}}, r"`rank` must be at least 1, not 0"),
        ({"lora": {"alpha": 0}}, r"`alpha` must be above 0"),
        ({"lora": {"dropout": 1}}, r"`dropout` must be at least 0 and below 1"),
        ({"lora": {"targets": []}}, r"`targets` is empty"),
        ({"lora": {"r": 8}}, r"`lora\.r`: unknown key; known here: rank, alpha"),
        ({"lora": {}, "init": "random"}, r"`lora` adapts the weights of a checkpoint, but `init: random`"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(TrainConfig, {"model": "m", "data": "d", "out": "o", **options}, "test")


def test_runs_without_lora_keep_their_identity() -> None:
    plain = TrainConfig(model="m", data="d", out="o")
    assert "lora" not in identity(plain)
    assert identity(replace(plain, lora=LORA))["lora"]["rank"] == 4


def test_layers_may_be_frozen_and_single_modules_adapted(llama_checkpoint: Path) -> None:
    settings = TrainConfig(
        model=str(llama_checkpoint),
        data="",
        out="",
        device="cpu",
        lora=LoraConfig(rank=2, targets=["layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"]),
        freeze=["model.layers.0.*"],
    )
    decoder = build_model(settings, llama_checkpoint, CPU).decoder
    assert list(adapted_modules(decoder)) == ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"]
    trained = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.1.mlp.up_proj.lora_{half}.weight" for half in "AB"}


def test_dropout_is_for_training_alone() -> None:
    torch.manual_seed(0)
    module = LoraLinear(nn.Linear(8, 8), LoraConfig(rank=2, dropout=0.5))
    nn.init.normal_(module.lora_B.weight)
    x = torch.randn(5, 8)
    assert not torch.equal(module(x), module(x))
    with torch.no_grad():
        assert torch.equal(module(x), module(x))


def test_the_loss_is_that_of_the_base_before_the_first_step(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    with_adapters, without = (
        train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / name), lora=lora, max_steps=1)
        for name, lora in (("with", LORA), ("without", None))
    )
    train(with_adapters)
    train(without)
    assert metrics(with_adapters)[0]["loss"] == metrics(without)[0]["loss"]
    assert isinstance(build_model(without, qwen2_checkpoint, CPU), PackedLoss)
