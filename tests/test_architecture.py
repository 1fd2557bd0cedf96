"""The house rules that can be read off the sources: who may import whom, and what the command line may not load.

There are no exceptions: a rule that fails here is mended in the code, or changed here with the design.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.paths import ROOT
from micota_fast.pipeline.stages import VERBS

# Folder (or module in the package's root) -> those that its modules may import, also inside functions. Everything may
# import itself, and `errors`. Upwards in this list: libraries, stages, what runs the stages, the command line.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "common": set(),
    "statistics": set(),
    "kernels": set(),
    "config": {"common"},
    "sources": {"common"},
    "chat": {"common", "config"},
    "model": {"common", "config"},
    "grading": {"common", "config"},
    "data": {"chat", "common", "config", "sources"},
    # Stages. They meet in files; what one takes of another is a library of it, and never the module of its verb.
    "corpus": {"chat", "common", "config", "grading", "sources", "statistics"},
    "serve": {"chat", "common", "config", "model"},
    "generation": {"chat", "common", "config", "corpus", "grading", "model", "serve", "sources"},
    "scoring": {"chat", "common", "config", "data", "generation", "model", "sources"},
    "train": {"chat", "common", "config", "data", "kernels", "model", "sources"},
    "merge": {"chat", "common", "config", "model"},
    "alignment": {"chat", "common", "config", "data", "kernels", "model", "sources", "statistics"},
    "evaluation": {"common", "config", "generation", "grading", "model", "sources", "statistics"},
    "length_sweep": {"chat", "common", "config", "generation", "grading", "merge", "report", "sources", "statistics"},
    "report": {"alignment", "common", "config", "corpus", "evaluation", "sources", "statistics"},
    # What knows the stages.
    "pipeline": {"chat", "common", "config", "data", "merge", "report", "sources"},
    "planning": {
        "chat",
        "common",
        "config",
        "corpus",
        "evaluation",
        "kernels",
        "model",
        "pipeline",
        "serve",
        "sources",
        "train",
    },
    "micro": {"alignment", "chat", "common", "config", "data", "model"},
    "cli": {"common", "config", "pipeline"},
    "__main__": {"cli"},
}
# Doors of a package (`python -m micota_fast.PACKAGE`) lead to the command line, whatever their folder may import.
DOORS = {"micota_fast.train.__main__": {"cli"}}
# (importer, module of a verb): stages that hold another stage's object instead of starting its process.
HOLDS = {
    ("micota_fast.evaluation.evaluate", "micota_fast.generation.generate"),
    ("micota_fast.evaluation.judge", "micota_fast.generation.generate"),
    ("micota_fast.generation.servers", "micota_fast.serve.serve"),
}

STAGE_FOLDERS = {"corpus", "serve", "generation", "scoring", "train", "merge", "alignment", "evaluation"}
STAGE_FOLDERS |= {"length_sweep", "report"}
FOLDERS_OF_TESTS = {"bench", "docs", "fake_cuda", "helpers", "scripts"}  # besides those of the packages
# What is done in one place: a call -> the modules that may make it.
ONE_PLACE = {
    "fcntl.flock": {"micota_fast.common.files", "micota_fast.common.lock"},
    "hashlib.file_digest": {"micota_fast.common.fingerprint"},
    # Ours by their places; the others load packages that may be absent.
    "importlib.import_module": {
        "micota_fast.common.importing",
        "micota_fast.model.attention",
    },
    "json.dump": set(),
    "json.load": set(),
    # Between a process and its worker; the last is the worker that reads what may be hostile, within its limits.
    "json.loads": {
        "micota_fast.common.json_io",
        "micota_fast.grading.grader",
        "micota_fast.grading.worker",
        "micota_fast.chat.worker",
    },
    "os.rename": set(),
    "os.replace": set(),
    "save_file": set(),
}

VERB_MODULES = {row.function.partition(":")[0] for row in VERBS.values()}


class Import(NamedTuple):
    """One imported module of ours, or name of it."""

    module: str
    name: str | None  # None: the module itself
    line: int


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for package, folder in (("micota_fast", ROOT / "micota_fast"), ("micota_fast.kernels", ROOT / "kernels")):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


MODULES = modules()
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from statements(child)


def imports(module: str) -> Iterator[Import]:
    """What a module imports of ours."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in statements(TREES[module]):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [
                (f"{base}.{a.name}", None) if f"{base}.{a.name}" in MODULES else (base, a.name) for a in node.names
            ]
        else:
            continue
        yield from (Import(name, part, node.lineno) for name, part in names if name in MODULES)


IMPORTS = {module: list(imports(module)) for module in MODULES}


def folder(module: str) -> str:
    return [*module.split("."), ""][1]


def where(module: str, line: int) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{line}"


def test_folders_import_only_what_stands_below_them() -> None:
    assert {folder(module) for module in MODULES} - {""} == ALLOWED.keys(), "each folder has its line in ALLOWED"
    allowed = {m: ALLOWED.get(folder(m), set()) | DOORS.get(m, set()) | {folder(m), "errors", ""} for m in MODULES}
    wrong = [
        f"{where(module, found.line)} imports {found.module}"
        for module, imported in IMPORTS.items()
        for found in imported
        if folder(module) and folder(found.module) not in allowed[module]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_itself_has_no_circle() -> None:
    """So that "below" means something: the lines of ALLOWED are in an order."""
    seen: set[str] = set()
    open_ = {name: set(allowed) for name, allowed in ALLOWED.items()}
    while ready := {name for name, allowed in open_.items() if allowed <= seen} - seen:
        seen |= ready
    assert seen == open_.keys()


def test_no_stage_imports_the_module_of_another_stages_verb() -> None:
    found = {
        (module, each.module): where(module, each.line)
        for module, imported in IMPORTS.items()
        for each in imported
        if each.module in VERB_MODULES and folder(module) in STAGE_FOLDERS - {folder(each.module)}
    }
    assert found.keys() == HOLDS, found


def test_the_report_knows_of_the_stages_only_what_their_results_are() -> None:
    found = {i.module: where(m, i.line) for m, imported in IMPORTS.items() if folder(m) == "report" for i in imported}
    of_stages = {module for module in found if folder(module) in STAGE_FOLDERS - {"report"}}
    assert of_stages <= {f"micota_fast.{name}.results" for name in STAGE_FOLDERS}, found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even in functions, where Python would allow it."""
    below = {m: {i.module for i in found if i.module != m} for m, found in IMPORTS.items()}
    while loose := {m for m in below if not below[m] or not any(m in others for others in below.values())}:
        below = {module: others - loose for module, others in below.items() if module not in loose}
    assert not below, f"in circles, or between them: {below}"


def test_no_private_name_is_used_across_modules() -> None:
    """Neither imported, nor taken from a module, nor from an object whose class another module defines."""
    defined = {module: set(private_names(TREES[module])) for module in MODULES}
    everywhere = set().union(*defined.values())
    wrong = [
        f"{where(module, found.line)}: {found.module}.{found.name}"
        for module, imported in IMPORTS.items()
        for found in imported
        if is_private(found.name or "")
    ]
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                ours = node.attr in everywhere - defined[module]
                if ours and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    wrong.append(f"{where(module, node.lineno)}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """What a module defines with a leading underscore: functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names = [node.id if isinstance(node, ast.Name) else node.attr]
        else:
            continue
        yield from filter(is_private, names)


def test_what_has_one_place_is_done_nowhere_else() -> None:
    wrong = [
        f"{where(module, node.lineno)} calls {called}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and module not in ONE_PLACE.get(called := ast.unparse(node.func), {module})
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_defined_that_nothing_uses() -> None:
    """Functions, classes, methods and constants whose name stands nowhere else but in tests. Overrides do not count."""
    texts = [file.read_text(encoding="utf-8") for file in MODULES.values()]
    for program in ("bench/*.py", "scripts/*", "pyproject.toml"):
        texts += [file.read_text(encoding="utf-8") for file in ROOT.glob(program) if file.is_file()]
    seen = Counter(word for text in texts for word in re.findall(r"\w+", text))
    unused = [
        f"{where(module, node.lineno)}: {name}"  # type: ignore[attr-defined]
        for module, tree in TREES.items()
        for name, node in definitions(tree)
        if seen[name] == 1
    ]
    assert not unused, "\n".join(unused)


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """What a module defines by name, without special methods and those of classes that have bases."""
    overriding = {
        child for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases for child in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node not in overriding:
            if not node.name.startswith("__"):
                yield node.name, node
        elif isinstance(node, ast.Assign) and node in tree.body:
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))


def test_no_function_is_written_twice() -> None:
    """Neither in the package nor in the tests: the body of one is the other's, to the letter."""
    found: dict[str, list[str]] = {}
    for file in [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "_":  # registered with torch
                body = node.body[1:] if ast.get_docstring(node) else node.body
                text = "\n".join(map(ast.unparse, body))
                if len(text) > 80:
                    found.setdefault(text, []).append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not [places for places in found.values() if len(places) > 1]


def test_the_tests_mirror_the_packages() -> None:
    packages = {folder(module) for module in MODULES if module.count(".") > 1} | {"kernels"}
    tested = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert tested == packages | FOLDERS_OF_TESTS
    loose = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    of_all = {"architecture", "cli", "english", "examples", "hostile_rows", "python_api", "wrong_inputs"}
    assert loose == {f"test_{name}" for name in of_all}, "a test of one package belongs into its folder"


def test_options_and_common_need_neither_torch_nor_a_server() -> None:
    heavy = {"torch", "triton", "numba", "transformers", "aiohttp", "matplotlib", "math_verify", "tokenizers"}
    allowed = {"micota_fast.common.numba_cache": {"numba"}}
    for module, tree in TREES.items():
        if folder(module) not in ("config", "common", "statistics", "cli", "errors"):
            continue
        for node in statements(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            loaded = {name.partition(".")[0] for name in names} & heavy - allowed.get(module, set())
            assert not loaded, f"{where(module, node.lineno)} imports {loaded}"  # type: ignore[attr-defined]


TORCH = {"torch", "triton", "transformers"}
LIBRARIES = {"numba", "matplotlib", "math_verify", "aiohttp"}


@pytest.mark.parametrize(
    ("arguments", "status", "absent"),
    [
        pytest.param(["--help"], 0, TORCH | LIBRARIES | {"numpy", "tokenizers"}, id="help"),
        *(
            pytest.param([verb, "--help"], 0, TORCH | LIBRARIES | {"numpy"}, id=f"{verb} --help")
            for verb in ("train", "run")
        ),
        pytest.param(["run", "micro", "--dry-run"], 0, TORCH | LIBRARIES, id="dry run"),
        # A mistake shows before anything slow is imported. A plan that is made needs torch: it counts parameters, FLOPs
        # and memory on the trainer's own decoder, so that no second formula can drift from it.
        pytest.param(["plan", "micro", "--set", "seedz=1"], 2, TORCH | LIBRARIES, id="plan, wrong option"),
        pytest.param(["plan", "micro", "--gpu", "h1000"], 2, TORCH | LIBRARIES, id="plan, wrong GPU"),
        pytest.param(["plan", "micro", "--assume", "mfu=1"], 2, TORCH | LIBRARIES, id="plan, wrong assumption"),
        pytest.param(["plan", "micro"], 0, LIBRARIES, id="plan", marks=pytest.mark.slow),
        # The doctor asks torch itself which GPUs and which attention it can use.
        pytest.param(["doctor", "micro", "--set", "seedz=1"], 2, TORCH | LIBRARIES, id="doctor, wrong option"),
        pytest.param(["generate", "--set", "model=m"], 2, TORCH | LIBRARIES, id="generate, missing option"),
        pytest.param(["train", "--set", "lr=fast"], 2, TORCH | LIBRARIES, id="train, wrong option"),
    ],
)
def test_the_command_line_loads_no_more_than_it_needs(
    arguments: list[str], status: int, absent: set[str], tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom micota_fast.cli import main\n"
        f"try:\n    status = main({arguments!r})\nexcept SystemExit as end:\n    status = end.code\n"
        f"print('loaded:', *sorted({absent!r} & set(sys.modules)), file=sys.stderr)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded:"
