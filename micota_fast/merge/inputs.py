"""The checkpoints that are merged: tensors mapped from their files, matched by name, embeddings tied or not."""

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.errors import InputError
from micota_fast.merge.vocabulary import check_vocabulary
from micota_fast.model.config import ModelConfig
from micota_fast.model.folder import DERIVED_BUFFERS, StoredTensor, read_header, resolve_checkpoint, tensor_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NUMPY = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}  # numpy has no bfloat16, so halves are bits


class Source(NamedTuple):
    """One tensor of one checkpoint, flat."""

    elements: NDArray[Any]  # of NUMPY[code], mapped from the file
    code: str
    shape: tuple[int, ...]
    where: str  # for errors: file and tensor
    file: int  # descriptor
    start: int  # first byte in the file

    def not_finite(self, start: int, stop: int) -> InputError:
        """What to say where elements [start, stop) are not all finite."""
        exponent, mantissa = {"F32": (0x7F800000, 23), "F16": (0x7C00, 10), "BF16": (0x7F80, 7)}[self.code]
        bits: NDArray[Any] = self.elements[start:stop].view(np.uint32 if self.code == "F32" else np.uint16)
        fractions = bits[bits & exponent == exponent] & ((1 << mantissa) - 1)
        return InputError(f"{self.where} holds {'NaN' if fractions.any() else 'infinity'}; this checkpoint is damaged")

    def read_ahead(self) -> None:
        """Have the operating system fetch the tensor from the disk, without waiting for it."""
        os.posix_fadvise(self.file, self.start, self.elements.nbytes, os.POSIX_FADV_WILLNEED)


class Checkpoint:
    """A checkpoint folder, mapped."""

    def __init__(self, name: str) -> None:
        self.folder = resolve_checkpoint(name)
        self.name = self.folder.name if Path(name).is_dir() else name  # a path would tell where, not what
        self.config = ModelConfig.from_checkpoint(self.folder)
        self._files: dict[Path, tuple[int, mmap.mmap]] = {}
        self._tensors: dict[str, tuple[Path, StoredTensor]] = {}
        files = tensor_files(self.folder)
        for path in sorted(set(files.values())):
            self._map(path)
            for tensor, stored in read_header(path).items():
                if not DERIVED_BUFFERS.search(tensor):
                    self._tensors[tensor] = path, stored
        for tensor in (EMBEDDING,) if self.config.tie_word_embeddings else (EMBEDDING, HEAD):
            if tensor not in self._tensors:
                raise InputError(f"{self.folder}: tensor {tensor} is missing, which its config.json asks for")
        if self.config.tie_word_embeddings and HEAD in self._tensors:
            # Some tools write the tied matrix twice.
            if _differ(self[HEAD].elements, self[EMBEDDING].elements):
                raise InputError(
                    f"{self[HEAD].where} differs from {EMBEDDING}, though {self.folder / 'config.json'} says "
                    "tie_word_embeddings: true; set it to false if the checkpoint has a head of its own"
                )
            del self._tensors[HEAD]

    def _map(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
            self._files[path] = fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None

    def close(self) -> None:
        """Close the files; what is mapped goes with its last array."""
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()

    def untie(self) -> None:
        """Give the model a head of its own, where it has none: its embedding."""
        if self.config.tie_word_embeddings:
            self._tensors[HEAD] = self._tensors[EMBEDDING]

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def __getitem__(self, tensor: str) -> Source:
        path, (code, shape, start, _) = self._tensors[tensor]
        fd, mapped = self._files[path]
        where = f"{path}: tensor {tensor}"
        if code not in NUMPY:
            raise InputError(f"{where} is of type {code}; known: {', '.join(NUMPY)}")
        if math.prod(shape) == 0:
            raise InputError(f"{where} has no elements: its shape is {list(shape)}")
        elements = np.frombuffer(mapped, NUMPY[code], math.prod(shape), start)
        return Source(elements, code, shape, where, fd, start)


def _differ(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype != b.dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8))  # NaN equals itself here


def match(models: Sequence[Checkpoint], one_tokenizer: bool) -> dict[str, tuple[Source, ...]]:
    """The tensors of all models (the first of them gives the shapes), in the order of their names.

    If one model has a head of its own and others are tied, the latter's embedding is their head too. Embeddings and
    heads may differ in their number of rows, as those of one tokenizer's family do by padding.

    Args:
        one_tokenizer: check that the models share one, also where nothing in their shapes says otherwise.

    Raises:
        InputError: naming file and tensor: one is missing, of another shape or of no float type; the models are of
            different architectures, or the vocabularies are not one tokenizer's.
    """
    first = models[0]
    if not all(model.config.tie_word_embeddings for model in models):
        for model in models:
            model.untie()
    for model in models[1:]:
        if model.config.architecture != first.config.architecture:
            raise InputError(
                f"{model.folder} is a {model.config.architecture}, but {first.folder} a {first.config.architecture}"
            )
        for one, other in ((first, model), (model, first)):
            if missing := sorted(one.names - other.names):
                raise InputError(f"{other.folder}: tensor {missing[0]} is missing; {one[missing[0]].where} is there")
    matched = {}
    for tensor in sorted(first.names):
        sources = tuple(model[tensor] for model in models)
        rows = min(source.shape[0] for source in sources) if sources[0].shape else 0
        for model, source in zip(models[1:], sources[1:], strict=True):
            if source.shape == sources[0].shape:
                if one_tokenizer and tensor == EMBEDDING:
                    check_vocabulary(first.folder, model.folder, rows)
                continue
            if tensor not in (EMBEDDING, HEAD) or source.shape[1:] != sources[0].shape[1:]:
                raise InputError(
                    f"{source.where} has shape {list(source.shape)}, but {list(sources[0].shape)} in {first.folder}"
                )
            if tensor == EMBEDDING:
                check_vocabulary(first.folder, model.folder, rows)
            elif source.shape != model[EMBEDDING].shape:
                raise InputError(
                    f"{source.where} has {source.shape[0]} rows, but the model's embedding {model[EMBEDDING].shape[0]}"
                )
        matched[tensor] = sources
    return matched
