"""Print the SHA-256 of all that the system makes, to see whether a change of the code has changed a byte.

    python scripts/output_digests.py --cwd OLD --out work/old > old.txt
    python scripts/output_digests.py --cwd NEW --out work/new > new.txt
    diff old.txt new.txt

A line is `sha256  name`; lines are sorted by name. Run both checkouts with one interpreter, since some files hold the
versions of packages, and with one that has no micota-fast of its own installed. `--quick` leaves out the run of the
recipe `micro`, which takes minutes.

Every file that a verb writes counts, and so does its name. What differs between two runs of the same code is left out:
the files in LEFT_OUT and, in those of CHANGING, these keys. What stays of a stage's done.json says what it was made of:
if that changes, `micota run` makes the stage again.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEFT_OUT = (
    *(".lock", "log.txt", "*server.log"),
    *("timing.json", "*.meters.json"),  # seconds of an evaluation; speed of a generation, and its servers' ports
    *("config.yaml", "mergekit.yaml", "generate.yaml"),  # options with places; done.json has them without
    *("making.json", "fingerprints.json"),  # a stage's start; a cache by places and times
)
TIMED = ("metrics.jsonl", "summary.json")
CHANGING = {**dict.fromkeys(TIMED, ("timing",)), "done.json": ("command", "seconds", "finished")}
METHODS = ("linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties")
PEOPLE = ("Ann", "Bob", "Cid", "Dan", "Eva", "Fay")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WHERE = """
import importlib, importlib.util, micota_fast
print(micota_fast.__file__)
if importlib.util.find_spec("micota_fast.kernels"):
    print(importlib.import_module("micota_fast.kernels").__file__)
"""


class Checkout:
    """Runs the code in `root`; files of options go to `out`."""

    def __init__(self, python: str, root: Path, out: Path) -> None:
        self._python, self._root, self._out = python, root, out
        self._module = "micota_fast" if (root / "micota_fast" / "__main__.py").exists() else "micota_fast.cli"
        for file in self.python("-c", WHERE).splitlines():
            if not Path(file).is_relative_to(root):
                sys.exit(f"{python} imports {file}, which is not in {root}: use one without micota-fast installed")

    def python(self, *arguments: object) -> str:
        """Run the interpreter; returns what it prints."""
        command = [self._python, *map(str, arguments)]
        env = os.environ | ONE_THREAD | {"PYTHONPATH": str(self._root)}
        done = subprocess.run(command, cwd=self._root, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\n{command} ended with status {done.returncode}")
        return done.stdout

    def micota(self, *arguments: object) -> None:
        """Run a verb."""
        print("micota", *arguments, file=sys.stderr, flush=True)
        self.python("-m", self._module, *arguments)

    def options(self, name: str, /, **values: Any) -> Path:
        """Write a file of options."""
        path = self._out / f"{name}.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        return path


def perturb(source: Path, target: Path, seed: int) -> str:
    """Copy a bfloat16 checkpoint, with each mantissa drawn anew and one sign in eight turned."""
    shutil.copytree(source, target)
    file, draw = target / "model.safetensors", random.Random(seed)
    content = bytearray(file.read_bytes())
    for low in range(8 + int.from_bytes(content[:8], "little"), len(content), 2):
        content[low] ^= draw.getrandbits(7)
        content[low + 1] ^= 0x80 * (draw.getrandbits(3) == 0)
    file.write_bytes(content)
    return str(target)


def write_answers(path: Path, number: int, checked: bool) -> str:
    """Write completions by rule: of each eleven, five are to be rejected, each for a reason of its own."""
    draw, rows = random.Random(number), []
    for i in range(number):
        first = value = draw.randrange(10)
        steps, lines = [], []
        for name in PEOPLE[: draw.randrange(3, 7)]:
            step, before = draw.randrange(1, 10), value
            value = (value + step) % 10
            steps.append(f"{name}+{step}")
            lines += [f"{before} {name}+{step}={value}"] + checked * [f"check {value} {name}-{step}={before}"]
        lines *= 4 if i % 11 == 6 else 1  # repetition
        row = {"id": f"sum-{i:03}", "sample": 0, "answer": str(value), "seed": None, "model": path.stem}
        row["problem"] = f"A jar holds {first}. {' '.join(steps)}. How many modulo 10?"
        box = f"\\boxed{{{value}}}"
        lines.append({3: "\\boxed{11}", 4: "unknown", 7: f"ответ {box}"}.get(i % 11, box))
        row |= {"completion": "\n".join(lines), "finish_reason": "length" if i % 11 == 5 else "stop"}
        rows.append(row | {"prompt_tokens": 60, "completion_tokens": 40 + i % 50})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def merge_models(code: Checkout, base: str, others: list[str], made: Path) -> None:
    """Merge by each method, and by one with several weights at once."""
    for method in METHODS:
        own = {"density": 0.6} if "dare" in method or method == "ties" else {}
        models = [{"model": m, "parameters": {"weight": w} | own} for m, w in zip(others, (0.6, 0.3), strict=True)]
        file: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
        file |= {"base_model": base} if method != "linear" else {}
        file |= {"models": [{"model": others[0]}], "parameters": {"t": 0.4}} if method == "slerp" else {}
        code.micota("merge", code.options(method, **file), made / method, "--seed", 7)
    parameters = {"weight": 0.5, "density": 0.5}
    file = {"merge_method": "dare_ties", "base_model": base, "models": [{"model": others[0]}], "parameters": parameters}
    code.micota("merge", code.options("weights", **file), made / "weights", "--seed", 7, "--weights", 0.3, 0.6)


def run_verbs(code: Checkout, shipped: Path, out: Path, made: Path) -> None:
    """Run each verb on little data, shipped or made here where it can be, so that a change shows where it happens."""
    checkpoints = shipped / "checkpoints"
    base, student = (str(shutil.copytree(checkpoints / name, out / name)) for name in ("assistant", "student"))
    merge_models(code, base, [perturb(Path(base), out / f"other-{seed}", seed) for seed in (1, 2)], made / "merge")

    def run(verb: str, name: str, **options: Any) -> Path:
        place = made / verb / name
        code.micota(verb, code.options(f"{verb}-{name}", **options, out=str(place)))
        return place

    corpora = {}
    for name in ("long", "short"):
        answers = write_answers(out / f"{name}.jsonl", 180, name == "long")
        rules: dict[str, Any] = {"max_tokens": 85, "max_repeated": 0.5, "max_foreign": 0.1}
        corpora[name] = str(run("filter", f"{name}.jsonl", completions=answers, **rules))
    corpora["mix"] = str(run("mix", "mix.jsonl", parts={corpora["long"]: 1, corpora["short"]: 4}))

    rows, held_out = (write_answers(out / f"rows-{n}.jsonl", n, True) for n in (150, 40))
    training: dict[str, Any] = {"model": base, "data": rows, "validation_data": held_out, "seed": 3, "lr": 0.001}
    training |= {"pack_tokens": 1024, "packs_per_step": 4, "dtype": "float32", "device": "cpu", "save_dtype": "float32"}
    run("train", "1-process", **training)
    file = code.options("train-2", **training, out=str(made / "train" / "2-processes"))
    code.python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "micota_fast.train", file)

    served: dict[str, Any] = {"max_new_tokens": 64, "serve": {"dtype": "float64"}}
    sampled = served | {"samples": 3, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    problems = str(shipped / "problems" / "train.jsonl")
    run("generate", "sampled.jsonl", model=student, problems=problems, limit=12, accept={}, **sampled)
    sets = [{"name": n, "path": str(shipped / "problems" / f"{n}.jsonl"), "limit": 6} for n in ("press-4", "press-5")]
    run("evaluate", "sampled", model=student, benchmarks=sets, **sampled)
    results = str(run("evaluate", "paper", model=student, benchmarks=sets, protocol="paper", **served) / "results.json")
    align: dict[str, Any] = {"pack_tokens": 1024, "dtype": "float32", "device": "cpu", "own": corpora["short"]}
    run("align", "corpora", model=student, corpora=corpora, **align)
    found = run("contamination", "corpora", corpora=corpora, benchmarks=sets) / "contamination.json"
    sweep: dict[str, Any] = {"config": str(out / "weights.yaml"), "problems": problems, "limit": 4, "generate": served}
    run("length-sweep", "weights", weights=[0.0, 0.5], **sweep)
    run("report", "report", title="Digests", base=results, arms={"same": [results]}, contamination=str(found))
    code.micota("plan", "micro", "--out", out / "planned", "--json", made / "plan.json")


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and digest of every file that counts."""
    files = [path for path in folder.rglob("*") if path.is_file() and not any(map(path.match, LEFT_OUT))]
    timed = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name in TIMED]
    for path in files:
        content = path.read_bytes()
        if (keys := CHANGING.get(path.name)) is not None:
            rows = map(json.loads, content.splitlines() if path.suffix == ".jsonl" else [content])
            text = json.dumps([{key: row[key] for key in row if key not in keys} for row in rows])
            for digest in timed:  # as inputs and outputs in done.json
                text = text.replace(digest, "timed")
            content = text.encode()
        yield path.relative_to(folder).as_posix(), hashlib.sha256(content).hexdigest()


def main() -> None:
    """Run the code of a checkout and print the digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, metavar="INTERPRETER", help="runs the code")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new work folder; files stay in made/")
    parser.add_argument("--cwd", type=Path, default=Path(), metavar="DIR", help="root of the checkout whose code runs")
    parser.add_argument("--quick", action="store_true", help="without the run of `micro`")
    arguments = parser.parse_args()
    out, root = arguments.out.resolve(), arguments.cwd.resolve()
    out.mkdir(parents=True)
    code, made = Checkout(arguments.python, root, out), out / "made"
    run_verbs(code, next((root / "micota_fast").rglob("checkpoints/assistant")).parents[1], out, made)
    if not arguments.quick:
        code.micota("run", "micro", "--out", made / "micro")
    print("\n".join(f"{digest}  {name}" for name, digest in sorted(digests(made))))


if __name__ == "__main__":
    main()
