"""What somebody may well type wrongly, each with the words of the answer that put it right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from micota_fast.cli import main
from micota_fast.common.importing import imported
from micota_fast.config.loader import describe
from micota_fast.config.shipped import RECIPES
from micota_fast.config.suggestions import OTHER_KEYS, OTHER_VERBS, RELATED_KEYS, SAME_KEYS, closest_key
from micota_fast.pipeline.stages import VERBS

STUDENT = ROOT / "micota_fast" / "micro" / "checkpoints" / "student"  # MODEL in the lines below
ROW = '{"problem": "1 + 1?", "completion": "2"}\n'
GPT2 = '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
PAIR = '{"prompt": "x", "chosen": "a", "rejected": "b"}'
TRAIN = "model: m\ndata: rows.jsonl\nout: out\n"
RECIPE = """name: mine
problems:
  train: {path: problems.jsonl}
models:
  student: {checkpoint: org/name}
corpora:
  long:
    file: long.jsonl
  short: {file: short.jsonl}
student: student
arms:
  short: short
  long: lnog
evaluate:
  benchmarks: [{preset: gsm8k, path: gsm8k.jsonl}]
"""
MERGE = """merge_method: dare_ties
base_model: a/b
models:
  - model: c/d
    parameters: {weight: 0.5}
dtype: bfloat16
"""
# The command line, files by name, and what the message says.
WRONG: list[tuple[str, dict[str, str], str]] = [
    # Verbs
    ("trian c.yaml", {}, "trian: no such verb; did you mean `train`?"),
    ("eval c.yaml", {}, "did you mean `evaluate`?"),
    ("sft c.yaml", {}, "did you mean `train`?"),
    ("benchmark data", {}, "did you mean `benchmarks`?"),
    ("Merge a.yaml b", {}, "did you mean `merge`?"),
    ("lengthsweep c.yaml", {}, "did you mean `length-sweep`?"),
    ("brew c.yaml", {}, "brew: no such verb; verbs: run, plan, doctor"),
    # Words
    ("train --lr 1e-4", {}, "--lr: no such option; options are set by --set: --set lr=1e-4"),
    ("train c.yaml --learning-rate=1e-4", {"c.yaml": TRAIN}, "--set lr=1e-4"),
    ("train c.yaml --num_train_epochs 3", {"c.yaml": TRAIN}, "--set epochs=3"),
    ("train c.yaml --bf16", {"c.yaml": TRAIN}, "--set dtype=VALUE"),
    ("run micro --lr 1e-4", {}, "--set train.lr=1e-4"),
    ("plan micro --dollars-per-hour 3", {}, "did you mean `--dollars-per-gpu-hour`?"),
    ("evaluate --limit 9", {}, "--limit: no such option; it is `benchmarks[i].limit` in the file of options"),
    ("generate --api-key sk-1", {}, "--set openai.key_env=VARIABLE"),
    ("train --optim adamw_8bit", {}, "--set optimizer_states=VALUE"),
    ("train --warmup_steps=100", {}, "--set warmup_ratio=VALUE"),
    ("serve m --port 30000", {}, "--set port=30000"),
    ("serve m --tensor-parallel-size 2", {}, "--set tp=2"),
    ("run micro --dry", {}, ""),  # a beginning is enough
    ("run micro --colour", {}, "--colour: no such option; `micota run --help` lists them"),
    ("train --set model PATH", {}, "--set model: expected KEY=VALUE in one word: --set model=PATH"),
    ("train c.yaml --set lr", {"c.yaml": TRAIN}, "--set lr=VALUE"),
    ("train c.yaml lr=1e-4", {"c.yaml": TRAIN}, "lr=1e-4: too many words; options: --set KEY=VALUE"),
    # Keys
    ("train --set learning_rate=1e-4", {}, "`learning_rate`: unknown key; did you mean `lr`?"),
    ("train c.yaml", {"c.yaml": TRAIN + "epoch: 3\n"}, "c.yaml, line 4: `epoch`: unknown key; did you mean `epochs`?"),
    ("train c.yaml", {"c.yaml": TRAIN + "Lr: 3\n"}, "did you mean `lr`?"),
    ("train c.yaml", {"c.yaml": TRAIN + "max_seq_length: 4096\n"}, "did you mean `pack_tokens`?"),
    ("train c.yaml", {"c.yaml": TRAIN + "system: Hello\n"}, "did you mean `chat.system`?"),
    ("train c.yaml", {"c.yaml": TRAIN + "chat:\n  sytem: Hello\n"}, "line 5: `chat.sytem`: unknown key; did you mean"),
    ("run micro --set lr=1e-4", {}, "did you mean `train.lr`?"),
    ("run micro --set train.learning_rate=1e-4", {}, "did you mean `train.lr`?"),
    ("run micro --set arm.mid=mid", {}, "did you mean `arms`?"),
    ("generate --set max_tokens=9", {}, "did you mean `max_new_tokens`?"),
    ("run micro --set evaluate.limit=9", {}, "did you mean `evaluate.benchmarks[i].limit`?"),
    ("train --set max_samples=9", {}, "`max_samples`: unknown key; known here: "),
    ("run micro --set seed=3", {}, "did you mean `seeds`?"),
    ("train c.yaml", {"c.yaml": "lr: 1e-4\n"}, "`model`: this key is required, and so are `data`, `out`"),
    # Values, and where they stand
    ("run r.yaml", {"r.yaml": RECIPE}, "r.yaml, line 13: `arms.long` names the corpus 'lnog'; did you mean `long`?"),
    (
        "run r.yaml --set arms={long:lnog}",
        {"r.yaml": RECIPE},
        "`long:lnog` needs a space after the colon: {long: lnog}",
    ),
    ("run r.yaml --set arms.long=longer", {"r.yaml": RECIPE}, "--set arms.long=longer: `arms.long` names the corpus"),
    ("run r.yaml", {"r.yaml": RECIPE.replace("student: s", "student: S")}, "line 10: `student` names the model"),
    ("train c.yaml", {"c.yaml": TRAIN + "dtype: bf16\n"}, "bfloat16, float32, not 'bf16'; did you mean `bfloat16`?"),
    ("merge m.yaml o", {"m.yaml": MERGE.replace("dare_ties", "dare-ties")}, "did you mean `dare_ties`?"),
    ("merge m.yaml o", {"m.yaml": MERGE.replace("weight:", "weigth:")}, "unknown key; did you mean `weight`?"),
    ("merge m.yaml o", {"m.yaml": MERGE.replace("dtype:", "dtpye:")}, "m.yaml, line 6: `dtpye`: unknown key; did you"),
    ("train c.yaml", {"c.yaml": TRAIN + "lr: -1\n"}, "c.yaml, line 4: `lr` must be above 0"),
    ("length-sweep --set weights=0.4,0.8", {}, "`weights`: must be a list: [0.4,0.8]"),
    ("evaluate c.yaml", {"c.yaml": "benchmarks: [{preset: gsm9k}]\n"}, "there is no 'gsm9k'; did you mean `gsm8k`?"),
    ("train c.yaml", {"c.yaml": TRAIN + "early_stop: 3\n"}, "line 4: `early_stop` needs `validation_data`"),
    # What is not there
    ("run micota-qwen2.5-14b", {}, "did you mean `micota-qwen2.5-7b`? Shipped: micota-qwen2.5-3b, micota-qwen2.5-7b"),
    ("run mine.yaml", {}, "mine.yaml: no such file, and no shipped recipe; shipped: "),
    ("train c.yaml", {"c.yaml": TRAIN}, "m: no such folder; name a checkpoint's folder, or a model of the hub as"),
    ("train c.yaml --set model=a/b", {"c.yaml": TRAIN}, "cannot read rows.jsonl: No such file"),
    # What is there and is not what it should be
    ("train c.yaml --set model=.", {"c.yaml": TRAIN, "rows.jsonl": ROW}, "config.json: no such file; a checkpoint"),
    ("train c.yaml --set model=.", {"c.yaml": TRAIN, "rows.jsonl": ROW, "config.json": GPT2}, "GPT2LMHeadModel"),
    ("serve .", {"config.json": GPT2}, "GPT2LMHeadModel"),
    ("serve nowhere", {}, "nowhere: no such folder; name a checkpoint's folder"),
    ("train --set model=a/b --set data=. --set out=o", {}, "cannot read .: Is a directory; name a file in it"),
    ("train c.yaml --set model=MODEL", {"c.yaml": TRAIN, "rows.jsonl": ""}, "rows.jsonl: the file has no rows"),
    ("train c.yaml --set model=MODEL", {"c.yaml": TRAIN, "rows.jsonl": '{"problem": "x'}, "rows.jsonl:1: not JSON"),
    ("train c.yaml --set model=MODEL", {"c.yaml": TRAIN, "rows.jsonl": PAIR}, "rows.jsonl:1: a preference pair"),
    ("train c.yaml --set model=MODEL --set out=c.yaml", {"c.yaml": TRAIN, "rows.jsonl": ROW}, "into c.yaml: it is"),
    ("align --set model=a/b --set out=f/x --set corpora.a=f", {"f": ROW}, "into f/x: f is not a folder; choose"),
    ("train c.yaml --set model=MODEL --set chat.template=t", {"c.yaml": TRAIN, "rows.jsonl": ROW}, "t: no such Jinja"),
    (
        "train c.yaml --set model=MODEL --set chat.template=t",
        {"c.yaml": TRAIN, "rows.jsonl": ROW, "t": "{% for m in messages %}"},
        "t: line 1 of the chat template",
    ),
    ("options srve", {}, "did you mean `serve`? `micota options` lists them"),
    ("options train.chta", {}, "`micota options` lists them"),
]


@pytest.mark.parametrize(("line", "files", "said"), WRONG, ids=[f"{n}, {line}" for n, (line, _, _) in enumerate(WRONG)])
def test_the_answer_names_the_remedy(
    line: str,
    files: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main([word.replace("MODEL", str(STUDENT)) for word in line.split()]) == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_other_projects_names_stand_for_options_and_verbs_of_ours() -> None:
    ours = {
        row[0].rpartition(".")[2] for verb in VERBS.values() if verb.options for row in describe(imported(verb.options))
    }
    assert not {key for key, name in OTHER_KEYS.items() if name not in ours}
    assert not OTHER_KEYS.keys() & ours - {"max_tokens", "dataset"}, "a name of ours stands for itself"
    for names in (SAME_KEYS, RELATED_KEYS):
        assert list(names) == sorted(names)
    assert not SAME_KEYS.keys() & RELATED_KEYS.keys()
    assert not {verb for verb, name in OTHER_VERBS.items() if name not in VERBS or verb in VERBS}


def test_what_is_missing_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "torn.jsonl").write_text('{"problem": "1 +')
    cases = {
        f"train --set model={STUDENT} --set data=torn.jsonl --set out=o": "torn.jsonl:1: not JSON",
        "train --set model=/nowhere --set data=rows.jsonl --set out=o": "/nowhere: no such folder",
        "train --set model=a/b --set data=rows.jsonl --set out=o": "cannot read rows.jsonl: No such file",
        "train --set model=a/b --set data=hf://datasets/a/b --set out=o --set validation_data=v": "cannot read v",
        "train --set model=a/b --set data=rows.parquet --set out=o": "pip install 'micota-fast[parquet]'",
        "train --set model=a/b --set data=rows.jsonl --set out=o --set wandb=mine": "pip install 'micota-fast[wandb]'",
        "train --set model=a/b --set data=rows.jsonl --set out=o --set tensorboard=true": "micota-fast[tensorboard]",
        "align --set model=a/b --set out=o --set corpora.a=rows.jsonl": "cannot read rows.jsonl: No such file",
    }
    program = (
        "import json, sys\n"
        "sys.modules |= dict.fromkeys(('pyarrow', 'wandb', 'tensorboard'))\n"
        "from micota_fast.cli import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    assert main(line.split()) == 2\n"
        "    print('--', file=sys.stderr)\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, json.dumps(list(cases))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for answer, said in zip(done.stderr.split("--\n"), cases.values(), strict=False):
        assert said in answer


def test_the_help_of_a_recipe_names_each_section_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 100
    assert sum(line.startswith("  evaluate.serve: engine, host") for line in lines) == 1
    assert main(["options", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "evaluate.serve.*: as generate.serve.*" in lines
    assert len([line for line in lines if line.startswith("  ") and ".allow_hosts = " in line]) == 1


@pytest.mark.parametrize(("name", "line"), [("serve", "  port = "), ("train.chat", "  chat.system = "), ("claims", "")])
def test_options_explains_a_verb_or_a_section(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", name]) == 0
    assert line in capsys.readouterr().out
    assert main(["options"]) == 0
    assert name in capsys.readouterr().out


def test_a_dry_run_names_all_that_a_stage_waits_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(RECIPES / "micro.yaml"), "--dry-run", "--out", str(tmp_path / "run")]) == 0
    waiting = [line.partition("  after ")[2] for line in capsys.readouterr().out.splitlines() if "  after " in line]
    assert any(", " in names for names in waiting)


def test_a_dry_run_says_first_what_is_missing_and_refuses_as_the_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "micota-qwen2.5-7b", "--set", f"data_dir={tmp_path}", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert all(line.startswith("missing: ") for line in lines[:6])
    assert lines[5].endswith("math_train.jsonl")
    assert any(line.startswith("evaluate/base ") for line in lines[6:])
    assert captured.err == "micota run: the run cannot start: 6 missing, listed above the stages\n"
    for line in lines[:6]:
        Path(line.rpartition(": ")[2]).write_text("{}\n")
    assert main(words) == 0
    assert "missing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "hints"),
    [
        (
            "train",
            "cutoff_len pack_tokens, per_device_train_batch_size packs_per_step, gradient_accumulation_steps "
            "packs_per_step, num_train_epochs epochs, learning_rate lr, lr_scheduler_type min_lr_ratio, eval_strategy "
            "validate_every, save_strategy checkpoint_every, finetuning_type lora, lora_r lora.rank, lora_alpha "
            "lora.alpha, optim optimizer_states, deepspeed mesh.shard, val_size validation_data, bf16 dtype, template "
            "chat.template, kd_temperature soft.temperature",
        ),
        (
            "generate",
            "max_tokens max_new_tokens, tensor_parallel_size serve.tp, gpu_memory_utilization serve.args, "
            "mem_fraction_static serve.args, max_model_len serve.context_length, max_num_seqs serve.max_running, n "
            "samples, do_sample temperature, base_url url, api_key openai.key_env, enable_thinking "
            "chat.template_kwargs, system_message chat.system, timeout request_timeout_s, num_examples limit",
        ),
        (
            "evaluate",
            "limit benchmarks[i].limit, num_fewshot chat.prompt, tasks benchmarks, metric benchmarks[i].rule, "
            "max_gen_toks max_new_tokens, until stop, repeats samples, apply_chat_template chat.use_template, "
            "output_path out, system_instruction chat.system, gpu_memory_utilization serve.args, pretrained model",
        ),
    ],
)
def test_names_of_other_projects_lead_to_our_option(verb: str, hints: str) -> None:
    keys = [row[0] for row in describe(imported(VERBS[verb].options or ""))]
    wanted = dict(pair.split() for pair in hints.split(", "))
    assert {word: closest_key(word, keys) for word in wanted} == wanted
