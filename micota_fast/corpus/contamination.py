"""Does a training corpus hold the problems that it is judged by?

Two tests of each benchmark problem against each row, on words (runs of letters and digits, ASCII case folded, all else
a separator, so that spacing, punctuation and most LaTeX markup do not matter; but a sign before a number or a single
letter belongs to it, as x - 7 and x + 7 are different problems):

- exact: some text of the row is the problem, word for word.
- 13-gram: some text of the row shares a run of 13 words with the problem, the test of GPT-3 (Brown et al. 2020, arXiv
  2005.14165, appendix C). Problems of fewer words have none.

A hit is not a proof (problems share phrases), and no hit is not one either (a paraphrase shares no 13 words).
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.json_io import parse_json, write_json
from micota_fast.common.numba_cache import compiled
from micota_fast.common.schema import to_json
from micota_fast.config.evaluation import ContaminationConfig
from micota_fast.corpus.results import BenchmarkOverlap, Contamination, CorpusOverlap
from micota_fast.errors import InputError
from micota_fast.sources.problems import read_problems
from micota_fast.sources.rows import read_rows

GRAM = 13
EXAMPLES = 20
BATCH_BYTES = 1 << 24


def run(config: ContaminationConfig) -> None:
    """Test every corpus against every benchmark; writes OUT/contamination.json.

    Its keys are described by `corpus.results`.

    Raises:
        InputError: a file cannot be read or a row is bad (file:line); or two benchmarks have one name.
    """
    names = [benchmark.name for benchmark in config.benchmarks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"`benchmarks` names {twice!r} twice; give each a name of its own")
    benchmarks = {
        benchmark.name: read_problems(benchmark.path, benchmark.limit, benchmark.columns, need_answers=False)
        for benchmark in config.benchmarks
    }
    named = [(name, problem.id, problem.problem) for name, problems in benchmarks.items() for problem in problems]
    table = _Table([text for _, _, text in named])
    found: Contamination = {}
    for corpus, path in config.corpora.items():
        rows, hits = 0, set()
        for read, numbers, texts in _batches(path):
            rows = read
            hits |= {(numbers[text], problem, exact) for text, problem, exact in table.hits(texts)}
        overlaps = _overlaps(hits, named, {b: len(p) for b, p in benchmarks.items()})
        found[corpus] = CorpusOverlap(rows=rows, benchmarks=overlaps)
        for benchmark, overlap in overlaps.items():
            if overlap.rows:
                print(
                    f"{corpus}: {overlap.rows} of {rows} rows share text with {benchmark}: {len(overlap.exact)} of "
                    f"its {overlap.problems} problems word for word, {len(overlap.gram13)} in {GRAM} words or more"
                )
    if not any(overlap.rows for corpus in found.values() for overlap in corpus.benchmarks.values()):
        print(f"no text of {len(named)} benchmark problems found in {', '.join(found)}")
    write_json(Path(config.out) / "contamination.json", to_json(found))


def _overlaps(
    hits: set[tuple[int, int, bool]], named: list[tuple[str, str, str]], sizes: dict[str, int]
) -> dict[str, BenchmarkOverlap]:
    by_benchmark: dict[str, list[tuple[int, str, bool]]] = defaultdict(list)
    for row, problem, exact in sorted(hits):
        name, problem_id, _ = named[problem]
        by_benchmark[name].append((row, problem_id, exact))
    overlaps = {}
    for name, size in sizes.items():
        of_it = by_benchmark[name]
        pairs = list(dict.fromkeys((row + 1, problem_id) for row, problem_id, _ in of_it))
        overlaps[name] = BenchmarkOverlap(
            problems=size,
            exact=tuple(sorted({problem_id for _, problem_id, exact in of_it if exact})),
            gram13=tuple(sorted({problem_id for _, problem_id, exact in of_it if not exact})),
            rows=len({row for row, _, _ in of_it}),
            examples=tuple(pairs[:EXAMPLES]),
        )
    return overlaps


def _batches(path: str) -> Iterator[tuple[int, list[int], list[bytes]]]:
    """Every text in a corpus, many at once: rows read by then, without blank lines; number of each text's row, from 0;
    the texts.

    Every string in a row counts, at any depth: that holds for all formats that training takes.
    """
    numbers: list[int] = []
    texts: list[bytes] = []
    size = 0
    rows = 0
    for number, (where, _, line) in enumerate(read_rows(path)):
        for text in _strings(parse_json(line, where)):
            numbers.append(number)
            texts.append(text.encode())
            size += len(texts[-1])
        rows = number + 1
        if size >= BATCH_BYTES:
            yield rows, numbers, texts
            numbers, texts, size = [], [], 0
    if not rows:
        raise InputError(f"{path}: no rows")
    yield rows, numbers, texts


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


class _Table:
    """Hashes of the problems: whole, and of every run of GRAM words. 64 bits: a false hit in 10^9 words is unlikely."""

    def __init__(self, problems: list[str]) -> None:
        data, ends = _joined([problem.encode() for problem in problems])
        whole, grams, of = _hash_all(data, ends)
        self._whole: dict[int, list[int]] = defaultdict(list)
        for problem, value in enumerate(whole.tolist()):
            if value:
                self._whole[value].append(problem)
        self._grams: dict[int, list[int]] = defaultdict(list)
        for value, problem in set(zip(grams.tolist(), of.tolist(), strict=True)):
            self._grams[value].append(problem)
        self._sorted = np.array(sorted(self._grams), np.uint64)

    def hits(self, texts: list[bytes]) -> Iterator[tuple[int, int, bool]]:
        """Yield (text, problem, whether it is the whole of both) for every match."""
        data, ends = _joined(texts)
        whole, grams, of = _hash_all(data, ends)
        for text, value in enumerate(whole.tolist()):
            for problem in self._whole.get(value, ()):
                yield text, problem, True
        if len(self._sorted):
            at = np.searchsorted(self._sorted, grams).clip(max=len(self._sorted) - 1)
            for i in np.flatnonzero(self._sorted[at] == grams).tolist():
                for problem in self._grams[int(grams[i])]:
                    yield int(of[i]), problem, False


def _joined(texts: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([len(text) for text in texts], dtype=np.int64)


def _hash_all(
    data: NDArray[np.uint8], ends: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int32]]:
    """Hash of all words of each text (0: it has none); hash of each run of GRAM words; the text of each run."""
    grams = np.empty(len(data) // 2 + 1, np.uint64)
    of = np.empty(len(grams), np.int32)
    whole = np.empty(len(ends), np.uint64)
    number = _hash(data, ends, _KIND, _SIGN, whole, grams, of)
    return whole, grams[:number], of[:number]


_SIGN = np.zeros(256, np.uint8)
for _byte in b"+-*/=<>^":
    _SIGN[_byte] = _byte

# What a byte is in a word: 0 ends it; letters stand for their small form, digits and bytes of other alphabets for
# themselves.
_KIND = np.zeros(256, np.uint8)
for _byte in range(256):
    if chr(_byte).isascii() and chr(_byte).isalnum():
        _KIND[_byte] = ord(chr(_byte).lower())
    elif _byte >= 128:
        _KIND[_byte] = _byte


@compiled
def _hash(data, ends, kind, signs, whole, grams, of):  # type: ignore[no-untyped-def]
    base = np.uint64(0x9E3779B97F4A7C15)
    last = np.uint64(1)  # base ** GRAM
    for _ in range(GRAM):
        last *= base
    number = 0
    start = 0
    words = np.empty(GRAM, np.uint64)
    for text in range(len(ends)):
        total = np.uint64(0)
        run = np.uint64(0)
        count = 0
        word = np.uint64(0)
        sign, first, length = np.uint8(0), np.uint8(0), 0  # the last sign before the word; of the word
        for i in range(start, ends[text] + 1):
            letter = kind[data[i]] if i < ends[text] else np.uint8(0)
            if letter:
                if length == 0:
                    first = letter
                length += 1
                word = (word ^ np.uint64(letter)) * np.uint64(0x100000001B3) + np.uint64(0xCBF29CE484222325)
            elif word:
                if sign and (length == 1 or 48 <= first <= 57):  # a letter, or a number
                    word = (word ^ np.uint64(sign)) * np.uint64(0x9FB21C651E98DF25)
                mixed = word ^ (word >> np.uint64(29))
                total = total * base + mixed
                run = run * base + mixed
                if count >= GRAM:
                    run -= words[count % GRAM] * last
                words[count % GRAM] = mixed
                count += 1
                if count >= GRAM:
                    grams[number] = run
                    of[number] = text
                    number += 1
                word = np.uint64(0)
                sign, length = np.uint8(0), 0
            if not letter and i < ends[text] and signs[data[i]]:
                sign = signs[data[i]]
        whole[text] = total
        start = ends[text]
    return number
