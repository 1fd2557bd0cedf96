"""Every target of a pack has the teacher's row for its own token, and rows that were scored otherwise are refused."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micota_fast.data.batches import PackedSteps
from micota_fast.data.scores import Scores
from micota_fast.data.tokenise import Documents
from micota_fast.errors import InputError
from micota_fast.sources.top_logprobs import TopLogprobs, TopLogprobsWriter

K, VOCABULARY = 2, 1000


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(st.tuples(*(st.integers(0, 4) for _ in range(4))), min_size=1, max_size=8),
    cut=st.integers(2, 12),
    seed=st.integers(0, 2**31),
    own_tokens=st.booleans(),
)
def test_each_target_has_the_row_of_its_own_token(
    documents: list[tuple[int, int, int, int]],
    cut: int,
    seed: int,
    own_tokens: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A document: tokens of the prompt, of the template's text before the answer, that are scored, that follow."""
    numbers = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("store") / "store"
    texts, masks, expected = [], [], []
    with TopLogprobsWriter(folder, K) as writer:
        for d, (prompt, before, scored, after) in enumerate(documents):
            n = prompt + before + scored + after + 2
            ids = np.arange(n, dtype=np.int32) + 100 * d  # no token occurs twice, so the place is certain
            top_ids = numbers.integers(0, VOCABULARY + 100, (scored, 1)) + np.arange(K, dtype=np.int32)
            top_ids[numbers.random((scored, K)) < 0.1] = -1
            drawn = -np.log(K) - numbers.exponential(3, (scored, K))
            logprobs = np.where(top_ids < 0, -np.inf, drawn).astype(np.float16)
            start = prompt + before
            own = -numbers.exponential(3, scored).astype(np.float32)
            writer.append((f"p{d}", d), ids[start : start + scored], own, top_ids, logprobs)
            texts.append(ids[:cut])
            masks.append((np.arange(n) >= prompt)[:cut])
            known = (top_ids >= 0) & (top_ids < VOCABULARY)
            rows = zip(np.where(known, top_ids, -100).tolist(), logprobs.tolist(), strict=True)
            expected.append({start + t: (*row, float(own[t])) for t, row in enumerate(rows)})
    scores = Scores(TopLogprobs(folder), VOCABULARY, own_tokens)
    for d, (prompt, before, scored, after) in enumerate(documents):
        n = prompt + before + scored + after + 2
        whole = np.arange(n, dtype=np.int32) + 100 * d
        scores.places.append(scores.place({"id": f"p{d}", "sample": d}, whole, np.arange(n) >= prompt))
    lengths = [len(ids) for ids in texts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    made = Documents(np.concatenate(texts), np.concatenate(masks), offsets, 0, 0, 0, 0, None, scores=scores)
    found = 0
    steps = PackedSteps(made, 20, 2, seed=seed)
    for step in range(steps.steps_per_epoch):
        for batch in steps.step(step).batches:
            assert (batch.top_ids is None) == (batch.top_logprobs is None) == own_tokens
            assert (batch.token_logprobs is not None) == own_tokens
            at = 0
            for d in batch.doc_ids:
                for position in range(lengths[d]):
                    ids, logprobs, own_logprob = expected[d].get(position + 1, ([-100] * K, None, math.nan))
                    if position + 1 == lengths[d]:
                        ids, logprobs, own_logprob = [-100] * K, None, math.nan
                    elif logprobs is not None:
                        assert batch.targets[at] == texts[d][position + 1]
                    if batch.top_ids is not None and batch.top_logprobs is not None:
                        assert batch.top_ids[at].tolist() == ids
                        assert logprobs is None or batch.top_logprobs[at].tolist() == logprobs
                    if batch.token_logprobs is not None:
                        assert batch.token_logprobs[at].item() == pytest.approx(own_logprob, abs=0, nan_ok=True)
                    at += 1
                found += 1
    assert found == len(documents)


IDS = np.array([1, 2, 3, 4, 5, 6], np.int32)
ANSWER = np.array([0, 0, 0, 1, 1, 1], bool)


@pytest.mark.parametrize(
    ("row", "scored", "message"),
    [
        ({"id": "q"}, [4, 5], r"\('q', sample 0\) has no score in .*: score these rows"),
        ({"id": "p", "sample": 1}, [4, 5], r"\('p', sample 1\) has no score"),
        ({}, [4, 5], "`id` .* and `sample` .* name a row's score, got None and 0"),
        ({"id": "p"}, [4, 7], r"\('p', sample 0\) was scored .*: token 1 of the answer is 5, and 7 in the store"),
        ({"id": "p"}, [3, 4], "token 0 of the answer is 4, and 3 in the store"),
        ({"id": "p"}, [4, 5, 6, 7], "the answer has 3 tokens, and 4 in the store; score these rows again"),
    ],
)
def test_a_row_that_was_not_scored_as_it_stands_is_refused(
    row: dict[str, object], scored: list[int], message: str, tmp_path: Path
) -> None:
    with TopLogprobsWriter(tmp_path / "store", K) as writer:
        n = len(scored)
        writer.append(("p", 0), scored, [-3] * n, [[1, 2]] * n, [[-1, -2]] * n)
    with pytest.raises(InputError, match=message):
        Scores(TopLogprobs(tmp_path / "store"), VOCABULARY).place(row, IDS, ANSWER)


def test_the_last_of_several_places_counts(tmp_path: Path) -> None:
    """What a template adds goes before the text; a number is as good an id as its digits."""
    with TopLogprobsWriter(tmp_path / "store", K) as writer:
        writer.append(("7", 0), [4], [-3], [[1, 2]], [[-1, -2]])
    scores = Scores(TopLogprobs(tmp_path / "store"), VOCABULARY)
    assert scores.place({"id": 7}, np.array([4, 4, 4, 9], np.int32), np.array([0, 1, 1, 1], bool)).start == 2
