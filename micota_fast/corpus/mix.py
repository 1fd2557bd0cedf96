"""One corpus of several, in a stated ratio: the long : short mix, one of the arms MiCoTA is compared with."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from micota_fast.common.files import refuse_to_overwrite, write_atomic
from micota_fast.common.json_io import parse_json
from micota_fast.config.corpus import MixConfig
from micota_fast.errors import InputError
from micota_fast.sources.problems import row_id
from micota_fast.sources.rows import read_rows


def run(config: MixConfig) -> None:
    """Write the mixed corpus.

    Size rule: the problems that *all* parts answer are shared out among the parts in the stated ratio, so a problem
    comes once and the mix is as large as the parts' common problems allow: with shares a : b and n common problems
    a/(a+b) n rows come from the first part and the rest from the second (largest remainder; ties to the earlier part).
    Which problem goes where depends on the seed and the problem's id alone. Of several answers to one problem the
    first in the file is taken. Rows are copied as they stand, in the order of the first part.

    Raises:
        InputError: a part cannot be read, a row has neither `id` nor `problem`, a share is not positive, or nothing
            is common to all.
    """
    if not config.parts or any(share < 1 for share in config.parts.values()):
        raise InputError("`parts` must name at least one corpus, each with a share of at least 1")
    refuse_to_overwrite(config.out, *config.parts)
    rows = {path: _first_rows(path) for path in config.parts}
    first, *others = rows.values()
    common = [problem for problem in first if all(problem in other for other in others)]
    if not common:
        raise InputError(f"no problem is answered in all of {', '.join(config.parts)}: nothing to mix")
    drawn = sorted(common, key=lambda problem: hashlib.sha256(f"{config.seed}\0{problem}".encode()).digest())
    source: dict[str, str] = {}
    start = 0
    for path, size in apportion(len(common), config.parts).items():
        source.update(dict.fromkeys(drawn[start : start + size], path))
        start += size
    write_atomic(Path(config.out), (rows[source[problem]][problem] for problem in common))
    sizes = ", ".join(f"{sum(s == path for s in source.values())} from {path}" for path in config.parts)
    print(f"{config.out}: {len(common)} rows: {sizes}")


def apportion(total: int, shares: Mapping[str, int]) -> dict[str, int]:
    """Find whole numbers in the ratio of `shares` that sum to `total`, by largest remainder (Hamilton's method)."""
    whole = sum(shares.values())
    sizes = {name: total * share // whole for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: -(total * shares[name] % whole))  # stable: ties keep their order
    for name in by_remainder[: total - sum(sizes.values())]:
        sizes[name] += 1
    return sizes


def _first_rows(path: str) -> dict[str, bytes]:
    """Problem id -> its first row as a line, in file order."""
    rows: dict[str, bytes] = {}
    for where, _, line in read_rows(path):
        row = parse_json(line, where)
        try:
            problem = row_id(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if problem is None:
            raise InputError(
                f"{where}: a row to mix needs `id` (of its problem) or `problem`; it has {', '.join(map(repr, row))}"
            )
        rows.setdefault(problem, line.rstrip(b"\r\n") + b"\n")
    return rows
