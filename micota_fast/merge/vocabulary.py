"""Are two vocabularies one tokenizer's, possibly padded differently?"""

import filecmp
from pathlib import Path

from micota_fast.chat.tokenizer import read_vocabulary
from micota_fast.errors import InputError


def check_vocabulary(base: Path, model: Path, rows: int) -> None:
    """Check that the rows which two embeddings share are all that the base's tokenizer uses, for the same tokens.

    Tokens that were added to the regular vocabulary (chat and control tokens) may have other names: the result has the
    base's tokenizer.

    Args:
        base, model: checkpoint folders, each with a tokenizer.json.
        rows: of the smallest embedding; those beyond it are taken for padding.

    Raises:
        InputError: naming the folders and the first token at fault, or a tokenizer that is missing.
    """
    _, every = _vocabulary(base)
    last = max(every, key=lambda token: every[token])
    if every[last] >= rows:
        raise InputError(
            f"{base}: token {last!r} has the id {every[last]}, but the smallest of the embeddings has {rows} rows"
        )
    if (found := difference(base, model)) is not None:
        raise InputError(f"{found}; tokens are not re-ordered between vocabularies")


def difference(base: Path, model: Path) -> str | None:
    """Say in what the regular vocabularies of two checkpoint folders differ; None if they are equal.

    Raises:
        InputError: a tokenizer.json is missing or damaged.
    """
    one, other = base / "tokenizer.json", model / "tokenizer.json"
    if one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False):
        return None  # without the second that reading a large one takes
    (here, _), (there, _) = _vocabulary(base), _vocabulary(model)
    if here == there:
        return None
    token = min(here.items() ^ there.items(), key=lambda item: item[1])[0]
    return (
        f"{model} and {base} are not of one tokenizer: token {token!r} has the id {there.get(token)} there and "
        f"{here.get(token)} here"
    )


def _vocabulary(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Ids of the regular tokens, and of all."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; it says whether the embeddings have one vocabulary")
    tokenizer = read_vocabulary(path)
    every = tokenizer.get_vocab(with_added_tokens=True)
    # An added token that also stands in the regular vocabulary counts as added.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return {token: i for token, i in every.items() if token not in added}, every
