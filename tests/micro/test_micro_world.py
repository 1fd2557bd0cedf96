"""The micro world: every text it writes is right, its splits are disjoint, and what ships is what the code makes."""

from __future__ import annotations

import dataclasses
import itertools
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
CHANGES = st.integers(-9, 9).filter(bool)
CHAINS = st.builds(world.Chain, st.integers(0, 9), st.lists(CHANGES, min_size=1, max_size=7).map(tuple))
PROBABILITY = st.floats(0, 1)
WRITERS = st.builds(world.Thoroughness, *[PROBABILITY] * 5)

LINE = re.compile(r"(\d) ([A-Z][a-z]+)([+-]\d)=(\d)")
CHECKED = re.compile(rf"{LINE.pattern}\. Check:{LINE.pattern}, (fine|wrong)\.( Wait,)?")


def evaluate(problem: str) -> str:
    """The answer, worked out from the problem's text alone and not by the world's own code."""
    numbers = re.match(r"A jar holds (\d+)\.(.*)\. How many modulo 10\?$", problem)
    assert numbers is not None
    return str((int(numbers[1]) + sum(map(int, re.findall(r"[+-]\d", numbers[2])))) % 10)


def is_right(line: tuple[str, ...]) -> bool:
    value, _, change, result = line
    return (int(value) + int(change)) % 10 == int(result)


def assert_sound(chain: world.Chain, text: str) -> None:
    """Every line of a solution follows from the problem; a wrong one is caught by its own check and mended next."""
    *lines, last = text.split("\n")
    assert last == f"\\boxed{{{evaluate(chain.problem())}}}"
    held, people = str(chain.first), 0
    for line in lines:
        if line.startswith("Let me restate."):
            assert line == f"Let me restate. {chain.facts()}"
            assert people == 0
            continue
        if line == "Let me verify again.":
            assert people == len(chain.steps)
            held, people = str(chain.first), 0
            continue
        step, check, verdict = line, None, "fine"
        if "Check:" in line:
            match = CHECKED.fullmatch(line)
            assert match is not None, line
            step, check, verdict = line.split(".")[0], match.groups()[4:8], match[9]
            assert (match[10] is not None) == (verdict == "wrong")
        match = LINE.fullmatch(step.rstrip(";"))
        assert match is not None, line
        value, name, change, result = match.groups()
        assert (value, name, int(change)) == (held, world.NAMES[people], chain.steps[people])
        if check is not None:
            assert check[:2] == (result, name)
            assert int(check[2]) == -int(change)
            assert is_right(check)
            assert (check[3] == value) == (verdict == "fine")
        assert is_right((value, name, change, result)) == (verdict == "fine")
        if verdict == "fine":
            held, people = result, people + 1
    assert people == len(chain.steps)


@settings(max_examples=300, deadline=None)
@given(CHAINS, WRITERS, st.integers(0, 2**32))
def test_solutions_are_sound(chain: world.Chain, how: world.Thoroughness, seed: int) -> None:
    assert chain.answer() == evaluate(chain.problem())
    assert_sound(chain, world.write_solution(chain, how, random.Random(seed)))


def test_soundness_check_rejects_a_wrong_step() -> None:
    chain = world.Chain(7, (5, -8))
    with pytest.raises(AssertionError):
        assert_sound(chain, "7 Ann+5=3\n3 Bob-8=4\n\\boxed{4}")


def test_styles_differ_in_length_only_as_stated() -> None:
    rng = random.Random(0)
    chain = world.Chain(7, (5, -8, 3))
    short = world.write_solution(chain, world.SHORT, rng)
    careful = world.write_solution(chain, world.Thoroughness(0, 0, 1, 0), rng)
    long = world.write_solution(chain, dataclasses.replace(world.LONG, slip=0.0), rng)
    assert short == "7 Ann+5=2\n2 Bob-8=4\n4 Cid+3=7\n\\boxed{7}"
    assert careful.count("Check") == 2  # 7+5 and 2-8 wrap around, 4+3 does not
    assert long.count("Check") == 3
    assert long.startswith("Let me restate. A jar holds 7. Ann+5 Bob-8 Cid+3.\n")
    assert "Let me verify again.\n7 Ann+5=2;\n2 Bob-8=4;\n4 Cid+3=7;\n" in long


def test_splits_are_disjoint_and_pretraining_holds_nothing_out(tmp_path: Path) -> None:
    benchmarks = world.benchmarks()
    held_out = world.held_out()
    assert len(held_out) == len(benchmarks) * world.BENCHMARK_SIZE  # no problem twice, within or between benchmarks
    train = world.train_problems()
    assert len(set(train)) == world.TRAIN_SIZE
    assert not held_out & set(train)
    # A first problem of the stream that is held out must be skipped: make one so, and ask for the stream again.
    stream = list(itertools.islice(world.pretraining_chains(random.Random(5)), 50))
    assert not held_out & set(stream)


def test_pretraining_skips_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(itertools.islice(world.pretraining_chains(random.Random(5)), 50))
    monkeypatch.setattr(world, "held_out", lambda split_seed: frozenset(before[10:20]))
    after = list(itertools.islice(world.pretraining_chains(random.Random(5)), 40))
    assert after == [chain for chain in before if chain not in before[10:20]]


def test_corpora_hold_no_benchmark_problem() -> None:
    texts = {chain.problem() for chain in world.held_out()}
    for kind in build.WRITERS:
        for row in build.corpus(kind, 500, seed=3):
            user = row["messages"][1]["content"]
            assert not any(user.startswith(text) for text in texts)


def test_each_world_holds_out_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.held_out(build.split_seed(0)) == world.held_out()
    assert world.held_out(build.split_seed(1)) != world.held_out()
    before = list(build.corpus("short", 50, 5))
    taken = frozenset(itertools.islice(world.pretraining_chains(random.Random("5-short")), 20))
    monkeypatch.setattr(world, "held_out", lambda split: taken if split == build.split_seed(1) else frozenset())
    assert list(build.corpus("short", 50, 5)) == before
    user_messages = {row["messages"][1]["content"] for row in build.corpus("short", 50, 5, world_number=1)}
    assert not user_messages & {build.question(chain) for chain in taken}
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
            assert row.level == len(re.findall(r"[+-]\d", row.problem))


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
    for chain in itertools.islice(world.pretraining_chains(rng), 200):
        text = build.question(chain) + "\n" + world.write_solution(chain, world.random_thoroughness(rng, 0.3), rng)
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(encoded.ids) == text
        for token in encoded.tokens:
            assert token.isdigit() <= (len(token) == 1)
            assert any(c.isdigit() for c in token) == token.isdigit()
    for word in (" Check", " Ann", " modulo", " restate", "boxed", IM_START, IM_END):
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
    chain = world.Chain(3, (4, -5, 6))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": build.question(chain)}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith(f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n{IM_START}user\nA jar holds 3.")
    prompt = tokenizer(text, return_tensors="pt")
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert prompt["input_ids"][0].tolist() == ours.encode(text, add_special_tokens=False).ids
    ids = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    assert re.search(r"\\boxed\{\d\}$", answer), answer
    assert ids[-1] == tokenizer.convert_tokens_to_ids(IM_END)
    assert ("Check:" in answer) == (name == "teacher")
