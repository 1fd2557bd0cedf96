"""Datasets of the Hugging Face Hub, by name: `hf://datasets/ORG/NAME[@REVISION][/FOLDER][:SPLIT]`.

The files of the split are downloaded into the Hub's cache (once, by commit) and read from there one after another.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from micota_fast.errors import InputError

_PREFIX = "hf://"
_FORM = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<folder>[^:]+?)/?)?(?::(?P<split>[\w.-]+))?"
)
_ENDINGS = re.compile(r"\.(parquet|(jsonl?|ndjson)(\.gz|\.zst)?)$")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_NAMED = 8  # files in a message


class HubName(NamedTuple):
    """The parts of a dataset's name."""

    repo: str
    revision: str | None
    folder: str  # that its files lie in, or one file; "": all
    split: str | None


class Split(NamedTuple):
    """The downloaded files of a split, and the commit that they are of."""

    commit: str
    files: list[tuple[str, Path]]  # what messages call each, and where it lies


def is_hub(source: str | Path) -> bool:
    """Return whether a source is named as one of the Hub, rightly or not."""
    return str(source).startswith(_PREFIX)


def absolute(source: str | Path) -> str:
    """Return a source as it is named in any folder."""
    return str(source) if is_hub(source) else str(Path(source).absolute())


def parse(source: str) -> HubName:
    """Take a name apart.

    Raises:
        InputError: it has another form.
    """
    found = _FORM.fullmatch(source)
    if found is None:
        raise InputError(f"{source}: expected hf://datasets/ORG/NAME, then maybe @REVISION, /FOLDER and :SPLIT")
    revision = found["revision"] and unquote(found["revision"])
    return HubName(found["repo"], revision, found["folder"] or "", found["split"])


@functools.cache  # a file is read more than once, and all readings must be of one commit
def split(source: str) -> Split:
    """Download the files of a dataset's split, in the order of their names.

    A file belongs to the split if its path has it as a word, as in data/train-00000-of-00002.parquet. Without `:SPLIT`
    that is "train", or every file if no path has any split's name.

    Raises:
        InputError: the name has another form, the Hub does not give it, or which files are meant is not clear.
    """
    name = parse(source)
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().dataset_info(name.repo, revision=name.revision)
        chosen = choose([sibling.rfilename for sibling in info.siblings or []], name, source)
        paths = [hf_hub_download(name.repo, file, repo_type="dataset", revision=info.sha) for file in chosen]
    except InputError:
        raise
    except Exception as error:  # the library lets its HTTP client's errors through, and that differs by version
        why = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            f"cannot fetch {name.repo} from the Hugging Face Hub ({type(error).__name__}: {why}). With a network, "
            f"check the name and your access; without one, fetch it elsewhere with "
            f"`hf download {name.repo} --repo-type dataset --local-dir DIR` and name its file"
        ) from None
    files = [(f"hf://datasets/{name.repo}/{file}", Path(path)) for file, path in zip(chosen, paths, strict=True)]
    return Split(str(info.sha), files)


def choose(names: list[str], name: HubName, source: str) -> list[str]:
    """Choose the files that hold a split's rows.

    Raises:
        InputError: there is none, or they lie in several folders, each of which may be a dataset of its own.
    """
    held = [n for n in names if _ENDINGS.search(n) and _within(n, name.folder)]
    if held == [name.folder]:
        return held
    listed = ", ".join(held[:_NAMED]) + (", ..." if len(held) > _NAMED else "") or "none that can be read"
    split = name.split or "train"
    chosen = sorted(n for n in held if split in _words(n))
    if name.split is None and not chosen and not any(_words(n) & set(_SPLITS) for n in held):
        chosen = sorted(held)
    if not chosen:
        raise InputError(
            f"{source}: no file of the split {split!r} (.parquet, .jsonl, .json, maybe .gz or .zst); the files are: "
            f"{listed}"
        )
    folders = sorted({n.rpartition("/")[0] for n in chosen})
    if len(folders) > 1 or len({n.partition(".")[2] for n in chosen}) > 1:
        raise InputError(
            f"{source}: {split!r} is in several folders or formats ({', '.join(chosen[:_NAMED])}); name one: "
            f"hf://datasets/{name.repo}/{folders[0] or chosen[0]}"
        )
    return chosen


def _within(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(f"{folder}/")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^0-9A-Za-z]+", name))
