"""Statistics over the likelihoods of tokens, against loops that say the same."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micota_fast.alignment.likelihood_profile import PARTS, overlap, profile, reflection_markers
from micota_fast.alignment.results import STEPS, OwnOverlap, Step


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_profile_against_loops(counts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    total = sum(counts)
    nll = random.exponential(1.0, total).astype(np.float32)
    ends = random.random(total) < 0.3
    found = profile(nll, np.array(counts), ends)
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    steps: list[list[float]] = [[] for _ in range(STEPS)]
    start = 0
    for count in counts:
        step, ended = 0, False
        for rank in range(count):
            if ended and not ends[start + rank]:
                step, ended = step + 1, False
            ended = ended or bool(ends[start + rank])
            parts[rank * PARTS // count].append(float(nll[start + rank]))
            steps[min(step, STEPS - 1)].append(float(nll[start + rank]))
        start += count
    for mean, values in zip(found.by_position, parts, strict=True):
        assert mean is None if not values else mean == pytest.approx(np.mean(values), rel=1e-5)
    assert [entry.tokens for entry in found.by_step] == [len(values) for values in steps if values]
    for entry, values in zip(found.by_step, [values for values in steps if values], strict=True):
        assert entry.nll == pytest.approx(np.mean(values), rel=1e-5)
    for probability, share in found.unlikely.items():
        assert share == pytest.approx(np.mean([math.exp(-value) < float(probability) for value in nll]))


def test_a_line_break_that_opens_a_document_ends_its_first_step() -> None:
    found = profile(np.arange(5, dtype=np.float32), np.array([2, 3]), np.array([0, 1, 1, 0, 0], bool))
    assert found.by_step == (Step(nll=1.0, tokens=3), Step(nll=3.5, tokens=2))


def test_markers() -> None:
    texts = ["Wait, let me check. Hmm... wait!", "An awaited guest; actually, let me recheck again", "plain"]
    found = reflection_markers(texts, 500)
    assert found.by_phrase == {
        "wait": 4.0,
        "actually": 2.0,
        "hmm": 2.0,
        "let me check": 2.0,
        "let me recheck again": 2.0,
    }
    assert found.total == 12.0


def test_overlap() -> None:
    own = {"a": ["one two three four five"], "b": ["x"]}
    assert overlap({"a": ["one two three four", "two three four six", "short"]}, own) == OwnOverlap(mean=0.5, answers=2)
    assert overlap({"c": ["one two three four"]}, own) is None
