"""The process in which `limits.LimitedProcess` runs what a checkpoint brings, under limits that the kernel enforces.

A template is a program and a tokenizer's normalizers and patterns are nearly one, so either may need any amount of time
or memory. Templates are rendered, and text is tokenised, here and nowhere else. A command that takes more memory than
it may fails (Python) or ends the process (the tokenizers library, in Rust); one that takes more CPU time ends it.
"""

import marshal
import os
import resource
import signal
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from micota_fast.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from micota_fast.chat.rendering import Renderer

LENGTH = struct.Struct("<Q")  # before each message, which is marshalled: both ends are one interpreter
MAX_MESSAGE = 2000  # characters of an error, which may quote the template's own text
# A rendered text is at most MAX_GROWTH times as long as its messages, and MAX_ADDED characters; the tokens of a text
# are at most MAX_GROWTH for each byte, and MAX_SPECIAL.
MAX_GROWTH, MAX_ADDED, MAX_SPECIAL = 20, 1 << 20, 100

# What every tokenizer is tried on: letters of several scripts, digits, white space, what normalizers decompose.
GENERAL_TEXT = (
    "A question. It's 1 + 2 = 3; 1,234.5 \t\r\n\n   \\boxed{\\frac{1}{2}} don't WE'LL _x_ <b> "
    "né ﬁ ﷺ Å ß Ω Жук 中文 かな 한국 हिन्दी العربية 👩‍👩‍👧 \u200b\u0301\x00\x7f\ufffd"
)
RUN = 64  # repeats that a pattern which takes exponential time cannot bear
MAX_ADDED_TOKENS = 200_000  # speech models add some ten thousand
MAX_STRINGS, MAX_STRING, MAX_CHARACTERS = 100, 1000, 200  # of a tokenizer's own strings, in the texts it is tried on


class _Commands:
    """What the parent may ask for. `key` names what is open: templates and tokenizers."""

    def __init__(self) -> None:
        self._templates: dict[int, Renderer] = {}
        self._tokenizers: dict[int, Tokenizer] = {}

    def open_template(self, key: int, source: str, where: str, special_tokens: dict[str, str]) -> None:
        """Compile a chat template."""
        from micota_fast.chat.rendering import Renderer

        self._templates[key] = Renderer(source, where, special_tokens)

    def render(
        self, key: int, conversations: Sequence[tuple[list[dict[str, str]], bool]], options: dict[str, Any]
    ) -> list[str]:
        """Render conversations, each with or without the header of the assistant's next turn."""
        template, texts = self._templates[key], []
        for messages, add_generation_prompt in conversations:
            text = template.render(messages, add_generation_prompt, options)
            longest = MAX_ADDED + MAX_GROWTH * sum(len(value) for message in messages for value in message.values())
            if len(text) > longest:
                raise MemoryError
            texts.append(text)
        return texts

    def template_variables(self, key: int) -> list[str]:
        """Name the variables of a template that options may set."""
        return self._templates[key].variables()

    def check_tokenizer(self, path: str) -> None:
        """Try a tokenizer's normalizer, pre-tokenizer, post-processor and decoder, with no vocabulary to read first."""
        import json

        from tokenizers import Tokenizer
        from tokenizers.pre_tokenizers import ByteLevel

        values = json.loads(Path(path).read_bytes())
        if not isinstance(values, dict):
            raise InputError("it is not a JSON object")
        names = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        parts = {name: values.get(name) for name in names}
        if len(values.get("added_tokens") or []) > MAX_ADDED_TOKENS:
            raise InputError(f"it adds more than {MAX_ADDED_TOKENS} tokens, which no checkpoint does")
        vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        tried = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))
        texts = probe_texts(parts)
        for text in texts:
            tried.encode(text, add_special_tokens=False)
        size, tokens = len(texts[0].encode()), len(tried.encode(texts[0], add_special_tokens=True).ids)
        if tokens > MAX_GROWTH * size + MAX_SPECIAL:  # its normalizer grows the text, or its post-processor repeats it
            raise InputError(f"it makes {tokens} tokens of {size} bytes, which takes more memory than there is")
        if tried.decoder is not None:
            for text in texts:
                tried.decoder.decode([text])

    def open_tokenizer(self, key: int, path: str) -> None:
        """Load a tokenizer that has been checked."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()  # some checkpoints are published with the settings of their last use
        tokenizer.no_padding()
        tokenizer.encode_batch_fast([GENERAL_TEXT], add_special_tokens=False)
        self._tokenizers[key] = tokenizer

    def encode(self, key: int, texts: list[str], add_special_tokens: bool) -> tuple[list[int], bytes]:
        """Tokenise texts in the library's own threads. Returns the number of ids of each, and all ids (int32)."""
        encodings = self._tokenizers[key].encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        ids, lengths = array("i"), []
        for encoding in encodings:
            some = encoding.ids
            ids.extend(some)
            lengths.append(len(some))
        return lengths, ids.tobytes()

    def close(self, key: int) -> None:
        """Forget a template or tokenizer."""
        self._templates.pop(key, None)
        self._tokenizers.pop(key, None)


def probe_texts(parts: dict[str, Any]) -> list[str]:
    """Texts to try the parts of a tokenizer on: general, of all strings in the parts, and long runs of each character.

    A string that is replaced, and a character that a pattern repeats, stand among the strings, so what grows without
    bound or takes exponential time does so here. (What does it elsewhere meets the same limits on the text that it
    happens on.)
    """
    strings: list[str] = []
    pending: list[Any] = [parts]
    while pending and len(strings) < MAX_STRINGS:
        value = pending.pop()
        if isinstance(value, str):
            strings.append(value[:MAX_STRING])
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    text = "".join(strings)
    characters = "".join(dict.fromkeys(text + "aA0 .\n"))[:MAX_CHARACTERS]
    return [GENERAL_TEXT, GENERAL_TEXT + text, *(c * RUN + "\x01" + characters for c in characters)]


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Obey commands until the input ends: each is (name, CPU seconds, bytes of memory, arguments)."""
    commands = _Commands()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def reply(outcome: str, value: Any) -> None:
        message = marshal.dumps((outcome, value))
        replies.write(LENGTH.pack(len(message)))
        replies.write(message)
        replies.flush()

    reply("ready", None)
    while header := requests.read(LENGTH.size):
        name, cpu_s, memory_bytes, arguments = marshal.loads(requests.read(*LENGTH.unpack(header)))
        command: Callable[..., Any] = getattr(commands, name)
        with open("/proc/self/statm", "rb") as statm:
            space = int(statm.read().split()[0]) * resource.getpagesize()
        allowed = space + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (allowed if soft < 0 else min(allowed, soft), hard))
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its default action ends the process, also within one long call
        try:
            outcome, value = "done", command(*arguments)
        except MemoryError:
            outcome, value = "memory", None
        except RecursionError:
            outcome, value = "depth", None
        except BaseException as error:  # also a panic of the tokenizers library, which is no Exception
            outcome, value = "refused", (str(error) or type(error).__name__)[:MAX_MESSAGE]
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        reply(outcome, value)


def main() -> None:
    """Serve on standard input and output."""
    # Meant for the parent, with which we end. Slurm sends its own to every process of a step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Nothing but our replies may reach the pipe; what a library prints about hostile input helps nobody.
    replies = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    _serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
