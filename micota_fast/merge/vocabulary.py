"""Are two vocabularies one tokenizer's, possibly padded differently?"""

from pathlib import Path

from micota_fast.errors import InputError


def check_vocabulary(base: Path, model: Path, rows: int) -> None:
    """Check that the rows which two embeddings share are all that the base's tokenizer uses, for the same tokens.

    Tokens that were added to the regular vocabulary (chat and control tokens) may go by other names: the base's
    tokenizer is the result's.

    Args:
        base, model: checkpoint folders, each with a tokenizer.json.
        rows: of the smallest embedding; those beyond it are taken for padding.

    Raises:
        InputError: naming the folders and the first token at fault, or a tokenizer that is missing.
    """
    regular, every = _vocabulary(base)
    last = max(every, key=lambda token: every[token])
    if every[last] >= rows:
        raise InputError(
            f"{base}: token {last!r} has the id {every[last]}, but the smallest of the embeddings has {rows} rows"
        )
    other, _ = _vocabulary(model)
    if regular != other:
        token = min(regular.items() ^ other.items(), key=lambda item: item[1])[0]
        raise InputError(
            f"{model} and {base} are not of one tokenizer: token {token!r} has the id {other.get(token)} there and "
            f"{regular.get(token)} here; tokens are not re-ordered between vocabularies"
        )


def _vocabulary(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Ids of the regular tokens, and of all."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; it tells whether the embeddings have one vocabulary")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer: {error}") from None
    every = tokenizer.get_vocab(with_added_tokens=True)
    # An added token that also stands in the regular vocabulary counts as added.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return {token: i for token, i in every.items() if token not in added}, every
