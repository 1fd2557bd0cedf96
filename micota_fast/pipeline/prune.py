"""`micota prune RUN`: lists what a run has set aside (NAME~FINGERPRINT), and removes it when told to.

A stage that a changed recipe wants otherwise is never deleted by `micota run`: its folder is renamed, and comes back
when a recipe wants it again. A trained 7B model takes about 15 GB, so they add up.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from micota_fast.common.figures import size
from micota_fast.common.files import reading, remove_whole, writing
from micota_fast.common.lock import locked
from micota_fast.errors import InputError
from micota_fast.pipeline.record import DONE, MAKING, made_for, set_aside_name

ASIDE = re.compile(r"(?P<stage>.+)~[0-9a-f]{10}")
LEFT = re.compile(r"\.(?P<name>.+~[0-9a-f]{10})\.[0-9a-f]{16}\.partial")  # by a removal that was killed
DAY_S = 86400.0


@dataclass(frozen=True)
class SetAside:
    """A folder that was set aside.

    Attributes:
        folder: its path, also if only a part of it is left.
        bytes: in its files.
        days: since its stage ended, or began if it never ended.
        kept: why it must stay; empty: it may be removed.
    """

    folder: Path
    bytes: int
    days: float
    kept: str = ""


def prune(run: str, older_than: float | None = None, yes: bool = False) -> None:
    """List the folders that a run has set aside, with their sizes, and remove them once the user agrees.

    Holds the run's lock from the first look to the last removal, so it never meets a run at work. Each folder goes at
    once, under its name; what a killed removal leaves is found and removed by the next one.

    Args:
        run: folder of the run.
        older_than: only those whose stage ended more than this number of days ago; None: all.
        yes: remove without asking.

    Raises:
        InputError: the folder is not a run's, a run is using it, or there is no terminal to ask at.
    """
    folder = Path(run).resolve()
    if not (folder / "fingerprints.json").exists():
        raise InputError(f"{run} is not the folder of a run: it contains no fingerprints.json")
    if older_than is not None and not older_than >= 0:
        raise InputError(f"--older-than must be at least 0 days, not {older_than}")
    with locked(folder / ".lock", "run"):
        with reading(folder):
            found = list(set_asides(folder))
        chosen = [of for of in found if not of.kept and (older_than is None or of.days > older_than)]
        for of in found:
            why = of.kept or ("" if of in chosen else f"kept: not older than {older_than:g} days")
            name = of.folder.relative_to(folder).as_posix()
            print(f"{size(of.bytes):>7}  {of.days:6.1f} days  {name}{'  ' if why else ''}{why}")
        if not chosen:
            print("Nothing to remove.")
            return
        total = f"{len(chosen)} folder{'s' * (len(chosen) > 1)}, {size(sum(of.bytes for of in chosen))}"
        if not yes and not _agreed(f"Remove {total}? A recipe that wants them again has to make them again. [y/N] "):
            print("Nothing was removed.")
            return
        with writing(folder):
            for of in chosen:
                remove_whole(of.folder)
        print(f"Removed {total}.")


def set_asides(folder: Path) -> Iterator[SetAside]:
    """Yield what a run has set aside, and what removals that were killed have left, in order of their names.

    A folder is the run's if its name contains the fingerprint of the identity that is recorded in it; all others,
    links among them, are left out. It must stay while its stage is missing or unfinished: the stage takes over from it
    what has not changed, or it is about to come back.

    Args:
        folder: of the run, whose lock is held.
    """
    now = time.time()
    for path in sorted([*folder.glob("*~*"), *folder.glob("*/*~*")]):
        if path.is_symlink() or not path.is_dir():
            continue
        if (left := LEFT.fullmatch(path.name)) is not None:
            whole = path.with_name(left["name"])
            if not whole.exists():
                yield SetAside(whole, _bytes(path), (now - path.stat().st_mtime) / DAY_S)
            continue
        named = ASIDE.fullmatch(path.name)
        if named is None:
            continue
        stage = path.with_name(named["stage"])
        try:
            identity = made_for(path)
        except InputError:  # a damaged record does not say whose it is
            continue
        if identity is None or set_aside_name(stage, identity) != path:
            continue
        record = path / DONE if (path / DONE).exists() else path / MAKING
        kept = "" if (stage / DONE).exists() else f"kept: {stage.name} is not done, and may take over from it"
        yield SetAside(path, _bytes(path), (now - record.stat().st_mtime) / DAY_S, kept)


def _bytes(folder: Path) -> int:
    return sum(os.lstat(Path(root, name)).st_size for root, _, names in os.walk(folder) for name in names)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise InputError("there is no terminal to ask at; --yes removes what is listed")
    return input(question).strip().lower() in ("y", "yes")
