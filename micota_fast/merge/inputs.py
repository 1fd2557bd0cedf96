"""The checkpoints that are merged: tensors mapped from their files, matched by name, embeddings tied or not."""

import math
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.errors import InputError
from micota_fast.merge.vocabulary import check_vocabulary, difference
from micota_fast.model.checks import EMBEDDING, HEAD, check_tied, checked_config
from micota_fast.model.folder import names_adapter, resolve_checkpoint, stored_tensors

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
        """Return the error for elements [start, stop), which are not all finite."""
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
        self._made = ExitStack()
        if names_adapter(name):
            from micota_fast.model.adapter import temporarily_merged  # imports torch, which merging does without

            self.folder = self._made.enter_context(temporarily_merged(name))
            self.name = "+".join(PurePath(part).name if Path(part).is_dir() else part for part in name.rsplit("+", 1))
        else:
            self.folder = resolve_checkpoint(name)
            self.name = self.folder.name if Path(name).is_dir() else name  # a path would tell where, not what
        self.config = checked_config(self.folder)
        self._tensors = stored_tensors(self.folder)
        self._files: dict[Path, tuple[int, mmap.mmap]] = {}
        for path in sorted({path for path, _ in self._tensors.values()}):
            self._map(path)
        check_tied(self.config, self._tensors, self.folder)
        if self.config.tie_word_embeddings:
            self._tensors.pop(HEAD, None)

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
        self._made.close()

    def untie(self) -> None:
        """Give the model a head of its own, if it has none: its embedding."""
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


def match(models: Sequence[Checkpoint], one_tokenizer: bool) -> dict[str, tuple[Source, ...]]:
    """Return the tensors of all models (the first of them gives the shapes), in the order of their names.

    If one model has a head of its own and others are tied, the latter's embedding is their head too. Embeddings and
    heads may differ in their number of rows, as those of one tokenizer's family do by padding.

    Args:
        one_tokenizer: check that the models share one, also if nothing in their shapes says otherwise.

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
                if tensor == EMBEDDING:
                    if one_tokenizer:
                        check_vocabulary(first.folder, model.folder, rows)
                    else:
                        _warn_of_other_tokens(first.folder, model.folder)
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


def _warn_of_other_tokens(base: Path, model: Path) -> None:
    """Say that rows of two embeddings which are merged belong to different tokens, if the tokenizers are there."""
    try:
        found = difference(base, model)
    except InputError:  # without tokenizers, nothing is known
        return
    if found is not None:
        print(
            f"merge: warning: {found}. Their embeddings are merged row by row all the same; `tokenizer_source: base` "
            "in the file makes this an error",
            file=sys.stderr,
        )
