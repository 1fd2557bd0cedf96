"""The micro world: a dial that people press buttons of, and the ways of writing down what it shows.

A dial shows one of ten digits; each of nine buttons moves it by a wiring of its own, a fixed permutation of the
digits (``WIRING``) that models must know by heart. A problem says what the dial shows at first and which button each
person, in alphabetical order, presses (``Ann*5 Cid*2``), and asks what it shows then. A solution goes press by press
(``7 Ann*5=2``: from 7, Ann's 5 leads to 2; ``2 Ann/5=7`` undoes it). It is made of local decisions, so that long, mid
and short chains of thought are all natural and a writer can sit anywhere between:

* at the start: restate the problem, or not;
* at each line: one press, or two folded into one line (``7 Ann*5 Cid*2=4``), whose result takes two looks at the wiring
  without writing the first down: quick, and hard to be sure of;
* after a line of one press: continue, or check it by undoing it;
* at the end: go through all presses again, or not.

A :class:`Thoroughness` holds one probability for each decision. ``SHORT`` folds whatever fits and does nothing else;
``LONG`` folds nothing and takes every other decision. Nobody writes a wrong line, so checks always pass: they make
answers longer, as the checks of reasoning models on easy problems do, and they are one more thing to do right.
Everything here is a pure function of its arguments and of the ``random.Random`` passed in.
"""

import dataclasses
import random
from dataclasses import dataclass

DIGITS = 10
BUTTONS = 5  # the first of them, which problems use
ALL_BUTTONS = 9  # in the wider text that models are pre-trained on
NAMES = ("Ann", "Bob", "Cid", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jim", "Kay", "Leo")
SUBJECT = "buttons of a dial"

SPLIT_SEED = 20250701
BENCHMARK_STEPS = {"press-4": 4, "press-5": 5, "press-6": 6, "press-8": 8, "press-10": 10}
BENCHMARK_SIZE = 60
TRAIN_SIZE = 600
DEV_SIZE = 200
MAX_STEPS = max(BENCHMARK_STEPS.values())


def _wiring() -> tuple[tuple[int, ...], ...]:
    rng = random.Random(SPLIT_SEED)
    return tuple(tuple(rng.sample(range(DIGITS), DIGITS)) for _ in range(ALL_BUTTONS))


def _pairs() -> tuple[tuple[int, int], ...]:
    pairs = [(first, second) for first in range(1, BUTTONS + 1) for second in range(1, BUTTONS + 1)]
    random.Random(SPLIT_SEED).shuffle(pairs)
    return tuple(pairs)


WIRING = _wiring()  # WIRING[button - 1][digit]: what the dial shows after the press
PAIRS = _pairs()  # of buttons, in the order in which models get to know them by heart


def pressed(digit: int, button: int) -> int:
    """Return what the dial shows when ``button`` (1..9) is pressed while it shows ``digit``."""
    return WIRING[button - 1][digit]


@dataclass(frozen=True)
class Chain:
    """The dial shows ``first`` (0..9); then ``names[i]`` presses ``buttons[i]`` (1..9), for each i in turn."""

    first: int
    names: tuple[str, ...]
    buttons: tuple[int, ...]

    def values(self) -> list[int]:
        """Return what the dial shows, at first and after each press; ``len(buttons) + 1`` digits."""
        values = [self.first]
        for button in self.buttons:
            values.append(pressed(values[-1], button))
        return values

    def facts(self) -> str:
        """Return what is given: ``A dial shows 7. Ann*5 Cid*2.``"""
        presses = " ".join(f"{name}*{button}" for name, button in zip(self.names, self.buttons, strict=True))
        return f"A dial shows {self.first}. {presses}."

    def problem(self) -> str:
        """Return the text of the problem."""
        return f"{self.facts()} What does it show now?"

    def answer(self) -> str:
        """Return the right final answer."""
        return str(self.values()[-1])


def random_chain(rng: random.Random, n_steps: int, buttons: int = BUTTONS) -> Chain:
    """Draw a chain of ``n_steps`` presses of the first ``buttons`` buttons, uniform over all such chains."""
    names = tuple(sorted(rng.sample(NAMES, n_steps)))
    return Chain(rng.randrange(DIGITS), names, tuple(rng.randint(1, buttons) for _ in range(n_steps)))


@dataclass(frozen=True)
class Thoroughness:
    """Probability of each decision in a solution; only the first ``familiar`` of ``PAIRS`` are folded."""

    fold: float = 0.0
    restate: float = 0.0
    check: float = 0.0
    verify: float = 0.0
    familiar: int = len(PAIRS)


SINGLE = Thoroughness()
SHORT = Thoroughness(fold=1.0)
MOSTLY_SHORT = Thoroughness(fold=0.8)
LONG = Thoroughness(restate=1.0, check=1.0, verify=1.0)


def varied_thoroughness(rng: random.Random) -> Thoroughness:
    """Draw a writer who folds nothing and makes each other decision for itself: every length is common."""
    return Thoroughness(0.0, float(rng.random() < 0.5), rng.random(), float(rng.random() < 0.5))


def leaping_thoroughness(rng: random.Random) -> Thoroughness:
    """Draw a writer as `varied_thoroughness` does, who also folds with a probability of their own."""
    return dataclasses.replace(varied_thoroughness(rng), fold=rng.random())


def write_solution(chain: Chain, how: Thoroughness, rng: random.Random) -> str:
    """Write a chain of thought for ``chain`` that ends in its boxed answer."""
    parts = []
    if rng.random() < how.restate:
        parts.append(f"Let me restate. {chain.facts()}\n")
    known = PAIRS[: how.familiar]
    values = chain.values()
    lines = list(zip(values, chain.names, chain.buttons, values[1:], strict=False))
    i = 0
    while i < len(lines):
        value, name, button, result = lines[i]
        if i + 1 < len(lines) and (button, lines[i + 1][2]) in known and rng.random() < how.fold:
            _, second_name, second_button, second_result = lines[i + 1]
            parts.append(f"{value} {name}*{button} {second_name}*{second_button}={second_result}\n")
            i += 2
            continue
        i += 1
        if rng.random() >= how.check:
            parts.append(f"{value} {name}*{button}={result}\n")
            continue
        parts.append(f"{value} {name}*{button}={result}. Check:{result} {name}/{button}={value}, fine.\n")
    if rng.random() < how.verify:
        again = "".join(f"{value} {name}*{button}={result};\n" for value, name, button, result in lines)
        parts.append(f"Let me verify again.\n{again}")
    parts.append(f"\\boxed{{{values[-1]}}}")
    return "".join(parts)


def benchmarks(split_seed: int = SPLIT_SEED) -> dict[str, list[Chain]]:
    """Make the held-out problems, by benchmark name, easiest first: the same for a seed, no two equal."""
    rng = random.Random(f"{split_seed}-benchmarks")
    return {name: _distinct(rng, [n_steps] * BENCHMARK_SIZE, set()) for name, n_steps in BENCHMARK_STEPS.items()}


def held_out(split_seed: int = SPLIT_SEED) -> frozenset[Chain]:
    """Return every benchmark problem, which the train split must not contain."""
    return frozenset(chain for chains in benchmarks(split_seed).values() for chain in chains)


def dev(split_seed: int = SPLIT_SEED) -> list[Chain]:
    """Make the problems on which the preconditions are measured: neither benchmarks nor train."""
    rng = random.Random(f"{split_seed}-dev")
    lengths = list(BENCHMARK_STEPS.values()) * (DEV_SIZE // len(BENCHMARK_STEPS))
    return _distinct(rng, lengths, set(held_out(split_seed)) | set(train_problems(split_seed)))


def train_problems(split_seed: int = SPLIT_SEED) -> list[Chain]:
    """Make the train split: as many problems of each benchmark's length, in mixed order, none of them held out."""
    rng = random.Random(f"{split_seed}-train")
    lengths = list(BENCHMARK_STEPS.values()) * (TRAIN_SIZE // len(BENCHMARK_STEPS))
    rng.shuffle(lengths)
    return _distinct(rng, lengths, set(held_out(split_seed)))


def pretraining_chain(rng: random.Random, excluded: frozenset[Chain], buttons: int = BUTTONS) -> Chain:
    """Draw a chain of 1 to ``MAX_STEPS`` presses that is not in ``excluded``."""
    while True:
        chain = random_chain(rng, rng.randint(1, MAX_STEPS), buttons)
        if chain not in excluded:
            return chain


def _distinct(rng: random.Random, lengths: list[int], taken: set[Chain]) -> list[Chain]:
    chains = []
    for n_steps in lengths:
        chain = random_chain(rng, n_steps)
        while chain in taken:
            chain = random_chain(rng, n_steps)
        taken.add(chain)
        chains.append(chain)
    return chains
