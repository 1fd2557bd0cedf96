"""The micro world: a jar that people add to and take from, counted modulo 10, and the ways of writing the count down.

A problem says what the jar holds at first and what each person, in turn, adds or takes (``Ann+5 Bob-8``); it asks for
what is left modulo 10. A solution writes one line a person (``7 Ann+5=2``: from 7, Ann's 5 more make 2). It is made of
local decisions, so that long, mid and short chains of thought are all natural and a writer can sit anywhere between:

* at the start: restate the problem, or not;
* after each step: continue, or check the step by undoing it (a check that fails leads to a second attempt);
* at the end: go through all steps again, or not.

A :class:`Thoroughness` holds one probability for each decision. ``SHORT`` takes none of them, ``LONG`` takes all.
Everything here is a pure function of its arguments and of the ``random.Random`` passed in.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

MODULUS = 10
NAMES = ("Ann", "Bob", "Cid", "Dan", "Eva", "Fay", "Gus")
SUBJECT = "sums modulo 10"

SPLIT_SEED = 20250701
BENCHMARK_STEPS = {"steps-3": 3, "steps-4": 4, "steps-5": 5, "steps-6": 6, "steps-7": 7}
BENCHMARK_SIZE = 60
TRAIN_SIZE = 600
MAX_STEPS = max(BENCHMARK_STEPS.values())


@dataclass(frozen=True)
class Chain:
    """The jar holds ``first`` (0..9); then each person in turn changes it by ``steps[i]`` (-9..-1 or 1..9)."""

    first: int
    steps: tuple[int, ...]

    def values(self) -> list[int]:
        """Return what the jar holds modulo 10, at first and after each step; ``len(steps) + 1`` numbers."""
        values = [self.first]
        for step in self.steps:
            values.append((values[-1] + step) % MODULUS)
        return values

    def facts(self) -> str:
        """Return what is given: ``A jar holds 7. Ann+5 Bob-8.``"""
        changes = " ".join(f"{name}{step:+d}" for name, step in zip(NAMES, self.steps, strict=False))
        return f"A jar holds {self.first}. {changes}."

    def problem(self) -> str:
        """Return the text of the problem."""
        return f"{self.facts()} How many modulo 10?"

    def answer(self) -> str:
        """Return the right final answer."""
        return str(self.values()[-1])


def random_chain(rng: random.Random, n_steps: int) -> Chain:
    """Draw a chain of ``n_steps`` steps, uniform over all such chains."""
    return Chain(rng.randrange(MODULUS), tuple(rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(n_steps)))


def is_hard(value: int, step: int) -> bool:
    """Return whether ``value + step`` leaves 0..9, so that it wraps around."""
    return not 0 <= value + step < MODULUS


@dataclass(frozen=True)
class Thoroughness:
    """Probability of each elaboration in a solution; ``slip`` is that of a mistake in a step that will be checked."""

    restate: float
    check_easy: float
    check_hard: float
    verify: float
    slip: float = 0.0


SHORT = Thoroughness(restate=0.0, check_easy=0.0, check_hard=0.0, verify=0.0)
LONG = Thoroughness(restate=1.0, check_easy=1.0, check_hard=1.0, verify=1.0, slip=0.03)


def random_thoroughness(rng: random.Random, slip: float) -> Thoroughness:
    """Draw a writer from the general mixture: terse, thorough, careful only where it is hard, or anything between."""
    kind = rng.random()
    if kind < 0.2:
        return SHORT
    if kind < 0.4:
        return Thoroughness(1.0, 1.0, 1.0, 1.0, slip)
    check_hard = rng.choice((0.0, 0.5, 1.0, 1.0))
    check_easy = check_hard * rng.choice((0.0, 0.0, 0.5, 1.0))
    return Thoroughness(float(rng.random() < 0.5), check_easy, check_hard, float(rng.random() < 0.5), slip)


def varied_thoroughness(rng: random.Random, slip: float) -> Thoroughness:
    """Draw a writer who makes each decision for itself: every length between terse and thorough is common."""
    return Thoroughness(float(rng.random() < 0.5), rng.random(), rng.random(), float(rng.random() < 0.5), slip)


def write_solution(chain: Chain, how: Thoroughness, rng: random.Random) -> str:
    """Write a chain of thought for ``chain`` that ends in its boxed answer. Slips happen only if a check mends them."""
    parts = []
    if rng.random() < how.restate:
        parts.append(f"Let me restate. {chain.facts()}\n")
    values = chain.values()
    lines = list(zip(values, NAMES, chain.steps, values[1:], strict=False))
    for value, name, step, result in lines:
        check = rng.random() < (how.check_hard if is_hard(value, step) else how.check_easy)
        if not check:
            parts.append(f"{_line(value, name, step, result)}\n")
            continue
        if rng.random() < how.slip:
            wrong = (result + rng.randint(1, MODULUS - 1)) % MODULUS
            undone = _line(wrong, name, -step, (wrong - step) % MODULUS)
            parts.append(f"{_line(value, name, step, wrong)}. Check:{undone}, wrong. Wait,\n")
        parts.append(f"{_line(value, name, step, result)}. Check:{_line(result, name, -step, value)}, fine.\n")
    if rng.random() < how.verify:
        parts.append("Let me verify again.\n" + "".join(f"{_line(*line)};\n" for line in lines))
    parts.append(f"\\boxed{{{values[-1]}}}")
    return "".join(parts)


def _line(value: int, name: str, step: int, result: int) -> str:
    return f"{value} {name}{step:+d}={result}"


def benchmarks(split_seed: int = SPLIT_SEED) -> dict[str, list[Chain]]:
    """Make the held-out problems, by benchmark name, easiest first: the same for a seed, no two equal."""
    rng = random.Random(f"{split_seed}-benchmarks")
    return {name: _distinct(rng, [n_steps] * BENCHMARK_SIZE, set()) for name, n_steps in BENCHMARK_STEPS.items()}


def held_out(split_seed: int = SPLIT_SEED) -> frozenset[Chain]:
    """Return every benchmark problem: what neither the train split nor pre-training may contain."""
    return frozenset(chain for chains in benchmarks(split_seed).values() for chain in chains)


def train_problems(split_seed: int = SPLIT_SEED) -> list[Chain]:
    """Make the train split: as many problems of each benchmark's length, in mixed order, none of them held out."""
    rng = random.Random(f"{split_seed}-train")
    lengths = list(BENCHMARK_STEPS.values()) * (TRAIN_SIZE // len(BENCHMARK_STEPS))
    rng.shuffle(lengths)
    return _distinct(rng, lengths, set(held_out(split_seed)))


def pretraining_chains(rng: random.Random, split_seed: int = SPLIT_SEED) -> Iterator[Chain]:
    """Yield endless chains of 1 to ``MAX_STEPS`` steps, none of them held out."""
    excluded = held_out(split_seed)
    while True:
        chain = random_chain(rng, rng.randint(1, MAX_STEPS))
        if chain not in excluded:
            yield chain


def _distinct(rng: random.Random, lengths: list[int], taken: set[Chain]) -> list[Chain]:
    chains = []
    for n_steps in lengths:
        chain = random_chain(rng, n_steps)
        while chain in taken:
            chain = random_chain(rng, n_steps)
        taken.add(chain)
        chains.append(chain)
    return chains
