"""The trainers that bench/train.py compares, and how each is run: one process per run, all on the same documents."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import ROOT
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from train_peers import peak_rss_bytes

from micota_fast.common.processes import die_with_parent
from micota_fast.config.train import LoraConfig
from micota_fast.data.packing import pack
from micota_fast.model import safetensors_io
from micota_fast.model.config import ModelConfig

SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
LR, BETAS = 1e-3, (0.9, 0.999)
WARM_UP_PASSES, MEASURED_PASSES = 1, 1
PEERS = Path(__file__).with_name("train_peers.py")

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model's shape and what it is trained on.

    Attributes:
        shape: what config.json says of SHAPE_KEYS.
        documents: lengths in tokens, log-uniform between the two.
        pack_tokens, packs_per_step: as in our recipes.
        packs: tokens of a pass over all documents, in full packs.
        padded_batch: documents in a padded micro-batch.
    """

    model: str
    shape: tuple[int, int, int, int, int, int, bool]
    documents: tuple[int, int]
    pack_tokens: int
    packs_per_step: int
    packs: int
    padded_batch: int

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **dict(zip(SHAPE_KEYS, self.shape, strict=True)),
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "eos_token_id": 0,
        }


@dataclass(frozen=True)
class Prepared:
    """A case's files, and what the figures are counted in."""

    case: Case
    folder: Path  # model/, corpus.jsonl for our trainer, documents.json with the same token ids for the others
    lengths: tuple[int, ...]
    packs: list[list[int]]  # documents of each pack, as our packing has them

    @property
    def tokens(self) -> int:
        """Of a pass."""
        return sum(self.lengths)

    @property
    def supervised(self) -> int:
        """Of a pass: all tokens but each document's first, which nothing precedes."""
        return self.tokens - len(self.lengths)

    @property
    def mean_context(self) -> float:
        """Length of the document that a token lies in, on average over tokens."""
        return sum(n * n for n in self.lengths) / self.tokens

    @property
    def steps(self) -> int:
        """Optimizer steps of a pass."""
        return -(-len(self.packs) // self.case.packs_per_step)


def prepare(case: Case, folder: Path) -> Prepared:
    """Write random weights and documents; the same ones every time.

    A token is one character, so that our trainer, which reads text, and the others, which are given token ids, see the
    same documents. Which tokens come is log-uniform, so that there is something to learn: their frequencies.
    """
    config = ModelConfig.from_dict(case.config())
    source, vocabulary = folder / "source", case.config()["vocab_size"]
    source.mkdir(parents=True)
    characters = ["a", "b", *(chr(0x10000 + i) for i in range(vocabulary - 3))]
    tokenizer = Tokenizer(BPE({"<|end|>": 0, **{c: i for i, c in enumerate(characters, 1)}}, []))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"})
    )
    model = safetensors_io.init_random(config, seed=0)
    safetensors_io.save_checkpoint(model.state_dict(), config, source, folder / "model", torch.float32)

    rng = np.random.default_rng(0)
    documents: list[list[int]] = []
    while sum(map(len, documents)) < case.packs * case.pack_tokens:
        length = int(np.exp(rng.uniform(*np.log(case.documents))))
        drawn = np.exp(rng.uniform(0, np.log(vocabulary), length - 1)).astype(np.int64)
        documents.append([*np.minimum(drawn, vocabulary - 1).tolist(), 0])
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for ids in documents:
            text = "".join(characters[i - 1] for i in ids[:-1])
            file.write(json.dumps({"problem": "", "completion": text}) + "\n")
    (folder / "documents.json").write_text(json.dumps(documents))
    order, offsets = pack(np.array([len(d) for d in documents]), case.pack_tokens)
    packs = [order[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    return Prepared(case, folder, tuple(map(len, documents)), packs)


@dataclass(frozen=True)
class Contestant:
    """A trainer with its settings.

    Attributes:
        dtype: of the products; weights, optimizer and gradients are float32 everywhere.
        program: of train_peers.py; None: ours.
        options: of our configuration, or of the job of train_peers.py.
    """

    name: str
    dtype: str
    program: str | None
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """Name and type."""
        return f"{self.name}, {self.dtype}"


def contestants(device: str, trl_python: str, lora: bool = False) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can run here, in the order of their turns, and why the others are absent."""
    needs = {"plain": (sys.executable, "transformers"), "trl": (trl_python, "trl")}
    obstacles = {program: _import_error(*need) for program, need in needs.items()}
    liger = _import_error(trl_python, "liger_kernel") if device == "cuda" else None
    compiler = None if shutil.which(os.environ.get("CXX", "g++")) else "torch.compile needs a C++ compiler (g++, CXX)"
    present, absent = [], {}
    peft = _import_error(trl_python, "peft") if lora else None
    for contestant in WITH_LORA if lora else ON_CPU if device == "cpu" else ON_GPU:
        why = obstacles.get(contestant.program or "")
        why = why or (liger if contestant.options.get("liger") else None)
        why = why or (peft if contestant.program and "lora" in contestant.options else None)
        why = why or (compiler if contestant.options.get("compile") else None)
        if why:
            absent[contestant.label] = why
        else:
            present.append(contestant)
    return present, absent


def _import_error(python: str, module: str) -> str | None:
    """Why an interpreter cannot import it; None: it can."""
    try:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return last_line(done.stderr) if done.returncode else None


def last_line(text: str) -> str:
    """Where Python says what went wrong."""
    return next(iter(reversed(text.strip().splitlines())), "no message")


def run(contestant: Contestant, given: Prepared, device: str, trl_python: str, folder: Path) -> Row:
    """Train once, in a process of its own.

    Args:
        folder: for what the run writes; must not exist.

    Returns:
        `pass_s` and `pass_cpu_s`, seconds of each measured pass and those that processors worked in it; `loss`, mean of
        the steps' losses over the last one; `peak_rss_bytes`; `peak_device_bytes`, None on a CPU; and what else the
        program says of itself. Of the GEMM, `flop_per_s`.

    Raises:
        RuntimeError: it failed; the last line of what it printed says why.
    """
    folder.mkdir()
    if contestant.program is None:
        return _run_ours(contestant, given, device, folder)
    case = given.case
    job = {
        "program": contestant.program,
        "model": str(given.folder / "model"),
        "documents": str(given.folder / "documents.json"),
        "out": str(folder / "out"),
        "device": device,
        "dtype": contestant.dtype,
        "lr": LR,
        "betas": BETAS,
        "passes": WARM_UP_PASSES + MEASURED_PASSES,
        "packs": given.packs,
        "packs_per_step": case.packs_per_step,
        "pack_tokens": case.pack_tokens,
        **contestant.options,
    }
    if contestant.program == "trl":
        # As many documents in a padded step as there are in a packed one.
        padded_step = case.packs_per_step * len(given.lengths) / len(given.packs)
        micro, accumulation = (
            (1, case.packs_per_step)
            if contestant.options["packing"]
            else (case.padded_batch, max(1, round(padded_step / case.padded_batch)))
        )
        job |= {"micro_batch": micro, "accumulation": accumulation}
    (folder / "job.json").write_text(json.dumps(job))
    python = trl_python if contestant.program == "trl" else sys.executable
    memory = DeviceMemory(device)
    with _started([python, str(PEERS), str(folder / "job.json"), str(folder / "result.json")], folder) as process:
        while process.poll() is None:
            memory.sample()
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(_message(folder))
    result: Row = json.loads((folder / "result.json").read_text())
    for key in {"pass_s", "pass_cpu_s"} & result.keys():
        result[key] = result[key][WARM_UP_PASSES:]
    return result | {"peak_device_bytes": memory.peak}


def _run_ours(contestant: Contestant, given: Prepared, device: str, folder: Path) -> Row:
    """`python -m micota_fast.train`: a progress report a pass, whose row of metrics.jsonl has the pass's speed.

    The run has one more pass, in which it is ended once the figures are there: what follows a run's last step is a
    checkpoint, which has no part in the figures.
    """
    case, steps, passes = given.case, given.steps, WARM_UP_PASSES + MEASURED_PASSES
    config = {
        "model": str(given.folder / "model"),
        "data": str(given.folder / "corpus.jsonl"),
        "out": str(folder / "out"),
        "chat": {"use_template": False, "system": None, "prompt": "{problem}"},
        "device": device,
        "dtype": contestant.dtype,
        "pack_tokens": case.pack_tokens,
        "packs_per_step": case.packs_per_step,
        "epochs": passes + 1,
        "lr": LR,
        "betas": BETAS,
        "warmup_ratio": 0.0,
        "min_lr_ratio": 1.0,
        "log_every": steps,
        "checkpoint_every": steps * (passes + 1),
        **contestant.options,
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    metrics, memory = folder / "out" / "metrics.jsonl", DeviceMemory(device)
    with _started([sys.executable, "-m", "micota_fast.train", str(folder / "config.yaml")], folder) as process:
        cpu: list[float] = []  # at the end of each pass
        while len(cpu) < passes:
            ended, rows = process.poll() is not None, _rows(metrics)
            if len(rows) >= steps * (len(cpu) + 1):
                cpu.append(cpu_seconds(process.pid))
            elif ended:
                raise RuntimeError(f"ended after {len(rows)} of {steps * passes} steps: {_message(folder)}")
            memory.sample()
            time.sleep(0.02)
        peak = peak_rss_bytes(process.pid)
        process.kill()
    by_pass = [rows[n * steps : (n + 1) * steps] for n in range(WARM_UP_PASSES, passes)]
    for of_pass in by_pass:
        counted = tuple(sum(row[key] for row in of_pass) for key in ("tokens", "supervised"))
        if counted != (given.tokens, given.supervised):
            raise RuntimeError(f"{counted} tokens and supervised ones in a pass of {given.tokens}, {given.supervised}")
    said = re.search(r"^attention: (\w+)", (folder / "output.txt").read_text(), re.MULTILINE)
    return {
        "pass_s": [given.tokens / of_pass[-1]["timing"]["tokens_per_s"] for of_pass in by_pass],
        "pass_cpu_s": [after - before for before, after in itertools.pairwise(cpu)][WARM_UP_PASSES - 1 :],
        "loss": sum(row["loss"] for row in by_pass[-1]) / steps,
        "peak_rss_bytes": peak,
        "peak_device_bytes": memory.peak,
        "attention": said and said[1],
    }


def cpu_seconds(process: int) -> float:
    """Seconds for which processors have worked for it so far, on Linux (proc_pid_stat(5): utime and stime)."""
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


class DeviceMemory:
    """The most memory in use on the GPU, as often as one asks, above what was in use at the beginning.

    Attributes:
        peak: bytes; None on a CPU.
    """

    def __init__(self, device: str) -> None:
        self.peak = 0 if device == "cuda" else None
        self._before, self._next = self._in_use() if device == "cuda" else 0, 0.0

    def sample(self) -> None:
        """Look, at most twice a second."""
        if self.peak is not None and time.monotonic() >= self._next:
            self.peak = max(self.peak, self._in_use() - self._before)
            self._next = time.monotonic() + 0.5

    def _in_use(self) -> int:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20


def _started(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """In the repository, so that `micota_fast` is this one, installed or not; dies with us."""
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            preexec_fn=die_with_parent,
        )


def _message(folder: Path) -> str:
    return last_line((folder / "output.txt").read_text(errors="replace"))


def _rows(metrics: Path) -> list[Row]:
    """The whole lines of a file that is being written."""
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n")[:-1]]


GEMM = "bare GEMM"
PACKED, PADDED = {"packing": True, "liger": False}, {"packing": False, "liger": False}
ON_CPU = (
    Contestant(GEMM, "float32", "gemm", {}),
    Contestant(GEMM, "bfloat16", "gemm", {}),
    Contestant("micota", "float32", None, {}),
    Contestant("micota, compiled", "float32", None, {"compile": True}),
    Contestant("plain loop", "float32", "plain", {}),
    Contestant("trl packed", "float32", "trl", {**PACKED, "activation_checkpointing": False}),
    Contestant("trl padded", "float32", "trl", {**PADDED, "activation_checkpointing": False}),
    Contestant("micota", "bfloat16", None, {}),
    Contestant("trl packed", "bfloat16", "trl", {**PACKED, "activation_checkpointing": False}),
)
# Adapters of rank 16 on all seven matrices of a block, as `lora: {}` means, next to the training of all weights.
WITH_LORA = (
    Contestant("micota", "float32", None, {}),
    Contestant("micota, LoRA", "float32", None, {"lora": {}}),
    Contestant("trl packed", "float32", "trl", {**PACKED, "activation_checkpointing": False}),
    Contestant(
        "trl packed, peft",
        "float32",
        "trl",
        {**PACKED, "activation_checkpointing": False, "lora": asdict(LoraConfig())},
    ),
)
# TRL recomputes whole blocks in the backward pass unless told otherwise; without that 16k tokens do not fit.
ON_GPU = (
    Contestant("micota", "bfloat16", None, {"activation_checkpointing": "selective"}),
    Contestant("micota, compiled", "bfloat16", None, {"activation_checkpointing": "selective", "compile": True}),
    Contestant("plain loop", "bfloat16", "plain", {}),
    Contestant("trl packed", "bfloat16", "trl", {**PACKED, "activation_checkpointing": True}),
    Contestant("trl packed, liger", "bfloat16", "trl", {**PACKED, "activation_checkpointing": True, "liger": True}),
    Contestant("trl padded, liger", "bfloat16", "trl", {**PADDED, "activation_checkpointing": True, "liger": True}),
)
