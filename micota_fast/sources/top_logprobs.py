"""A store of a teacher's top-k log-probabilities: for each token of a text, its K likeliest tokens there.

A folder with `top_logprobs.json` (format, K, who made it, and of each shard its size and the SHA-256 of its tensors)
and shards `000000.safetensors`, ... in the order of (problem, sample). D documents of T tokens in all make a shard of

    offsets          int64   [D+1]   document d has the rows offsets[d]:offsets[d+1]
    samples          int64   [D]     of each document
    problem_offsets  int64   [D+1]   its problem's id is problems[problem_offsets[d]:problem_offsets[d+1]]
    problems         uint8           ids, end to end, in UTF-8
    token_ids        int32   [T]     the text's own tokens
    token_logprobs   float32 [T]     their natural logarithms of probability, which the K need not hold
    top_ids          int32   [T, K]  the likeliest tokens at their places, in the teacher's vocabulary; -1: absent
    top_logprobs     float16 [T, K]  natural logarithms; -inf where absent

A row belongs to the token that it predicts: `top_ids[t]` are the likeliest tokens at the place of `token_ids[t]`, given
all that precedes it. Equal documents give equal bytes, in whatever order they came.

`token_logprobs` is float32 because training takes its difference from the student's log-probability, which is small
where the two models agree: float16 rounds a log-probability of -10 by up to 0.004. It costs 4 bytes next to 6 K.
"""

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.dtypes import DTYPES
from micota_fast.common.files import reading, remove_whole, whole_folder
from micota_fast.common.fingerprint import differences, of_json
from micota_fast.common.json_io import as_read_back, write_json
from micota_fast.common.safetensors_file import Layout, SafetensorsFile, read_header
from micota_fast.common.schema import Count, PositiveCount, load, to_json
from micota_fast.errors import InputError
from micota_fast.sources.top_logprobs_journal import Key, TopLogprobsJournal, row_bytes
from micota_fast.sources.top_logprobs_rows import check_key, checked_rows

FORMAT = 2
MANIFEST = "top_logprobs.json"
SHARD_BYTES = 1 << 30  # of a shard's rows; a longer document has a shard of its own
_REMEDY = "delete the folder and make the store again"
_ROWS = ("token_ids", "token_logprobs", "top_ids", "top_logprobs")  # tensors of T rows, as a document has them


@dataclass(frozen=True)
class _Shard:
    """A shard, as the manifest describes it."""

    file: str
    documents: PositiveCount
    tokens: Count
    problem_bytes: Count
    sha256: dict[str, str]  # by tensor


@dataclass(frozen=True)
class _Manifest:
    """What `top_logprobs.json` holds."""

    format: int
    top_k: PositiveCount
    made_by: dict[str, Any]
    documents: Count
    tokens: Count
    shards: list[_Shard]


class TopLogprobsRow(NamedTuple):
    """A document's arrays: read-only views of the mapped file."""

    token_ids_T: NDArray[np.int32]
    token_logprobs_T: NDArray[np.float32]
    top_ids_TK: NDArray[np.int32]
    top_logprobs_TK: NDArray[np.float16]


def journal_of(folder: Path) -> Path:
    """Return where a store's documents lie until it is whole."""
    return folder.with_name(f"{folder.name}.journal")


class TopLogprobsWriter:
    """Write a store; what an interrupted writer of the same folder has left is taken up.

    Until it is whole, everything lies in `FOLDER.journal`. A context manager: when the block ends without an error, the
    folder appears whole. A folder that is there already, with the same `top_k` and `made_by`, stays as it is.

    Args:
        folder: where.
        top_k: K, columns of each document.
        made_by: JSON object that names what the rows depend on, such as the model and the texts.
        vocab_size: ids that there are, if it is known: no document may have others.

    Raises:
        InputError: folder or journal belong to another `top_k` or `made_by`, are in use by another process or damaged,
            or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        top_k: int,
        made_by: Mapping[str, Any] | None = None,
        *,
        vocab_size: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._vocab_size = vocab_size
        self._manifest = {"format": FORMAT, "top_k": top_k, "made_by": as_read_back(made_by or {})}
        self._top_k = top_k
        place = journal_of(self.folder)
        self._finished: TopLogprobs | None = None
        self._journal: TopLogprobsJournal | None = None
        if self.folder.exists():
            self._finished = TopLogprobs(self.folder)
            theirs = {"format": FORMAT, "top_k": self._finished.top_k, "made_by": self._finished.made_by}
            if differing := sorted(differences(theirs, self._manifest)):
                raise InputError(
                    f"{self.folder} belongs to another run (it differs in: {', '.join(differing)}); "
                    "delete it to start over, or write elsewhere"
                )
            remove_whole(place)  # killed between the two
        else:
            self._journal = TopLogprobsJournal(place, self._manifest)

    @property
    def cut_bytes(self) -> int:
        """Bytes of the last documents that were torn when the writer before was killed: they are to be made again."""
        return 0 if self._journal is None else self._journal.cut_bytes

    def __len__(self) -> int:
        return len(self._documents)

    def __contains__(self, key: Key) -> bool:
        return key in self._documents

    @property
    def _documents(self) -> "TopLogprobsJournal | TopLogprobs":
        documents = self._finished if self._journal is None else self._journal
        assert documents is not None
        return documents

    def append(self, key: Key, token_ids_T: Any, token_logprobs_T: Any, top_ids_TK: Any, top_logprobs_TK: Any) -> None:
        """Add a document, which has reached the operating system when this returns.

        Args:
            key: id of the problem and sample; not there yet.
            token_ids_T: integers, at least 0.
            token_logprobs_T: of these tokens, finite; stored as float32.
            top_ids_TK: integers, at least 0, each once in its row; -1 pads a row of fewer than K.
            top_logprobs_TK: of a row's probabilities the sum is at most 1, but for rounding; stored as float16, which
                rounds by a factor of up to 2**-11; -inf pads.

        Raises:
            ValueError: the key is there already, or the arrays do not fit together or hold other values: the first such
                position is named.
            InputError: the id is not Unicode text or the sample does not fit 64 bits; or the disk is full or the folder
                cannot be written. What was written before is kept.
        """
        check_key(key)
        if key in self or self._journal is None:
            raise ValueError(f"{key} is written already" if key in self else f"{self.folder} is finished")
        arrays = checked_rows(
            key, token_ids_T, token_logprobs_T, top_ids_TK, top_logprobs_TK, self._top_k, self._vocab_size
        )
        self._journal.append(key, arrays)

    def __enter__(self) -> "TopLogprobsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._journal is None:
            return
        with closing(self._journal):
            if kind is None:
                with whole_folder(self.folder) as aside:
                    self._write(self._journal, aside)
        if kind is None:
            remove_whole(self._journal.folder)

    def _write(self, journal: TopLogprobsJournal, folder: Path) -> None:
        sizes = journal.sizes()
        most = SHARD_BYTES // row_bytes(self._top_k)
        shards: list[list[Key]] = []
        filled = 0
        for key in sorted(sizes):
            if not shards or filled + sizes[key] > most:
                shards.append([])
                filled = 0
            shards[-1].append(key)
            filled += sizes[key]
        described = [self._write_shard(journal, keys, sizes, folder, n) for n, keys in enumerate(shards)]
        manifest = _Manifest(**self._manifest, documents=len(sizes), tokens=sum(sizes.values()), shards=described)
        write_json(folder / MANIFEST, to_json(manifest), 2)

    def _write_shard(
        self, journal: TopLogprobsJournal, keys: list[Key], sizes: Mapping[Key, int], folder: Path, n: int
    ) -> _Shard:
        names = [key[0].encode() for key in keys]
        tokens = sum(sizes[key] for key in keys)
        layout = _layout(len(keys), tokens, sum(map(len, names)), self._top_k)
        digests = {tensor: hashlib.sha256() for tensor in layout}
        at = dict.fromkeys(layout, 0)
        path = folder / f"{n:06d}.safetensors"
        with closing(SafetensorsFile(path, layout)) as file:

            def write(tensor: str, array: NDArray[Any]) -> None:
                piece = memoryview(array.tobytes())
                file.write(tensor, at[tensor], piece)
                digests[tensor].update(piece)
                at[tensor] += len(piece)

            write("offsets", np.cumsum([0, *(sizes[key] for key in keys)], dtype="<i8"))
            write("samples", np.array([key[1] for key in keys], "<i8"))
            write("problem_offsets", np.cumsum([0, *map(len, names)], dtype="<i8"))
            write("problems", np.frombuffer(b"".join(names), np.uint8))
            for arrays in journal.documents(keys):
                for tensor, array in zip(_ROWS, arrays, strict=True):
                    write(tensor, array)
        sums = {tensor: digest.hexdigest() for tensor, digest in digests.items()}
        return _Shard(path.name, len(keys), tokens, sum(map(len, names)), sums)


class TopLogprobs(Mapping[Key, TopLogprobsRow]):
    """A finished store, mapped: opening it reads the index, and of the rows nothing.

    Args:
        folder: that a `TopLogprobsWriter` has left.

    Attributes:
        top_k: K.
        made_by: what the writer was given.
        tokens: of all documents.
        fingerprint: SHA-256 (hex) of the manifest, hence of all that the store holds.

    Raises:
        InputError: the folder is not one, or manifest, header or index are damaged. `verify` reads the rest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"{folder}: {MANIFEST} is not there; name a folder that `micota score` has written")
        manifest = load(_Manifest, self.folder / MANIFEST)
        if manifest.format != FORMAT:
            raise InputError(
                f"{self.folder / MANIFEST}: format {manifest.format} is of another version, and {FORMAT} is known; "
                f"{_REMEDY}"
            )
        self.top_k, self.made_by, self.tokens = manifest.top_k, manifest.made_by, manifest.tokens
        self.fingerprint = of_json(to_json(manifest))
        self._shards = [self._open(shard) for shard in manifest.shards]
        self._described = manifest.shards
        self._places: dict[Key, tuple[int, int, int]] = {}  # shard, first row, row after the last
        for number, tensors in enumerate(self._shards):
            for tensor in ("offsets", "samples", "problem_offsets", "problems"):
                self._check(number, tensor)
            rows, bounds = self._bounds(number, "offsets"), self._bounds(number, "problem_offsets")
            names, samples = tensors["problems"].tobytes(), tensors["samples"].tolist()
            for d, sample in enumerate(samples):
                try:
                    key = names[bounds[d] : bounds[d + 1]].decode(), sample
                except UnicodeDecodeError:
                    raise self._bad(number, f"tensor problems: the id of document {d} is not UTF-8") from None
                if key in self._places:
                    raise self._bad(number, f"({key[0]!r}, sample {sample}) is there twice")
                self._places[key] = number, rows[d], rows[d + 1]
        for what, listed, found in (
            ("documents", manifest.documents, len(self._places)),
            ("tokens", manifest.tokens, sum(shard.tokens for shard in manifest.shards)),
        ):
            if listed != found:
                counts = f"key '{what}' says {listed}, and the shards have {found}"
                raise InputError(f"{self.folder / MANIFEST}: {counts}; {_REMEDY}")

    def _open(self, shard: _Shard) -> dict[str, NDArray[Any]]:
        path = self.folder / shard.file
        if Path(shard.file).name != shard.file or not path.is_file():
            raise InputError(f"{path}: is missing, though {MANIFEST} lists it; copy it again, or make the store again")
        layout = _layout(shard.documents, shard.tokens, shard.problem_bytes, self.top_k)
        found = read_header(path)
        for tensor, (shape, code) in layout.items():
            if tensor not in found or (found[tensor].shape, found[tensor].code) != (shape, code):
                raise InputError(
                    f"{path}: tensor {tensor} is not {code} {list(shape)}, as {MANIFEST} has it; copy the file again, "
                    f"or make the store again"
                )
        with reading(path), path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            tensor: np.ndarray(shape, np.dtype(DTYPES[code].name).newbyteorder("<"), data, found[tensor].start)
            for tensor, (shape, code) in layout.items()
        }

    def _check(self, number: int, tensor: str) -> None:
        shard = self._described[number]
        array = self._shards[number][tensor]
        if hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest() != shard.sha256.get(tensor):
            raise InputError(
                f"{self.folder / shard.file}: tensor {tensor} does not match its checksum in {MANIFEST}; copy the file "
                f"again, or make the store again"
            )

    def _bounds(self, number: int, tensor: str) -> list[int]:
        """Where each document's part begins, and the end of the last: from 0 to all that there is, never back."""
        bounds = self._shards[number][tensor]
        shard = self._described[number]
        end = shard.tokens if tensor == "offsets" else shard.problem_bytes
        if bounds[0] != 0 or bounds[-1] != end or (bounds[1:] < bounds[:-1]).any():
            raise self._bad(number, f"tensor {tensor}: it must begin with 0, never decrease and end with {end}")
        return list(bounds.tolist())

    def _bad(self, number: int, what: str) -> InputError:
        """The error for values that no writer leaves, though the checksums match."""
        return InputError(f"{self.folder / self._described[number].file}: {what}; {_REMEDY}")

    def verify(self) -> None:
        """Read everything, compare it with its checksums and see that every row is one that the writer takes.

        Raises:
            InputError: naming the file and the tensor that differs, or the document and position of the bad row.
        """
        for number, tensors in enumerate(self._shards):
            for tensor in tensors:
                self._check(number, tensor)
        for key, (number, _, _) in self._places.items():
            try:
                checked_rows(key, *self[key], self.top_k, None)
            except ValueError as error:
                raise self._bad(number, str(error)) from None

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: Key) -> TopLogprobsRow:
        number, start, stop = self._places[key]
        shard = self._shards[number]
        return TopLogprobsRow(*(shard[tensor][start:stop] for tensor in _ROWS))


def _layout(documents: int, tokens: int, problem_bytes: int, top_k: int) -> Layout:
    """Return a shard's tensors, those of the widest type first, so that each is aligned."""
    return {
        "offsets": ((documents + 1,), "I64"),
        "samples": ((documents,), "I64"),
        "problem_offsets": ((documents + 1,), "I64"),
        "token_ids": ((tokens,), "I32"),
        "token_logprobs": ((tokens,), "F32"),
        "top_ids": ((tokens, top_k), "I32"),
        "top_logprobs": ((tokens, top_k), "F16"),
        "problems": ((problem_bytes,), "U8"),
    }
