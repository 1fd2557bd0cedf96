"""Packed batches: what they hold, who gets which, and that a step's number is all it takes to make it again."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micota_fast.data.batches import PackedBatch, PackedSteps, packed_batch
from micota_fast.data.tokenise import Documents
from micota_fast.errors import InputError


def make_documents(lengths: list[int], seed: int = 0) -> Documents:
    """Random tokens, each with its document's number in the thousands; a random half of them supervised."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return Documents(
        input_ids=(owner * 1000 + rng.integers(0, 1000, owner.size)).astype(np.int32),
        supervised=rng.random(owner.size) < 0.5,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows=len(lengths),
        dropped=0,
        truncated=0,
        rejected=0,
        rejects_path=None,
    )


def check_batch(batch: PackedBatch, documents: Documents) -> None:
    """The batch against a plain loop over its documents."""
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    bounds = [0]
    for d in batch.doc_ids:
        a, b = documents.offsets[d : d + 2]
        doc, supervised = documents.input_ids[a:b].tolist(), documents.supervised[a:b].tolist()
        ids += doc
        positions += range(len(doc))
        targets += [t if s else -100 for t, s in zip(doc[1:], supervised[1:], strict=True)] + [-100]
        bounds.append(len(ids))
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.targets.tolist() == targets
    assert batch.cu_seqlens.tolist() == bounds
    assert batch.max_seqlen == max(np.diff(bounds))
    assert batch.n_supervised == sum(t != -100 for t in targets)
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert type(batch.max_seqlen) is type(batch.n_supervised) is int


LENGTHS = st.lists(st.integers(2, 24), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_each_document_once_and_counts_are_right(lengths: list[int], per_step: int, epoch: int) -> None:
    documents = make_documents(lengths)
    steps = PackedSteps(documents, 24, per_step, seed=3)
    seen: Counter[int] = Counter()
    n_packs = 0
    for i in range(epoch * steps.steps_per_epoch, (epoch + 1) * steps.steps_per_epoch):
        batches, n_supervised, n_tokens = steps.step(i)
        for batch in batches:
            check_batch(batch, documents)
            assert len(batch.input_ids) <= 24
            seen.update(batch.doc_ids)
        assert n_supervised == sum(batch.n_supervised for batch in batches)
        assert n_tokens == sum(len(batch.input_ids) for batch in batches)
        assert 1 <= len(batches) <= per_step
        n_packs += len(batches)
    assert seen == Counter(range(len(lengths)))
    assert n_packs == steps.n_packs
    assert steps.efficiency == pytest.approx(sum(lengths) / (24 * n_packs))


@given(LENGTHS, st.integers(1, 7), st.sampled_from([2, 3, 4]))
@settings(max_examples=40, deadline=None)
def test_ranks_share_out_the_same_packs_and_agree_on_the_counts(lengths: list[int], per_step: int, world: int) -> None:
    documents = make_documents(lengths)
    alone = PackedSteps(documents, 24, per_step, seed=1)
    ranks = [PackedSteps(documents, 24, per_step, rank, world, seed=1) for rank in range(world)]
    for i in range(2 * alone.steps_per_epoch):
        batches, n_supervised, n_tokens = alone.step(i)
        shares = [rank.step(i) for rank in ranks]
        assert {share[1:] for share in shares} == {(n_supervised, n_tokens)}
        assert Counter(b.doc_ids for share in shares for b in share[0]) == Counter(b.doc_ids for b in batches)
        held = [len(share[0]) for share in shares]
        assert max(held) - min(held) <= 1
        assert {rank.micro_steps(i) for rank in ranks} == {max(held)}


def test_a_last_step_may_leave_a_rank_without_a_pack() -> None:
    documents = make_documents([10] * 5)
    ranks = [PackedSteps(documents, 10, 4, rank, world=4) for rank in range(4)]
    assert [len(rank.step(1)[0]) for rank in ranks] == [1, 0, 0, 0]
    assert ranks[3].step(1)[2] == 10


def doc_ids_of(steps: PackedSteps, i: int) -> list[tuple[int, ...]]:
    return [batch.doc_ids for batch in steps.step(i)[0]]


def test_a_step_depends_on_seed_and_number_only() -> None:
    documents = make_documents(np.random.default_rng(5).integers(2, 30, 200).tolist())
    forward = PackedSteps(documents, 64, 4, seed=7)
    n = 3 * forward.steps_per_epoch
    order = [doc_ids_of(forward, i) for i in range(n)]
    resumed = PackedSteps(documents, 64, 4, seed=7)
    assert [doc_ids_of(resumed, i) for i in reversed(range(n))] == order[::-1]
    assert doc_ids_of(PackedSteps(documents, 64, 4, seed=8), 0) != order[0]


def test_every_epoch_has_other_packs_in_another_order() -> None:
    documents = make_documents(np.random.default_rng(5).integers(2, 30, 200).tolist())
    steps = PackedSteps(documents, 64, 4)
    epochs = []
    for epoch in range(3):
        span = range(epoch * steps.steps_per_epoch, (epoch + 1) * steps.steps_per_epoch)
        epochs.append([pack for i in span for pack in doc_ids_of(steps, i)])
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        assert set(map(frozenset, epochs[a])) != set(map(frozenset, epochs[b]))
        assert len(epochs[a]) == len(epochs[b])
        # The length of a pack's first document falls with the pack's number before the shuffle, never after.
        assert [int(documents.lengths[p[0]]) for p in epochs[a]] != [int(documents.lengths[p[0]]) for p in epochs[b]]


def test_total_steps_of_whole_and_broken_epochs() -> None:
    steps = PackedSteps(make_documents([10] * 10), 10, 4)  # 10 packs: steps of 4, 4 and 2
    assert steps.steps_per_epoch == 3
    assert [steps.total_steps(e) for e in (1, 2, 2.5, 0.1, 0.4, 0.41, 2.1)] == [3, 6, 8, 1, 1, 2, 7]
    # 2.1 - 2 is a little over a tenth in floating point, and must not become 5 of 40 packs, which take another step.
    assert PackedSteps(make_documents([10] * 40), 10, 4).total_steps(2.1) == 21
    with pytest.raises(InputError, match="epochs must be more than 0"):
        steps.total_steps(0)


def test_the_targets_spell_the_supervised_text() -> None:
    documents = Documents(
        input_ids=np.array([1, 2, 7, 8, 9, 3, 5, 6], dtype=np.int32),
        supervised=np.array([0, 0, 1, 1, 1, 1, 0, 1], dtype=bool),  # the second document's first token is supervised,
        offsets=np.array([0, 5, 8]),  # and nothing precedes it
        rows=2,
        dropped=0,
        truncated=0,
        rejected=0,
        rejects_path=None,
    )
    batch = packed_batch(documents, np.array([0, 1]))
    assert batch.targets[batch.targets != -100].tolist() == [7, 8, 9, 6]
    assert documents.n_targets.tolist() == [3, 1]
    assert batch.n_supervised == 4


def test_refuses_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="has 30 tokens"):
        PackedSteps(make_documents([30]), 24, 1)
    with pytest.raises(InputError, match="packs_per_step must be at least 1"):
        PackedSteps(make_documents([3]), 24, 0)
    with pytest.raises(ValueError, match="rank 2"):
        PackedSteps(make_documents([3]), 24, 1, rank=2, world=2)
    with pytest.raises(IndexError):
        PackedSteps(make_documents([3]), 24, 1).step(-1)
