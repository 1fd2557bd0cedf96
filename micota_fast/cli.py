"""The grammar of `micota VERB`; the verbs are rows of `pipeline.stages`."""

import argparse
import errno
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micota_fast import __version__
from micota_fast.common.importing import imported
from micota_fast.common.terminal import safe_output
from micota_fast.config.loader import describe, load
from micota_fast.config.option_help import help_lines
from micota_fast.config.shipped import recipe_file
from micota_fast.config.suggestions import OTHER_VERBS, RELATED_KEYS, closest, closest_key, did_you_mean
from micota_fast.errors import InputError
from micota_fast.pipeline.stages import SET, VERBS, Verb

# What a file system says of a place or of itself: not a fault of this project, wherever it comes up.
MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG}
MACHINE_ERRORS |= {errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EISDIR}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    0: done, or ended early by SIGTERM or SIGUSR1 with its work kept; 1: `doctor` found errors; 2: bad input;
    130: interrupted by Ctrl-C; 141: the reader of its output went away.
    """
    with safe_output():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> int:
    if wrong := _wrong_verb(arguments):
        print(f"micota: {wrong}", file=sys.stderr)
        return 2
    namespace, unknown = _parser(arguments).parse_known_args(arguments)
    given = vars(namespace)
    verb = given.pop("verb")
    try:
        _check_words(verb, arguments, unknown)
        result = _call(VERBS[verb], given)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        print(f"micota {verb}: {_indented(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None or error.errno not in MACHINE_ERRORS:
            raise
        print(f"micota {verb}: {_indented(str(error.filename))}: {error.strerror}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:
        if error.encoding != sys.getfilesystemencoding():
            raise
        print(
            f"micota {verb}: {_indented(error.object)}: this locale's encoding of file names, {error.encoding}, lacks a"
            f" character of it; set LC_ALL=C.UTF-8 or PYTHONUTF8=1",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        resume = "" if verb == "serve" else "; run the same command to resume"
        print(f"micota {verb}: interrupted{resume}", file=sys.stderr)
        return 130
    return result if type(result) is int else 0


def _wrong_verb(arguments: Sequence[str]) -> str | None:
    """Say what is wrong with the verb; None: nothing, or there is none."""
    word = next((word for word in arguments if not word.startswith("-")), None)
    if word is None or word in VERBS:
        return None
    asked = did_you_mean(word, VERBS, f"verbs: {', '.join(VERBS)}", OTHER_VERBS)
    return f"{word}: no such verb; {asked}"


def _check_words(verb: str, arguments: Sequence[str], unknown: Sequence[str]) -> None:
    """Check that nothing is left over, and that each --set has a value.

    Raises:
        InputError: says how it is written.
    """
    following = dict(itertools.pairwise(arguments))
    for word, key in itertools.pairwise(arguments):
        if word == "--set" and "=" not in key:
            raise InputError(f"--set {key}: expected KEY=VALUE in one word: --set {key}={following.get(key, 'VALUE')}")
    if not unknown:
        return
    settable = any("--set" in argument.names for argument in VERBS[verb].arguments)
    flag = next((word for word in unknown if word.startswith("-")), None)
    if flag is None:
        raise InputError(f"{' '.join(unknown)}: too many words{'; options: --set KEY=VALUE' if settable else ''}")
    name, equals, value = flag.lstrip("-").partition("=")
    if settable:
        keys = [row[0] for row in describe(imported(VERBS[verb].options or ""))]
        if option := closest_key(name, keys):
            if "[i]" in option:
                raise InputError(f"{flag}: no such option; it is `{option}` in the file of options")
            value = value if equals else following.get(flag, "VALUE")
            if name.lower().replace("-", "_") in RELATED_KEYS:
                value = "VALUE"
            if option.endswith(".key_env"):  # what was given may be the key itself
                value = "VARIABLE"
            raise InputError(f"{flag}: no such option; options are set by --set: --set {option}={value}")
    flags = [word[2:] for argument in VERBS[verb].arguments for word in argument.names if word.startswith("--")]
    meant = closest(name, flags)
    asked = f"did you mean `--{meant}`? " if meant else ""
    raise InputError(f"{flag}: no such option; {asked}`micota {verb} --help` lists them")


def _indented(text: str) -> str:
    """A text whose further lines, such as those of a log, are never taken for lines of our own."""
    return re.sub(r"\n(?! )", "\n    ", text)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    purpose = (sys.modules["micota_fast"].__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="micota", description=purpose)
    parser.add_argument("--version", action="version", version=f"micota-fast {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.summary)
        if name in arguments:  # only the help of the verb that is called needs its options, which are imported for it
            _describe(sub, name, verb)
    return parser


def _describe(parser: argparse.ArgumentParser, name: str, verb: Verb) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"{verb.summary[0].upper()}{verb.summary[1:]}."
    for argument in verb.arguments:
        parser.add_argument(*argument.names, **argument.keywords)
    if SET in verb.arguments:
        parser.epilog = "\n".join(help_lines(name, imported(verb.options or "")))


def _call(verb: Verb, given: dict[str, Any]) -> Any:
    """Read a verb's options, then import and call its function (see `Verb.function`): bad options show at once."""
    if verb.options is not None:
        options = imported(verb.options)
        if "recipe" in given:
            path, out = recipe_file(given.pop("recipe")), given.pop("out")
            recipe = load(options, path, given.pop("overrides"))
            given |= {"recipe": recipe, "path": path.resolve(), "folder": Path(out or f"runs/{recipe.name}").resolve()}
        elif "overrides" in given:
            given["config"] = load(options, given.get("config"), given.pop("overrides"))
        else:
            given = {"config": options(**given)}
    if verb.preflight is not None:
        imported(verb.preflight)(given["config"])
    return imported(verb.function)(**given)
