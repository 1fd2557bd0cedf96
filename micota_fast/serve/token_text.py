"""A token on its own, as text and bytes: half a character has bytes, but no text."""

from functools import lru_cache

from tokenizers import Tokenizer


class TokenTexts:
    """Texts and bytes of the tokens of a byte-level tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.bytes = lru_cache(maxsize=1 << 16)(self._bytes)

    def text(self, token_id: int) -> str:
        """Its text; where its bytes are no whole characters, `bytes:` and these, as OpenAI has it."""
        data = self.bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def characters(self, token_id: int) -> int:
        """Characters that begin in it."""
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes(token_id))

    def _bytes(self, token_id: int) -> bytes:
        token = self._added.get(token_id)
        if token is not None:
            return token.encode()
        token = self._tokenizer.id_to_token(token_id) or ""  # a vocabulary may have more rows than tokens
        try:
            return bytes(_BYTES[character] for character in token)
        except KeyError:
            return token.encode()


def _byte_of_character() -> dict[str, int]:
    """The characters that stand for the 256 bytes in GPT-2's and all later byte-level vocabularies.

    Printable bytes of Latin-1 stand for themselves; the others follow from U+0100 on, in their order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_of_character()
