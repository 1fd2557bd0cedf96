"""Packed batches: what they hold, who gets which, and that a step's number is all it takes to make it again."""

from collections import Counter
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micota_fast.data.batches import PackedBatch, PackedSteps, packed_batch
from micota_fast.data.tokenise import Documents
from micota_fast.errors import InputError
from micota_fast.kernels import linear_cross_entropy


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
    weights: list[float] = []
    bounds = [0]
    for d in batch.doc_ids:
        a, b = documents.offsets[d : d + 2]
        doc, supervised = documents.input_ids[a:b].tolist(), documents.supervised[a:b].tolist()
        ids += doc
        positions += range(len(doc))
        targets += [t if s else -100 for t, s in zip(doc[1:], supervised[1:], strict=True)] + [-100]
        if documents.weights is not None:
            weights += [documents.weights[d]] * len(doc)
        bounds.append(len(ids))
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.targets.tolist() == targets
    if documents.weights is None:
        assert batch.token_weights is None
    else:
        assert batch.token_weights is not None
        assert batch.token_weights.dtype == torch.float32
        assert batch.token_weights.tolist() == weights
    assert batch.cu_seqlens.tolist() == bounds
    assert batch.lengths == tuple(np.diff(bounds))
    assert batch.n_supervised == sum(t != -100 for t in targets)
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert {type(length) for length in (*batch.lengths, batch.n_supervised)} == {int}


LENGTHS = st.lists(st.integers(2, 24), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_each_document_once_and_counts_are_right(lengths: list[int], per_step: int, epoch: int) -> None:
    documents = make_documents(lengths)
    steps = PackedSteps(documents, 24, per_step, seed=3)
    seen: Counter[int] = Counter()
    n_packs = 0
    for i in range(epoch * steps.steps_per_epoch, (epoch + 1) * steps.steps_per_epoch):
        batches, normalizer, n_supervised, n_tokens = steps.step(i)
        for batch in batches:
            check_batch(batch, documents)
            assert len(batch.input_ids) <= 24
            seen.update(batch.doc_ids)
        assert normalizer == n_supervised == sum(batch.n_supervised for batch in batches)
        assert type(normalizer) is type(n_supervised) is type(n_tokens) is int
        assert n_tokens == sum(len(batch.input_ids) for batch in batches)
        assert 1 <= len(batches) <= per_step
        n_packs += len(batches)
    assert seen == Counter(range(len(lengths)))
    assert n_packs == steps.n_packs
    assert steps.efficiency == pytest.approx(sum(lengths) / (min(24, sum(lengths)) * n_packs))


@given(LENGTHS, st.integers(1, 7), st.sampled_from([2, 3, 4]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ranks_share_out_the_same_packs_and_agree_on_the_counts(
    lengths: list[int], per_step: int, world: int, weighted: bool
) -> None:
    documents = make_documents(lengths)
    if weighted:
        documents = replace(documents, weights=np.random.default_rng(0).random(len(lengths), np.float32) + 0.1)
    alone = PackedSteps(documents, 24, per_step, seed=1)
    ranks = [PackedSteps(documents, 24, per_step, rank, world, seed=1, parity_tokens=10.0) for rank in range(world)]
    for i in range(2 * alone.steps_per_epoch):
        whole = alone.step(i)
        shares = [rank.step(i) for rank in ranks]
        assert {share[1:] for share in shares} == {whole[1:]}
        assert Counter(b.doc_ids for share in shares for b in share.batches) == Counter(
            b.doc_ids for b in whole.batches
        )
        assert all(rank.documents(i).tolist() == alone.documents(i).tolist() for rank in ranks)
        assert sorted(alone.documents(i)) == sorted(d for b in whole.batches for d in b.doc_ids)
        held = [len(share.batches) for share in shares]
        assert max(held) - min(held) <= 1
        assert {rank.micro_steps(i) for rank in ranks} == {max(held)}


def test_a_last_step_may_leave_a_rank_without_a_pack() -> None:
    documents = make_documents([10] * 5)
    ranks = [PackedSteps(documents, 10, 4, rank, world=4) for rank in range(4)]
    assert [len(rank.step(1).batches) for rank in ranks] == [1, 0, 0, 0]
    assert ranks[3].step(1).n_tokens == 10


@pytest.mark.parametrize(("world", "per_step"), [(4, 4), (4, 8), (4, 32), (4, 6), (2, 7), (1, 4)])
def test_ranks_wait_as_little_as_said_and_less_the_more_packs_there_are(world: int, per_step: int) -> None:
    """The idle share worked out again from the batches that ranks run at the same time."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(60), 0.9, 1000)).astype(int).clip(2, 512)
    documents = make_documents(lengths.tolist())
    ranks = [PackedSteps(documents, 512, per_step, rank, world, seed=1, parity_tokens=900.0) for rank in range(world)]
    busy = time = in_turn = 0.0
    for i in range(ranks[0].steps_per_epoch):
        shares = [[cost(b, documents) for b in rank.step(i).batches] for rank in ranks]
        together = [max(costs) for costs in zip_longest(*shares, fillvalue=0.0)]
        assert together == sorted(together, reverse=True), "what takes the most memory comes first"
        busy, time = busy + sum(map(sum, shares)), time + sum(together)
        packs = [cost(b, documents) for b in PackedSteps(documents, 512, per_step, seed=1).step(i).batches]
        np.random.default_rng(i).shuffle(packs)
        in_turn += sum(max(packs[m : m + world]) for m in range(0, len(packs), world))
    assert ranks[0].idle_share == pytest.approx(1 - busy / (world * time), abs=1e-12)
    assert time <= in_turn
    if per_step == 32:
        assert ranks[0].idle_share < 0.4 * (1 - busy / (world * in_turn))


def cost(batch: PackedBatch, documents: Documents) -> float:
    """Work in a batch, for the parity above."""
    return sum(n + n**2 / 900.0 for n in documents.lengths[list(batch.doc_ids)].tolist())


def step_loss(documents: Documents, packs_per_step: int = 64) -> float:
    """Loss of an epoch in one step: tokens stand for hidden states, as in a model of the last token alone."""
    steps = PackedSteps(documents, 64, packs_per_step)
    assert steps.steps_per_epoch == 1
    batches, normalizer, _, _ = steps.step(0)
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(9000, 8, generator=random), torch.randn(9000, 8, generator=random)
    return sum(
        linear_cross_entropy(
            hidden[batch.input_ids], head, batch.targets, normalizer=normalizer, token_weights=batch.token_weights
        ).item()
        for batch in batches
    )


def test_weights_count_as_often_as_they_say() -> None:
    documents = make_documents([40, 7, 22, 35, 60, 3, 9])
    n = len(documents)
    plain = step_loss(documents)
    assert step_loss(replace(documents, weights=np.full(n, 2, np.float32))) == plain
    assert step_loss(replace(documents, weights=np.full(n, 0.3, np.float32))) == pytest.approx(plain, rel=1e-6)

    # A weight of 3 is a document that is there three times.
    weights = np.array([1, 3, 1, 1, 2, 1, 1], np.float32)
    weighted = replace(documents, weights=weights)
    repeated = np.repeat(np.arange(n), weights.astype(int))
    spans = [slice(*documents.offsets[d : d + 2]) for d in repeated]
    several = replace(
        documents,
        input_ids=np.concatenate([documents.input_ids[span] for span in spans]),
        supervised=np.concatenate([documents.supervised[span] for span in spans]),
        offsets=np.concatenate([[0], np.cumsum(documents.lengths[repeated])]),
    )
    assert step_loss(weighted) == pytest.approx(step_loss(several), rel=1e-6)
    assert step_loss(weighted) != pytest.approx(plain, rel=1e-3)
    step = PackedSteps(weighted, 64, 64).step(0)
    assert type(step.normalizer) is float
    assert step.normalizer == several.n_targets.sum()
    assert step.n_supervised == documents.n_targets.sum()
    for batch in step.batches:
        check_batch(batch, weighted)


def doc_ids_of(steps: PackedSteps, i: int) -> list[tuple[int, ...]]:
    return [batch.doc_ids for batch in steps.step(i).batches]


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


def test_a_pack_is_no_larger_than_what_fills_it() -> None:
    documents = make_documents([5, 3, 4])
    steps = PackedSteps(documents, 32768, 8)
    assert (steps.pack_tokens, steps.n_packs, steps.efficiency) == (12, 1, 1.0)
    assert [len(batch.input_ids) for batch in steps.step(0).batches] == [12]
