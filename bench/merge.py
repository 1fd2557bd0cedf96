"""How fast are three checkpoints merged, in how much memory, next to mergekit and to a plain copy of the bytes?

    .venv/bin/python bench/merge.py [--quick] [--json FILE] [--mergekit-python PATH] [--dir DIR]

Three checkpoints of Qwen2.5-0.5B's shapes in bfloat16 are made in DIR (4 GB are needed there): a base of random weights
and two models that differ from it by a tenth of their size. Each method merges them with float32 arithmetic and
bfloat16 results. The contestants take turns, each run in a fresh process, its start included, with the inputs in the
page cache; outputs are deleted after each run.

- micota: `micota merge`, which syncs what it has written. Compilation is not counted: a small merge comes first.
- mergekit: `mergekit-yaml` of the interpreter PATH (or $MERGEKIT_PYTHON), with its default options but for copying a
  tokenizer, which these checkpoints do not have. It does not sync.
- cp: `cp` of the three inputs and of the output, not synced.
- read, write: the inputs read by `cat`, the output written by `cp` and synced: the least that a merge can do.

Memory is sampled every 5 ms from /proc: the process's own (anonymous and shared), and with the mapped pages of its
files, which are the page cache's. PATH absent, mergekit is listed as absent. Rows are appended to FILE method by
method, so a run that is cut short keeps what it has.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import ROOT, append_rows, provenance
from safetensors.torch import save_file

Row = dict[str, Any]
METHODS = ("dare_ties", "ties", "linear", "slerp", "dare_linear", "task_arithmetic")
MODELS = ("base", "first", "second")
# Qwen/Qwen2.5-0.5B's config.json, as far as it gives shapes
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SMALL = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def shapes(config: Row) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Qwen2 with tied embeddings."""
    h, i = config["hidden_size"], config["intermediate_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    for layer in range(config["num_hidden_layers"]):
        within = {
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
            "mlp.down_proj.weight": (h, i),
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "self_attn.o_proj.weight": (h, h),
        }
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            within |= {f"self_attn.{name}_proj.weight": (rows, h), f"self_attn.{name}_proj.bias": (rows,)}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in within.items()}
    return found


def make_models(folder: Path, config: Row) -> int:
    """Write the checkpoints; returns the bytes of one."""
    for number, name in enumerate(MODELS):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        start, change = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
        tensors = {}
        for tensor, shape in shapes(config).items():
            values = torch.empty(shape).normal_(0, 0.02, generator=start)
            if number:
                values += torch.empty(shape).normal_(0, 0.002, generator=change)
            tensors[tensor] = values.to(torch.bfloat16)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return (folder / "base" / "model.safetensors").stat().st_size


def write_config(folder: Path, method: str) -> Path:
    """The mergekit file of a method, next to the checkpoints."""
    models: list[Row] = []
    for name, weight in zip(MODELS[1:], (0.6, 0.4), strict=True):
        parameters: Row = {"weight": weight}
        if method.startswith("dare") or method == "ties":
            parameters["density"] = 0.5
        models.append({"model": str(folder / name), "parameters": parameters})
    content: Row = {"merge_method": method, "base_model": str(folder / "base"), "models": models}
    if method == "linear":
        del content["base_model"]
        models.append({"model": str(folder / "base"), "parameters": {"weight": 1.0}})
    if method == "slerp":
        content |= {"models": [{"model": str(folder / "first")}], "parameters": {"t": 0.4}}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content | {"dtype": "float32", "out_dtype": "bfloat16"}))
    return path


def measure(command: list[str]) -> tuple[float, int, int]:
    """Seconds, peak bytes of its own memory, peak bytes with mapped files."""
    own = mapped = 0
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except (OSError, ValueError):
                break
            kb = {key: int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem", "RssFile")}
            own = max(own, kb["RssAnon"] + kb["RssShmem"])
            mapped = max(mapped, sum(kb.values()))
            time.sleep(0.005)
        process.wait()
        seconds = time.perf_counter() - started
        if process.returncode:
            assert process.stdout is not None
            raise RuntimeError(f"{' '.join(command)}: status {process.returncode}\n{process.stdout.read()[-2000:]}")
    return seconds, own * 1024, mapped * 1024


def contestants(folder: Path, method: str, mergekit: str | None) -> dict[str, list[str]]:
    """Their commands; each leaves folder/out."""
    config, out = write_config(folder, method), folder / "out"
    used = [folder / name / "model.safetensors" for name in (MODELS[:2] if method == "slerp" else MODELS)]
    files = " ".join(map(str, used))
    copied = f"{files} {folder / 'base' / 'model.safetensors'}"  # as large as the output
    each = f'for f in {copied}; do n=$((n+1)); cp "$f" {out}/$n; done'
    least = f"cat {files} > /dev/null && cp {used[0]} {out}/1 && sync {out}/1"
    commands = {
        "micota": [sys.executable, "-m", "micota_fast", "merge", str(config), str(out)],
        "cp": ["sh", "-c", f"mkdir {out} && {each}"],
        "read, write": ["sh", "-c", f"mkdir {out} && {least}"],
    }
    if mergekit is not None:
        program = [mergekit, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--quiet", "--no-copy-tokenizer"]
        commands["mergekit"] = program
    return commands


def compare(folder: Path, method: str, mergekit: str | None, runs: int) -> dict[str, Row]:
    """The contestants' figures for one method."""
    commands = contestants(folder, method, mergekit)
    measured: dict[str, list[tuple[float, int, int]]] = {name: [] for name in commands}
    for turn in range(-1, runs):  # the first is not counted: it compiles, and brings everything into the page cache
        for name, command in commands.items():
            if turn >= 0 or name != "mergekit":
                taken = measure(command)
                measured[name] += [taken] if turn >= 0 else []
                shutil.rmtree(folder / "out")
    rows = {}
    for name, taken in measured.items():
        seconds, own, mapped = zip(*taken, strict=True)
        rows[name] = {
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "peak_own_bytes": max(own),
            "peak_mapped_bytes": max(mapped),
        }
    for row in rows.values():
        row |= {f"of_{key}": row["median_s"] / rows[name]["median_s"] for key, name in RATIOS.items() if name in rows}
    return rows


RATIOS = {"cp": "cp", "read_write": "read, write", "mergekit": "mergekit"}


def version_of(mergekit: str | None) -> str | None:
    """mergekit's version in that interpreter; None if it has none."""
    if not mergekit:
        return None
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    try:
        done = subprocess.run([mergekit, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> None:
    """Measure, print a table, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, two methods, one run: seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    parser.add_argument("--mergekit-python", metavar="PATH", default=os.environ.get("MERGEKIT_PYTHON"))
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, and deleted; default: the system's")
    arguments = parser.parse_args()
    runs = 1 if arguments.quick else 3
    mergekit = arguments.mergekit_python if version_of(arguments.mergekit_python) else None
    common: Row = {"benchmark": "merge", "runs": runs, "threads": len(os.sched_getaffinity(0))}
    common |= provenance("micota-fast", "numba", "numpy")
    common["versions"] = {**common["versions"], "mergekit": version_of(mergekit)}

    def save(row: Row) -> None:
        if arguments.json:
            append_rows(arguments.json, [common | row])

    if mergekit is None:
        reason = f"not in {arguments.mergekit_python}" if arguments.mergekit_python else "no --mergekit-python"
        save({"contestant": "mergekit", "status": "absent", "reason": reason})
        print(f"absent: mergekit: {reason}")
    config = CONFIG | (SMALL if arguments.quick else {})
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        size = make_models(folder, config)
        print(
            f"{len(MODELS)} checkpoints of {size / 1e6:,.1f} MB; median of {runs} runs [min, max]; {common['machine']}"
        )
        print(f"{'':16} {'':12} {'s':>8} {'':>18} {'of cp':>7} {'of r/w':>7} {'mergekit':>8} {'MiB':>7} {'+ files':>8}")
        for method in ("ties", "dare_ties") if arguments.quick else METHODS:
            for contestant, row in compare(folder, method, mergekit, runs).items():
                about = {"method": method, "contestant": contestant, "status": "measured", "bytes": size}
                save(about | row | {"load": os.getloadavg()[0]})
                span = f"[{row['min_s']:.2f}, {row['max_s']:.2f}]"
                ratio = f"{row['of_mergekit']:8.3f}" if "of_mergekit" in row else f"{'':8}"
                print(
                    f"{method:16} {contestant:12} {row['median_s']:8.2f} {span:>18} {row['of_cp']:7.2f} "
                    f"{row['of_read_write']:7.2f} {ratio} {row['peak_own_bytes'] / 2**20:7.0f} "
                    f"{row['peak_mapped_bytes'] / 2**20:8.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
