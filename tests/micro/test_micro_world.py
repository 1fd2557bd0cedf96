"""The micro world: every text it writes is right, its splits are disjoint, and what ships is what the code makes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from micota_fast.micro import build, world
from micota_fast.micro.tokenizer import IM_END, IM_START, MAX_VOCAB
from micota_fast.sources.problems import read_problems

SHIPPED = Path(build.__file__).parent
MODELS = ("student", "assistant", "teacher")
CHAIN = world.Chain(7, ("Ann", "Cid", "Leo"), (4, 4, 6))
PROBABILITY = st.floats(0, 1)
WRITERS = st.builds(world.Thoroughness, *[PROBABILITY] * 4)

LINE = re.compile(r"(\d)((?: [A-Z][a-z]+\*\d){1,2})=(\d)")
CHECKED = re.compile(r"(?P<step>\S+ \S+)\. Check:(\d) ([A-Z][a-z]+)/(\d)=(\d), fine\.")
# The wiring, written down: what buttons 1 to 9 lead to from 0, 1, ... 9.
WIRING = (
    "7920154683",
    "5201387469",
    "3925687410",
    "1596704832",
    "2746915308",
    "4506812379",
    "9062175384",
    "6903278415",
    "9675231048",
)


@st.composite
def chains(draw: st.DrawFn) -> world.Chain:
    buttons = draw(st.lists(st.integers(1, 9), min_size=1, max_size=10))
    names = draw(st.lists(st.sampled_from(world.NAMES), min_size=len(buttons), max_size=len(buttons), unique=True))
    return world.Chain(draw(st.integers(0, 9)), tuple(sorted(names)), tuple(buttons))


def press(value: str, presses: str) -> str:
    """What the dial shows after ``*5 Cid*2`` and the like, by this file's own copy of the wiring."""
    for button in re.findall(r"\*(\d)", presses):
        value = WIRING[int(button) - 1][int(value)]
    return value


def evaluate(problem: str) -> str:
    """The answer, worked out from the problem's text alone and not by the world's own code."""
    facts = re.match(r"A dial shows (\d)\.(.*)\. What does it show now\?$", problem)
    assert facts is not None
    return press(facts[1], facts[2])


def assert_sound(chain: world.Chain, text: str) -> None:
    """Every line of a solution follows from the problem and the line before it, and a check undoes its line."""
    *lines, last = text.split("\n")
    assert last == f"\\boxed{{{evaluate(chain.problem())}}}"
    presses = [f" {name}*{button}" for name, button in zip(chain.names, chain.buttons, strict=True)]
    shown, done = str(chain.first), 0
    for line in lines:
        if line.startswith("Let me restate."):
            assert line == f"Let me restate. {chain.facts()}"
            assert done == 0
            continue
        if line == "Let me verify again.":
            assert done == len(presses)
            shown, done = str(chain.first), 0
            continue
        step, checked = line.rstrip(";"), None
        if "Check:" in line:
            checked = CHECKED.fullmatch(line)
            assert checked is not None, line
            step = checked["step"]
        match = LINE.fullmatch(step)
        assert match is not None, line
        value, folded, result = match.groups()
        people = folded.count("*")
        assert (value, folded) == (shown, "".join(presses[done : done + people]))
        if checked is not None:
            _, after, name, button, before = checked.groups()
            assert (after, f" {name}*{button}", before) == (result, folded, value)
        assert press(value, folded) == result
        shown, done = result, done + people
    assert done == len(presses)


@settings(max_examples=300, deadline=None)
@given(chains(), WRITERS, st.integers(0, 2**32))
def test_solutions_are_sound(chain: world.Chain, how: world.Thoroughness, seed: int) -> None:
    assert chain.answer() == evaluate(chain.problem())
    assert_sound(chain, world.write_solution(chain, how, random.Random(seed)))


def test_soundness_check_rejects_a_wrong_step() -> None:
    chain = world.Chain(7, ("Ann", "Bob"), (5, 8))
    right = world.write_solution(chain, world.SINGLE, random.Random(0))
    assert_sound(chain, right)
    middle = str(chain.values()[1])
    with pytest.raises(AssertionError):
        assert_sound(chain, right.replace(middle, str((int(middle) + 1) % 10)))


def test_the_wiring_is_a_permutation_for_each_button() -> None:
    for button in range(1, world.ALL_BUTTONS + 1):
        assert sorted(world.pressed(digit, button) for digit in range(10)) == list(range(10))


def test_styles_differ_as_stated() -> None:
    rng = random.Random(0)
    assert CHAIN.values() == [7, 8, 3, 6]
    short = world.write_solution(CHAIN, world.SHORT, rng)
    single = world.write_solution(CHAIN, world.SINGLE, rng)
    long = world.write_solution(CHAIN, world.LONG, rng)
    assert short == "7 Ann*4 Cid*4=3\n3 Leo*6=6\n\\boxed{6}"
    assert single == "7 Ann*4=8\n8 Cid*4=3\n3 Leo*6=6\n\\boxed{6}"
    assert long.startswith("Let me restate. A dial shows 7. Ann*4 Cid*4 Leo*6.\n7 Ann*4=8. Check:8 Ann/4=7, fine.\n")
    assert long.count("Check") == 3
    assert "Let me verify again.\n7 Ann*4=8;\n8 Cid*4=3;\n3 Leo*6=6;\n" in long


def test_splits_are_disjoint() -> None:
    benchmarks = world.benchmarks()
    held_out = world.held_out()
    assert len(held_out) == len(benchmarks) * world.BENCHMARK_SIZE  # no problem twice, within or between benchmarks
    train, dev = set(world.train_problems()), set(world.dev())
    assert (len(train), len(dev)) == (world.TRAIN_SIZE, world.DEV_SIZE)
    assert not held_out & train
    assert not dev & (held_out | train)


def test_pretraining_skips_what_is_held_out() -> None:
    def stream(excluded: frozenset[world.Chain]) -> list[world.Chain]:
        rng = random.Random(5)
        return [world.pretraining_chain(rng, excluded) for _ in range(40)]

    before = stream(frozenset())
    skipped = frozenset(before[10:20])
    assert stream(skipped)[:30] == [chain for chain in before if chain not in skipped]


def test_corpora_hold_no_benchmark_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(world, "pretraining_chain", lambda rng, excluded, buttons: seen.append(excluded) or CHAIN)
    for kind in build.KINDS:
        assert next(iter(build.corpus(kind, 1, seed=3, world_number=1)))
    assert set(seen) == {world.held_out(build.split_seed(1)) | set(world.dev(build.split_seed(1)))}


def test_each_world_has_its_own_problems_and_seeds() -> None:
    assert world.held_out(build.split_seed(0)) == world.held_out()
    assert not world.held_out(build.split_seed(1)) & world.held_out()
    seeds = {build.phase_seed(size, phase, w) for w in (0, 1, 2) for size in build.SIZES.values() for phase in range(3)}
    assert len(seeds) == 27


def test_shipped_problems_are_what_the_code_makes(tmp_path: Path) -> None:
    build.write_problems(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (SHIPPED / "problems").glob("*.jsonl"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (SHIPPED / "problems" / name).read_bytes()
    for path in tmp_path.iterdir():
        for row in read_problems(path):
            assert row.answer == evaluate(row.problem)
            assert row.level == row.problem.count("*")


@pytest.mark.parametrize("name", MODELS)
def test_shipped_tokenizer_is_what_the_code_makes(name: str, tmp_path: Path) -> None:
    build.write_blank_checkpoint(build.SIZES[name], build.make_tokenizer(), tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / file).read_bytes() == (SHIPPED / "checkpoints" / name / file).read_bytes()
    shipped = json.loads((SHIPPED / "checkpoints" / name / "config.json").read_text())
    blank = json.loads((tmp_path / "config.json").read_text())
    dtype = ("dtype", "torch_dtype")
    assert {k: v for k, v in shipped.items() if k not in dtype} == {k: v for k, v in blank.items() if k not in dtype}


def test_tokenizer_round_trip_and_single_digits() -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "checkpoints" / "student" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= MAX_VOCAB
    rng = random.Random(1)
    for _ in range(200):
        chain = world.pretraining_chain(rng, frozenset())
        text = build.question(chain) + "\n" + world.write_solution(chain, world.leaping_thoroughness(rng), rng)
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(encoded.ids) == text
        for token in encoded.tokens:
            assert token.isdigit() <= (len(token) == 1)
            assert any(c.isdigit() for c in token) == token.isdigit()
    for word in (" Check", " Ann", " dial", " restate", "boxed", IM_START, IM_END):
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1
    assert (
        tokenizer.decode(tokenizer.encode("naïve 東京 \t\r\n").ids) == "naïve 東京 \t\r\n"
    )  # any bytes, not just the world's


def test_checkpoints_are_small() -> None:
    total = sum(path.stat().st_size for path in (SHIPPED / "checkpoints").rglob("*") if path.is_file())
    assert total <= 4_000_000


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_opens_in_transformers_and_answers_in_its_style(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = SHIPPED / "checkpoints" / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == "Qwen2ForCausalLM"
    chain = world.Chain(3, ("Bob", "Fay", "Gus"), (4, 5, 6))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": build.question(chain)}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith(f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n{IM_START}user\nA dial shows 3.")
    prompt = tokenizer(text, return_tensors="pt")
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert prompt["input_ids"][0].tolist() == ours.encode(text, add_special_tokens=False).ids
    ids = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    assert re.search(r"\\boxed\{\d\}$", answer), answer
    assert ids[-1] == tokenizer.convert_tokens_to_ids(IM_END)
    assert ("Check:" in answer) == (name == "teacher")
