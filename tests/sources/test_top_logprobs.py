"""A store of log-probabilities gives back what was put in, loses nothing to a SIGKILL and names what is damaged."""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from micota_fast.errors import InputError
from micota_fast.sources import top_logprobs, top_logprobs_journal
from micota_fast.sources.top_logprobs import MANIFEST, TopLogprobs, TopLogprobsRow, TopLogprobsWriter

K = 3
KEYS = [("p2", 0), ("p1", 1), ("é", 0), ("p1", 0), ("empty", 0)]


def document(key: tuple[str, int]) -> TopLogprobsRow:
    """Rows of a document, made of its key; the last row has fewer than K tokens."""
    numbers = np.random.default_rng([*key[0].encode(), key[1]])
    tokens = 0 if key[0] == "empty" else int(numbers.integers(1, 9))
    ids = (numbers.integers(0, 1 << 17, (tokens, 1)) + 7 * np.arange(K)).astype(np.int32)
    logprobs = -(np.log(K) + numbers.exponential(5, (tokens, K))).astype(np.float16)
    ids[-1:, -1], logprobs[-1:, -1] = -1, -np.inf
    own = -numbers.exponential(5, tokens).astype(np.float32)
    return TopLogprobsRow(ids[:, 0].copy(), own, ids, logprobs)


def write(folder: Path, keys: list[tuple[str, int]] = KEYS) -> None:
    with TopLogprobsWriter(folder, K, {"model": "teacher"}) as writer:
        for key in keys:
            if key not in writer:
                writer.append(key, *document(key))


def check(folder: Path, keys: list[tuple[str, int]] = KEYS) -> None:
    store = TopLogprobs(folder)
    store.verify()
    assert set(store) == set(keys)
    assert store.tokens == sum(len(document(key).token_ids_T) for key in keys)
    for key in keys:
        for ours, theirs in zip(store[key], document(key), strict=True):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
            assert not ours.flags.owndata
            assert not ours.flags.writeable


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 30])
def test_what_was_written_is_read_back_from_any_number_of_shards(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_logprobs, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(top_logprobs_journal, "SEGMENT_BYTES", shard_bytes)
    write(tmp_path / "store")
    check(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"], "nothing is left of the journal"
    shards = sorted((tmp_path / "store").glob("*.safetensors"))
    assert (len(shards) == 1) == (shard_bytes == 1 << 30)
    read = [load_file(shard) for shard in shards]  # by the library of the format
    assert np.array_equal(
        np.concatenate([shard["top_ids"] for shard in read]),
        np.concatenate([document(key).top_ids_TK for key in sorted(KEYS)]),
    )


def test_equal_documents_give_equal_bytes_in_whatever_order_they_came(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "other", KEYS[::-1])
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert TopLogprobs(tmp_path / "one").fingerprint == TopLogprobs(tmp_path / "other").fingerprint


def _append_until_killed(folder: Path, appended: "multiprocessing.Queue[int]") -> None:
    with TopLogprobsWriter(folder, K, {"model": "teacher"}) as writer:
        for key in KEYS[:3]:
            writer.append(key, *document(key))
        appended.put(len(writer))
        signal.pause()


def test_a_sigkill_loses_no_document_and_the_rest_is_resumed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    appended = context.Queue()
    child = context.Process(target=_append_until_killed, args=(tmp_path / "store", appended))
    child.start()
    assert appended.get(timeout=240) == 3
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (tmp_path / "store").exists()
    with TopLogprobsWriter(tmp_path / "store", K, {"model": "teacher"}) as writer:
        assert [key in writer for key in KEYS] == [True] * 3 + [False] * 2
        for key in KEYS[3:]:
            writer.append(key, *document(key))
    check(tmp_path / "store")
    write(tmp_path / "at once")
    assert contents(tmp_path / "store") == contents(tmp_path / "at once")


def interrupted(folder: Path, keys: list[tuple[str, int]] = KEYS) -> Path:
    """A journal whose writer was stopped; returns its last segment."""
    with suppress(KeyboardInterrupt), TopLogprobsWriter(folder, K, {"model": "teacher"}) as writer:
        for key in keys:
            writer.append(key, *document(key))
        raise KeyboardInterrupt
    return max(folder.with_name(folder.name + ".journal").glob("*.log"))


def test_a_torn_tail_is_cut_at_any_byte_and_whole_documents_are_kept(tmp_path: Path) -> None:
    segment = interrupted(tmp_path / "store", KEYS[:2])
    whole = segment.read_bytes()
    first = len(interrupted(tmp_path / "first", KEYS[:1]).read_bytes())
    for end in range(first, len(whole)):
        segment.write_bytes(whole[:end])
        with suppress(KeyboardInterrupt), TopLogprobsWriter(tmp_path / "store", K, {"model": "teacher"}) as writer:
            assert (KEYS[0] in writer, KEYS[1] in writer, writer.cut_bytes) == (True, False, end - first)
            raise KeyboardInterrupt
        assert segment.stat().st_size == first
    for bad in range(first, len(whole)):
        segment.write_bytes(whole[:bad] + bytes([whole[bad] ^ 1]) + whole[bad + 1 :])
        with suppress(KeyboardInterrupt), TopLogprobsWriter(tmp_path / "store", K, {"model": "teacher"}) as writer:
            assert (KEYS[0] in writer, KEYS[1] in writer) == (True, False)
            raise KeyboardInterrupt


def test_a_segment_that_cannot_be_read_is_said_not_to(tmp_path: Path) -> None:
    segment = interrupted(tmp_path / "store")
    with (
        pytest.raises(InputError, match=rf"cannot read {segment}"),
        TopLogprobsWriter(tmp_path / "store", K, {"model": "teacher"}),
    ):
        segment.unlink()
    segment.mkdir()
    with pytest.raises(InputError, match=rf"cannot read {segment}"):
        TopLogprobsWriter(tmp_path / "store", K, {"model": "teacher"})


@pytest.mark.parametrize(("at", "message"), [(5, "record at byte 0 is damaged"), (40, r"sample 0\) at byte 24 is")])
def test_damage_before_the_last_segment_is_named(
    at: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_logprobs_journal, "SEGMENT_BYTES", 1)
    segment = interrupted(tmp_path / "store").with_name("000000.log")
    data = bytearray(segment.read_bytes())
    data[at] ^= 1
    segment.write_bytes(data)
    with pytest.raises(InputError, match=f"000000.log: .*{message}.*delete this file"):
        write(tmp_path / "store")
    segment.unlink()  # as the message says
    write(tmp_path / "store")
    check(tmp_path / "store")


def test_a_finished_store_stays_as_it_is_and_another_one_is_not_mixed_in(tmp_path: Path) -> None:
    write(tmp_path / "store")
    before = contents(tmp_path / "store")
    write(tmp_path / "store")
    assert contents(tmp_path / "store") == before
    with pytest.raises(InputError, match=r"belongs to another run \(it differs in: made_by.model\)"):
        TopLogprobsWriter(tmp_path / "store", K, {"model": "other"})
    interrupted(tmp_path / "begun")
    with pytest.raises(InputError, match=r"begun.journal belongs to another run \(it differs in: top_k\)"):
        TopLogprobsWriter(tmp_path / "begun", K + 1, {"model": "teacher"})


@pytest.mark.parametrize(
    "tensor", ["offsets", "samples", "problems", "token_ids", "token_logprobs", "top_ids", "top_logprobs"]
)
def test_a_damaged_tensor_is_refused_by_name(tensor: str, tmp_path: Path) -> None:
    write(tmp_path / "store")
    shard = tmp_path / "store" / "000000.safetensors"
    data = bytearray(shard.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header[tensor]["data_offsets"][1] - 1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=f"000000.safetensors: tensor {tensor} does not match its checksum"):
        TopLogprobs(tmp_path / "store").verify()


def forge(folder: Path, tensor: str, change: Callable[[NDArray[Any]], None]) -> Path:
    """Change a tensor of the first shard, with its checksum; returns the shard."""
    shard, manifest = folder / "000000.safetensors", folder / MANIFEST
    arrays = {name: array.copy() for name, array in load_file(shard).items()}
    change(arrays[tensor])
    save_file(arrays, shard)
    described = json.loads(manifest.read_text())
    described["shards"][0]["sha256"][tensor] = hashlib.sha256(arrays[tensor].tobytes()).hexdigest()
    manifest.write_text(json.dumps(described))
    return shard


@pytest.mark.parametrize(
    ("tensor", "index", "value", "message"),
    [
        ("offsets", 0, 1, "tensor offsets: it must begin with 0, never decrease and end with"),
        ("offsets", 1, -1, "tensor offsets: it must begin with 0, never decrease"),
        ("offsets", 2, 1 << 40, "tensor offsets: it must begin with 0, never decrease"),
        ("offsets", -1, 0, "tensor offsets: it must begin with 0, never decrease"),
        ("problem_offsets", 0, 1, "tensor problem_offsets: it must begin with 0"),
        ("problem_offsets", 2, 1 << 62, "tensor problem_offsets: it must begin with 0"),
        ("problem_offsets", -1, -5, "tensor problem_offsets: it must begin with 0"),
        ("problems", 0, 0xFF, "tensor problems: the id of document 0 is not UTF-8"),
        ("samples", 2, 0, r"\('p1', sample 0\) is there twice"),
        ("token_ids", 0, -1, "position 0: a token_id that is not from 0"),
        ("token_logprobs", 0, np.nan, "position 0: a token_logprob that is not finite"),
        ("token_logprobs", 0, 1.0, "position 0: a token_logprob that is not finite and below"),
        ("top_ids", (0, 0), -7, "position 0: a top_id that is not from -1"),
        ("top_ids", (0, 0), -1, "position 0: an id of -1, which is absent, with a log-probability"),
        ("top_logprobs", (0, 0), np.nan, "position 0: log-probabilities that are NaN"),
        ("top_logprobs", (0, 0), 2.0, "position 0: log-probabilities that are NaN, or of probabilities whose sum"),
    ],
)
def test_values_that_no_writer_leaves_are_refused_though_their_checksums_match(
    tensor: str, index: Any, value: float, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "store")

    def change(array: NDArray[Any]) -> None:
        array[index] = value

    shard = forge(tmp_path / "store", tensor, change)
    with pytest.raises(InputError, match=rf"^{shard}: .*{message}.*; delete the folder and make the store again"):
        TopLogprobs(tmp_path / "store").verify()


@pytest.mark.parametrize("key", ["documents", "tokens"])
def test_totals_that_the_shards_do_not_have_are_refused(key: str, tmp_path: Path) -> None:
    write(tmp_path / "store")
    manifest = tmp_path / "store" / MANIFEST
    described = json.loads(manifest.read_text())
    described[key] += 1
    manifest.write_text(json.dumps(described))
    with pytest.raises(InputError, match=rf"{manifest}: key '{key}' says {described[key]}, and the shards have"):
        TopLogprobs(tmp_path / "store")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("a\ud800", 0), r"id 'a\\ud800' holds half a character \(a lone surrogate\).*rename it"),
        (("a", 2**63), "id 'a': its sample must fit 64 bits, not 9223372036854775808"),
        (("a", -(2**63) - 1), "id 'a': its sample must fit 64 bits"),
        ((7, 0), r"\(7, sample 0\): an id must be text, and a sample a whole number"),
        (("a", 0.5), "an id must be text, and a sample a whole number"),
    ],
)
def test_a_key_that_cannot_be_stored_is_refused_by_its_id(key: Any, message: str, tmp_path: Path) -> None:
    with TopLogprobsWriter(tmp_path / "store", K) as writer:
        with pytest.raises(InputError, match=message):
            writer.append(key, [1], [-4], [[1, 2, 3]], [[-1, -2, -3]])
        writer.append(("a", 2**63 - 1), [1], [-4], [[1, 2, 3]], [[-1, -2, -3]])
    assert list(TopLogprobs(tmp_path / "store")) == [("a", 2**63 - 1)]


def test_a_store_of_another_version_is_to_be_made_again(tmp_path: Path) -> None:
    write(tmp_path / "store")
    manifest = tmp_path / "store" / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"format": {top_logprobs.FORMAT}', '"format": 1'))
    with pytest.raises(InputError, match=r"top_logprobs.json: format 1 is of another version"):
        TopLogprobs(tmp_path / "store")


def test_missing_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{MANIFEST} is not there"):
        TopLogprobs(tmp_path)
    write(tmp_path / "store")
    shard = tmp_path / "store" / "000000.safetensors"
    write(tmp_path / "other", KEYS[:1])
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(InputError, match=r"000000.safetensors: tensor offsets is not I64 \[6\]"):
        TopLogprobs(tmp_path / "store")
    shard.unlink()
    with pytest.raises(InputError, match=r"000000\.safetensors: is missing"):
        TopLogprobs(tmp_path / "store")


@pytest.mark.parametrize(
    ("ids", "own", "top_ids", "logprobs", "message"),
    [
        ([1, -1], [-1, -1], [[1, 2, 3]] * 2, [[-1, -2, -3]] * 2, "position 1: a token_id that is not from 0 to 99"),
        ([1, 100], [-1, -1], [[1, 2, 3]] * 2, [[-1, -2, -3]] * 2, "position 1: a token_id that is not from 0 to 99"),
        ([1.0], [-1], [[1, 2, 3]], [[-1, -2, -3]], "token_ids"),
        ([1], [-1, -1], [[1, 2, 3]], [[-1, -2, -3]], r"token_logprobs: \[1\] expected"),
        ([1], [float("nan")], [[1, 2, 3]], [[-1, -2, -3]], "a token_logprob that is not finite"),
        ([1], [float("-inf")], [[1, 2, 3]], [[-1, -2, -3]], "a token_logprob that is not finite"),
        ([1], [-1e300], [[1, 2, 3]], [[-1, -2, -3]], "a token_logprob that is not finite"),
        ([1], [0.1], [[1, 2, 3]], [[-1, -2, -3]], "a token_logprob that is not finite and below"),
        ([1], [-1], [[1, 2]], [[-1, -2]], r"\[1, 3\] expected"),
        ([1, 2], [-1, -1], [[1, 2, 3]], [[-1, -2, -3]], r"\[2, 3\] expected"),
        ([1], [-1], [[1, 2, -2]], [[-1, -2, -3]], "a top_id that is not from -1 to 99"),
        ([1], [-1], [[1, 2, -1]], [[-1, -2, -3]], "which is absent"),
        ([1], [-1], [[1, 2, 3]], [[-1, -2, float("nan")]], "that are NaN"),
        ([1], [-1], [[1, 2, 3]], [[1, -2, -3]], "sum is above 1.01"),
        ([1], [-1], [[1, 2, 100]], [[-1, -2, -3]], "a top_id that is not from -1 to 99"),
        ([1] * 3, [-1] * 3, [[1, 2, 3], [4, 5, 4], [1, 2, 3]], [[-1, -2, -3]] * 3, r"sample 0\), position 1: .* twice"),
        ([1] * 2, [-1] * 2, [[1, 2, 3]] * 2, [[-1, -2, -3], [-0.1, -2, -5]], r"\('p', .* position 1: .* sum is above"),
    ],
)
def test_arrays_that_are_no_scores_are_not_taken(
    ids: list[int], own: list[float], top_ids: object, logprobs: object, message: str, tmp_path: Path
) -> None:
    with TopLogprobsWriter(tmp_path / "store", K, vocab_size=100) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(("p", 0), ids, own, top_ids, logprobs)
        writer.append(("p", 0), [1], [-4], [[99, -1, -1]], [[-1, -np.inf, -np.inf]])
        with pytest.raises(ValueError, match="written already"):
            writer.append(("p", 0), [1], [-4], [[1, 2, 3]], [[-1, -2, -3]])
    assert len(TopLogprobs(tmp_path / "store")) == 1
