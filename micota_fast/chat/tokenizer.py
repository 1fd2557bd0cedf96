"""A checkpoint's tokenizer.json: read here only after it was tried under limits, and text is tokenised there.

What may explode with the text (normalizers, patterns) runs in the limited process. The tokenizer in this process gives
the vocabulary and decodes.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from micota_fast.chat.limits import PROCESS, Allowance, Handle, OverLimitError
from micota_fast.errors import InputError

MAX_FILE_BYTES = 1 << 28  # the largest published ones have some 35 MB
MIB = 1 << 20
# A thread of the library has a stack and a heap of its own, in address space.
THREADS_BYTES = 160 * MIB * (os.cpu_count() or 1)
ENCODED_AT_ONCE = 1_000_000  # characters


class TextError(InputError):
    """One of several texts cannot be tokenised.

    Attributes:
        index: which.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class ForeignTokenizer:
    """A checkpoint's tokenizer, with truncation and padding switched off.

    Args:
        path: tokenizer.json.

    Attributes:
        library: the `tokenizers.Tokenizer`, for its vocabulary; it must not be given text.

    Raises:
        InputError: the file cannot be read as a tokenizer, or takes more time or memory than an honest one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        size = _checked(path)
        allowance = Allowance(2 + 1e-6 * size, 512 * MIB + 100 * size + THREADS_BYTES)
        self._handle = Handle(str(path), "open_tokenizer", allowance, os.fspath(path.absolute()))
        loaded: list[Tokenizer] = []
        try:
            self._handle.open(meanwhile=lambda: loaded.append(_load(path)))
        except OverLimitError:
            raise
        except InputError as error:
            raise InputError(f"{path}: cannot be read as a tokenizer: {error}") from None
        (self.library,) = loaded

    def encode(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[NDArray[np.int32]]:
        """Tokenise many texts in the library's own threads.

        Args:
            texts: any number; as many as make sense go through at once.
            add_special_tokens: as the tokenizer's post-processor does; otherwise no token is added to the text's own.

        Returns:
            The ids of each text.

        Raises:
            TextError: naming the file and the first text that cannot be tokenised.
        """
        encoded: list[NDArray[np.int32]] = []
        start = 0
        while start < len(texts):
            end, characters = start + 1, len(texts[start])
            while end < len(texts) and characters + len(texts[end]) <= ENCODED_AT_ONCE:
                characters += len(texts[end])
                end += 1
            try:
                encoded += self._encode(texts[start:end], characters, add_special_tokens)
            except InputError:
                for index in range(start, end):  # which of them?
                    try:
                        encoded += self._encode([texts[index]], len(texts[index]), add_special_tokens)
                    except InputError as error:
                        raise TextError(str(error), index) from None
            start = end
        return encoded

    def _encode(self, texts: Sequence[str], characters: int, add_special_tokens: bool) -> list[NDArray[np.int32]]:
        allowance = Allowance(2 + 1e-5 * characters, 1024 * MIB + 600 * characters + THREADS_BYTES)
        try:
            lengths, ids = self._handle.run("encode", allowance, list(texts), add_special_tokens)
        except OverLimitError:
            raise
        except InputError as error:
            raise InputError(f"{self._path}: the tokenizer fails on the text: {error}") from None
        return np.split(np.frombuffer(ids, np.int32), np.cumsum(lengths)[:-1]) if lengths else []

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids. Raises InputError, which names the file."""
        try:
            return self.library.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise _named(error, f"{self._path}: the tokenizer fails on ids") from None


def read_vocabulary(path: Path) -> Tokenizer:
    """Read tokenizer.json for its vocabulary alone, once it was tried; the result must not be given text.

    Raises:
        InputError: as `ForeignTokenizer`.
    """
    _checked(path)
    try:
        return _load(path)
    except InputError as error:
        raise InputError(f"{path}: cannot be read as a tokenizer: {error}") from None


def _checked(path: Path) -> int:
    """Try the parts of a tokenizer under limits. Returns the file's size."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path}: is larger than {MAX_FILE_BYTES >> 20} MiB, which no tokenizer is")
    allowance = Allowance(0.8 + 2e-7 * size, 256 * MIB + 40 * size)
    try:
        PROCESS.run(str(path), "check_tokenizer", allowance, os.fspath(path.absolute()))
    except OverLimitError:
        raise
    except InputError as error:
        raise InputError(f"{path}: cannot be read as a tokenizer: {error}") from None
    return size


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # some checkpoints are published with the settings of their last use
        tokenizer.no_padding()
        return tokenizer
    except BaseException as error:  # the library raises bare Exception for whatever it cannot read, or panics
        raise _named(error, "") from None


def _named(error: BaseException, before: str) -> BaseException:
    """What to raise for an error of the library: its panics are no `Exception`, and so are interrupts."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return InputError(f"{before}: {error}" if before else str(error))
    return error
