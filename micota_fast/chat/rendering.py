"""A checkpoint's own Jinja chat template, compiled in a sandbox with what `transformers` offers to templates.

The sandbox bounds what a template can reach, not the time and memory it takes: `limits` and `worker` do that.

The environment follows "Chat templates" in the transformers documentation: `trim_blocks`, `lstrip_blocks`, `break` and
`continue`, `{% generation %}` blocks, `raise_exception`, `strftime_now` and a `tojson` that leaves HTML as it is.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from micota_fast.errors import InputError

# What `strftime_now` tells a template: Llama 3's templates write today's date into the system message, so that the
# same rows would make other tokens tomorrow. They themselves fall back to this day where there is no clock.
TEMPLATE_DATE = datetime(2024, 7, 26)


class _GenerationBlocks(Extension):
    """Parses `{% generation %} ... {% endgeneration %}`, whose body is rendered as if the tags were not there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PublicNamespace(Namespace):
    """`namespace()` that stores no underscored name: the sandbox guards reading such names, not writing them."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named `self`: a template may pass that word
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)


_ABSENT = {"tools": None, "documents": None}  # what a conversation may have elsewhere, and no row of ours has


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Renderer:
    """A compiled template.

    Args:
        source: the Jinja text.
        where: file (and key) it came from, for messages.
        special_tokens: names such as `bos_token` and their text, visible to the template.

    Raises:
        InputError: the template does not parse.
    """

    def __init__(self, source: str, where: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=TEMPLATE_DATE.strftime, namespace=_PublicNamespace
        )
        self.where = where
        self._special_tokens = dict(special_tokens)
        self._environment, self._source = environment, source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{where}: line {error.lineno} of the chat template: {error.message}") from None
        except MemoryError:
            raise
        except Exception as error:  # such as RecursionError: the compiler has limits that Jinja's grammar has not
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{where}: the chat template cannot be compiled ({why})") from None

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, options: Mapping[str, Any]
    ) -> str:
        """The text of a conversation, with the header of the assistant's next turn if asked for.

        `options` are further names that the template may look at, such as `enable_thinking`.

        Raises:
            InputError: the template refuses the conversation (`raise_exception`) or fails on it.
            MemoryError, RecursionError: it takes too much.
        """
        try:
            ours = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
            return self._template.render(dict(options) | ours | _ABSENT | self._special_tokens)
        except (MemoryError, RecursionError):
            raise
        except jinja2.TemplateError as error:
            raise InputError(f"{self.where}: the chat template refuses the conversation: {error.message}") from None
        except Exception as error:  # whatever a template does wrong is a fault of the checkpoint, not of this project
            raise InputError(
                f"{self.where}: the chat template fails on the conversation: {type(error).__name__}: {error}"
            ) from None

    def variables(self) -> list[str]:
        """The names that the template looks up, in any branch, loop or macro of it, and that `options` may set."""
        looked_up = meta.find_undeclared_variables(self._environment.parse(self._source))
        ours = {"messages", "add_generation_prompt", *_ABSENT, *self._special_tokens}
        return sorted(looked_up - ours - self._environment.globals.keys())
