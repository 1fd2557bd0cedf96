"""How conversations become tokens: the checkpoint's own chat template and tokenizer, and the loss mask.

A conversation is cut into segments of text, unsupervised (everything the model reads) and supervised (an assistant's
turn through its end-of-turn token). Each segment is tokenised on its own, so the prompt's ids in training are exactly
the ids sent in generation, and the mask needs no alignment of characters to tokens.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from micota_fast.chat.answer_place import Place, first_difference, place_answer
from micota_fast.chat.limits import OverLimitError
from micota_fast.chat.prompt import Prompt
from micota_fast.chat.template import ChatTemplate, Message, load_chat_template, special_tokens
from micota_fast.chat.thought_counts import ThoughtCounts
from micota_fast.chat.thoughts import CLOSE, OPEN, training_text
from micota_fast.chat.tokenizer import ForeignTokenizer, TextError
from micota_fast.common.json_io import read_json_if_there
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError


class Segment(NamedTuple):
    """A piece of a conversation's text; `supervised` where the loss counts."""

    text: str
    supervised: bool


class Encoded(NamedTuple):
    """A tokenised conversation of n tokens; `supervised[i]` says that token i is the assistant's own."""

    input_ids: NDArray[np.int32]  # [n]
    supervised: NDArray[np.bool_]  # [n]


class Chat:
    """A tokenizer, a chat template and the prompt that a problem becomes.

    Attributes:
        tokenizer: the checkpoint's.
        eos_ids: every id that ends an answer: the tokenizer's `eos_token` first, then generation_config.json's and
            config.json's `eos_token_id`, then the token with which the template ends an assistant's turn. The model has
            a row for each of them.
        vocab_size: rows of the model's embedding (config.json's `vocab_size`); the tokenizer's size where config.json
            does not say.
    """

    def __init__(
        self,
        tokenizer: ForeignTokenizer,
        template: ChatTemplate | None,
        config: ChatConfig,
        eos_ids: Sequence[int],
        vocab_size: int,
        bos_token: str | None,
        where: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._template = template
        self._config = config
        self._prompt = Prompt(config)
        self._where = where
        self._turn_tail = self._end_of_turn = ""
        token_ids = tokenizer.library.get_vocab(with_added_tokens=True)
        token_texts = {i: text for text, i in token_ids.items()}
        special = [t.content for t in tokenizer.library.get_added_tokens_decoder().values() if t.special]
        if template is not None:
            special += [token_texts[i] for i in eos_ids]
            self._turn_tail, self._end_of_turn = _probe_end_of_turn(template, special, config.template_kwargs)
            if self._end_of_turn and token_ids[self._end_of_turn] < vocab_size:  # else the model cannot write it
                eos_ids = [*eos_ids, token_ids[self._end_of_turn]]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        if not self.eos_ids:
            raise InputError(
                f"{where}: no token ends an answer: set `eos_token` in tokenizer_config.json or "
                f"`eos_token_id` in generation_config.json"
            )
        stop_texts = [token_texts[i] for i in self.eos_ids]
        self._control_texts = tuple(dict.fromkeys([*stop_texts, *special]))
        self._bare_prefix = ""
        if template is None:
            self._turn_tail = self._end_of_turn = stop_texts[0]
            if tokenizer.encode([self._end_of_turn])[0].tolist() != [self.eos_ids[0]]:
                raise InputError(f"{where}/tokenizer.json: stop token {self._end_of_turn!r} is not an added token")
            # A model whose tokenizer puts a BOS before bare text was pre-trained on it; templates write their own.
            with_special = tokenizer.encode([""], add_special_tokens=True)[0].tolist()
            if bos_token is not None and with_special[:1] == [tokenizer.library.token_to_id(bos_token)]:
                self._bare_prefix = bos_token
        two = np.concatenate(tokenizer.encode(["a", "b"])).tolist()
        if tokenizer.decode(two, skip_special_tokens=False) != "ab":
            raise InputError(
                f"{where}/tokenizer.json: the tokenizer adds to every piece of text it is given, as Llama 2's does a "
                f"space (Metaspace, Prepend, add_prefix_space), so a prompt and its answer cannot be tokenised one by "
                f"one; such checkpoints are not supported (byte-level BPE as in Qwen and Llama 3 is)"
            )

    @classmethod
    def from_checkpoint(cls, path: str | Path, config: ChatConfig) -> "Chat":
        """Read tokenizer.json, tokenizer_config.json, the template and the stop ids of a Hugging Face checkpoint.

        Raises:
            InputError: a file is missing or malformed (with file and key), the checkpoint has no template and
                `config.use_template` asks for one, the template has no variable of a name in `config.template_kwargs`,
                or template or tokenizer take more time or memory than honest ones.
        """
        path = Path(path)
        tokenizer_path = path / "tokenizer.json"
        if not tokenizer_path.is_file():
            raise InputError(
                f"{tokenizer_path} does not exist: a checkpoint needs its fast tokenizer "
                f"(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
            )
        tokenizer = ForeignTokenizer(tokenizer_path)
        template = None
        if config.use_template:
            template = load_chat_template(path, config.template)
            if template is None:
                raise InputError(
                    f"{path}: no chat template (chat_template.jinja, or key 'chat_template' in tokenizer_config.json): "
                    f"name one (`chat.template`), or set `chat.use_template: false` to send prompts as bare text"
                )
            if config.template_kwargs:
                template.check_options(config.template_kwargs)
        model_config = read_json_if_there(path / "config.json") or {}
        vocab_size = model_config.get("vocab_size", tokenizer.library.get_vocab_size(with_added_tokens=True))
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
            raise InputError(f"{path / 'config.json'}: key 'vocab_size' must be a positive integer, not {vocab_size!r}")
        config_path = path / "tokenizer_config.json"
        tokens = special_tokens(read_json_if_there(config_path) or {}, config_path)
        eos_ids: list[int] = []
        if "eos_token" in tokens:
            eos_id = tokenizer.library.token_to_id(tokens["eos_token"])
            if eos_id is None:
                raise InputError(f"{config_path}: eos_token {tokens['eos_token']!r} is not in tokenizer.json")
            if eos_id >= vocab_size:
                raise InputError(
                    f"{config_path}: eos_token {tokens['eos_token']!r} has the id {eos_id}; {_known(vocab_size)}"
                )
            eos_ids.append(eos_id)
        for name in ("generation_config.json", "config.json"):
            values = model_config if name == "config.json" else read_json_if_there(path / name) or {}
            eos_ids += _eos_token_ids(values, path / name, tokenizer.library, vocab_size)
        return cls(tokenizer, template, config, eos_ids, vocab_size, tokens.get("bos_token"), str(path))

    def prompt_messages(self, problem: str) -> list[Message]:
        """The conversation that asks a problem: the configured system message (if any) and the user's.

        Raises:
            InputError: the problem holds the text of a control token, which would be read as that token.
        """
        messages = self._prompt.prompt_messages(problem)
        if (token := self._control_token(messages[-1])) is not None:
            raise InputError(f"the problem's prompt contains the control token {token!r} in its text")
        return messages

    def system_messages(self) -> list[Message]:
        """The configured system message, for rows that bring none; bare text (no template) has no place for one."""
        return self._prompt.system_messages()

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, options: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a conversation, ending in the header of the assistant's turn where asked for.

        `options` are further names for the template, as in `segments`. Without a template the text is the lone user
        message as it is (after the BOS token, where the tokenizer puts one before bare text), and the answer through
        the end-of-sequence token if there is one.

        Raises:
            InputError: the template refuses the messages, or there is no template to render more than that.
        """
        return self._render([(messages, add_generation_prompt)], options)[0]

    def _render(
        self, conversations: Sequence[tuple[Sequence[Message], bool]], options: Mapping[str, Any] | None = None
    ) -> list[str]:
        """`render` of several conversations, which takes hardly longer than one."""
        if self._template is not None:
            return self._template.render(conversations, {**self._config.template_kwargs, **(options or {})})
        if options:
            raise InputError("`chat_template_kwargs` need a chat template, which `chat.use_template: false` leaves out")
        return [self._bare(messages) for messages, _ in conversations]

    def _bare(self, messages: Sequence[Message]) -> str:
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["user", "assistant"]):
            raise InputError(
                f"roles {', '.join(roles)}: with `chat.use_template: false` only one user message and one answer can "
                f"be sent as bare text"
            )
        text = messages[0]["content"]
        if not text.startswith(self._bare_prefix):
            text = self._bare_prefix + text
        return text + messages[1]["content"] + self._end_of_turn if len(messages) == 2 else text

    def segments(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] | None = None,
        counts: ThoughtCounts | None = None,
    ) -> list[Segment]:
        """Cut a conversation that ends with the assistant into prompt and answer segments, alternating.

        Joined, they are the rendered conversation up to the last end-of-turn token. Every assistant turn is supervised
        through its end-of-turn token; what follows that token (a newline, say) belongs to the next prompt.

        Args:
            messages: the conversation.
            options: further names for the template, as a row's `chat_template_kwargs` has them.
            counts: counts what happens to thoughts (`chat.thinking`) and what the template inserts.

        Raises:
            InputError: the conversation does not end with the assistant, a message holds the text of a control token
                (which would be read, or learned, as that token), or the template would have the model learn a text
                other than the messages' (it drops or rewrites part of a turn).
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise InputError("the conversation does not end with an assistant message: there is nothing to learn")
        for number, message in enumerate(messages, 1):
            if (token := self._control_token(message)) is not None:
                raise InputError(
                    f"message {number} ({message['role']}) contains the control token {token!r} in its text"
                )
        if not self._end_of_turn:
            self._render([(messages, False)], options)  # its own refusal says more
            raise InputError(
                f"{self._template_where()}: the chat template puts no special token after an assistant's message, so a "
                f"model trained on it would never stop: add eos_token to the template"
            )
        counts = counts if counts is not None else ThoughtCounts()
        messages = [self._with_thought(message, number, counts) for number, message in enumerate(messages, 1)]
        last = len(messages) - 1
        last_place = self._place(messages, last, options)
        full = last_place.answered + self._turn_tail
        segments: list[Segment] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, before_tail, inserted, unopened = (
                last_place if index == last else self._place(messages, index, options)
            )
            counts.take_place(inserted, unopened)
            answered = before_tail + self._turn_tail
            end = len(before_tail) + self._turn_tail.index(self._end_of_turn) + len(self._end_of_turn)
            if not full.startswith(answered[:end]):
                raise InputError(
                    f"message {index + 1} (assistant): the chat template of {self._template_where()} rewrites this "
                    f"turn once later ones follow, so it cannot be learned in this row; split the conversation "
                    f"into one row for each answer: {first_difference(answered[:end], full)}"
                )
            segments += [Segment(full[done : len(prompt)], False), Segment(full[len(prompt) : end], True)]
            done = end
        return segments

    def _with_thought(self, message: Message, number: int, counts: ThoughtCounts) -> Message:
        """An assistant's message with its thought as `chat.thinking` says; others as they are."""
        if message["role"] != "assistant":
            return message
        tags = (self._config.thinking_tags[0], self._config.thinking_tags[1])
        try:
            text = training_text(message["content"], "", self._config.thinking, tags)
        except InputError as error:
            raise InputError(f"message {number} (assistant): {error}") from None
        counts.take_text(message["content"], text)
        return {**message, "content": text}

    def _place(self, messages: Sequence[Message], index: int, options: Mapping[str, Any] | None) -> Place:
        """The text that an assistant's message is generated from, and the text that ends with it."""
        prompt, answered = self._render([(messages[:index], True), (messages[: index + 1], False)], options)
        text, wrapped = messages[index]["content"], self._config.thinking == "wrap"
        try:
            place = place_answer(prompt, answered, self._turn_tail, text, self._template_where())
            if wrapped and CLOSE in place.inserted and self._config.thinking_tags[1] in text:
                raise InputError(
                    f"the chat template of {self._template_where()} puts an empty thought before the wrapped one; "
                    f"`chat.template` names another template"
                )
            return place
        except InputError as error:
            raise InputError(f"message {index + 1} (assistant): {error}") from None

    def encode_segments(self, conversations: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Tokenise many conversations at once, in the tokenizer's own threads; no token is added to the text's own.

        Raises:
            TextError: with the index of the first conversation that the tokenizer fails on.
        """
        texts = [segment.text for segments in conversations for segment in segments]
        try:
            pieces = iter(self.tokenizer.encode(texts))
        except TextError as error:
            owners = [number for number, segments in enumerate(conversations) for _ in segments]
            raise TextError(str(error), owners[error.index]) from None
        encoded = []
        for segments in conversations:
            ids = [next(pieces) for _ in segments]
            mask = np.repeat([segment.supervised for segment in segments], [len(piece) for piece in ids])
            encoded.append(Encoded(np.concatenate(ids), mask))
        return encoded

    def encode_prompt(self, problem: str) -> list[int]:
        """The ids sent to the model to have a problem answered; raises InputError as `prompt_messages`."""
        text = self.render(self.prompt_messages(problem), add_generation_prompt=True)
        return self.tokenizer.encode([text])[0].tolist()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The text of one token as the vocabulary has it, "" where an id has none."""
        return self.tokenizer.library.id_to_token(token_id) or ""

    def check_ids(self, ids: NDArray[np.int32]) -> None:
        """Check that the model has a row for each id of a tokenised text.

        Raises:
            InputError: naming the highest id, which it has not.
        """
        if (worst := int(ids.max(initial=0))) >= self.vocab_size:
            raise InputError(f"token {self.token(worst)!r} has the id {worst}; {_known(self.vocab_size)}")

    @property
    def end_of_turn_id(self) -> int | None:
        """The id that ends an answer in training; None: the template ends it with no special token."""
        return self.tokenizer.library.token_to_id(self._end_of_turn) if self._end_of_turn else None

    def _control_token(self, message: Message) -> str | None:
        """A control token that the text of a message would turn into; None: there is none."""
        text = message["content"]
        if self._template is None and message["role"] == "user":
            # No template writes control tokens here, so the recipe's part of the prompt may, and a BOS may lead it.
            before, _, after = self._config.prompt.partition("{problem}")
            if text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
                text = text[len(before) : len(text) - len(after)]
            if not before:
                text = text.removeprefix(self._bare_prefix)
        own = (OPEN, CLOSE) if message["role"] == "assistant" else ()
        return next((token for token in self._control_texts if token in text and token not in own), None)

    def _template_where(self) -> str:
        return self._where if self._template is None else self._template.where


def _probe_end_of_turn(template: ChatTemplate, special: Sequence[str], options: Mapping[str, Any]) -> tuple[str, str]:
    """What a template writes after an assistant's last message, and the first special token in that ("": none).

    A template that cannot render the probe can still prompt; `Chat.segments` then reports it.

    Raises:
        OverLimitError: it takes more time or memory than an honest one.
    """
    probe = "An answer to probe for."
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": probe}]
    try:
        _, answered = template.render([(messages[:1], True), (messages, False)], options)
    except OverLimitError:
        raise
    except InputError:
        return "", ""
    _, found, tail = answered.rpartition(probe)
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    match = re.search(pattern, tail) if found and pattern else None
    return tail, match.group() if match else ""


def _eos_token_ids(values: dict[str, Any], where: Path, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    value = values.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < 1 << 31 or tokenizer.id_to_token(i) is None:
            raise InputError(f"{where}: key 'eos_token_id': {i!r} is not the id of a token in tokenizer.json")
        if i >= vocab_size:
            raise InputError(f"{where}: key 'eos_token_id': {i} is {tokenizer.id_to_token(i)!r}; {_known(vocab_size)}")
    return ids


def _known(vocab_size: int) -> str:
    return f"the model knows only {vocab_size} (vocab_size in config.json): tokenizer and model do not belong together"
