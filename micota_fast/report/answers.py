"""answers.html: every benchmark problem with the answers of all arms side by side, to filter, search and print.

The page is one file that loads nothing. What models wrote is data in it, never markup: JSON that answers.js shows as
text, under a content security policy that allows no other script.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from micota_fast.common.records import benchmark_file
from micota_fast.config.report import ReportConfig
from micota_fast.errors import InputError
from micota_fast.evaluation.results import GradedAnswer, Outcome, read_graded
from micota_fast.report.drawing import THEME, theme_variables
from micota_fast.report.inputs import EvaluatedModel, Inputs
from micota_fast.report.mathematics import PATTERN, TREE_ROOM, Node, formulas
from micota_fast.report.summary import BASE

OUTCOMES: dict[Outcome, tuple[str, str]] = {
    # (sign, name), "correct" first
    "correct": ("✓", "right"),
    "wrong": ("✗", "wrong"),
    "no_answer": ("○", "no final answer"),
    "truncated": ("…", "truncated"),
    "aborted": ("!", "aborted by the server"),
    "timeout": ("?", "grading timed out"),
    "crashed": ("?", "grading crashed"),
}
FINISHES = {"stop": "ended by itself", "length": "hit the token limit", "abort": "given up by the server"}
ROOM = 24_000_000
"""Bytes for the problems and answers; with the data about each and the formulas, the page stays below 30 MB."""
_AROUND = 60  # bytes in the page per answer, besides its text
_LONGEST_READ = 300  # characters shown of the final answer that was read for grading

Cut = str | list[str | int]
"""A text, or [its start, number of characters left out, its end]."""


def render_answers(config: ReportConfig, inputs: Inputs, colours: Mapping[str, str]) -> bytes:
    """Render the whole page. The same rows, in any order, give the same bytes.

    Args:
        config: its title and folder; rows' files are named relative to the folder.
        inputs: the evaluated models; those whose rows are not next to results.json are listed as missing.
        colours: arm -> colour as drawn.

    Raises:
        InputError: a row is bad (file:line), or two runs have different problems under one id.
    """
    arms = {BASE: [inputs.base], **inputs.arms}
    kept = _kept_characters(arms)
    problems = _problems(arms, kept)
    folders = {
        name: [_relative(run.path.parent / "rows", config.out) for run in runs if run.graded is not None]
        for name, runs in arms.items()
    }
    benchmarks = list(inputs.base.benchmarks)
    cut = any(isinstance(answer[6], list) for problem in problems for of_arm in problem[4] for answer in of_arm)
    samples = {name: _samples(runs) for name, runs in arms.items()}
    data = {
        "arms": [{"name": name, "runs": folders[name], "samples": samples[name]} for name in arms],
        "benchmarks": [{"name": name, "file": benchmark_file(name)} for name in benchmarks],
        "outcomes": [{"sign": sign, "name": name} for sign, name in OUTCOMES.values()],
        "finishes": list(FINISHES.values()),
        "problems": problems,
        "formula": PATTERN,
        "formulas": _formulas(problems),
    }
    script = _resource("answers.js")
    style = _style([colours[name] for name in arms])
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>Answers: {escape(config.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n",
        '<a class="skip" href="#found">Skip to the problems</a>\n',
        f'<header>\n<p><a href="report.html">Report</a></p>\n<h1>Answers: {escape(config.title)}</h1>\n</header>\n',
        "<main>\n",
        "<noscript><p>This page shows problems and answers with JavaScript, which is switched off here. The rows that "
        'it would show lie in the files named <a href="#files">below</a>, one JSON object a line.</p></noscript>\n',
        '<div id="browser" hidden>\n',
        _form(arms, problems, benchmarks, kept if cut else None),
        '<h2 id="found" tabindex="-1">Problems</h2>\n<p id="status" role="status"></p>\n<p id="view"></p>\n',
        _pager("Pages, above the problems"),
        '<div id="problems"></div>\n',
        _pager("Pages, below the problems"),
        "</div>\n",
        _files(arms, folders, benchmarks, config.out),
        f'</main>\n<script type="application/json" id="data">{_embedded(data)}</script>\n',
        f"<script>{script}</script>\n</body>\n</html>\n",
    ]
    return "".join(parts).encode()


def _rows(file: Path) -> Iterator[GradedAnswer]:
    for where, row in read_graded(file):
        if row.finish_reason not in FINISHES:
            known = ", ".join(FINISHES)
            raise InputError(f"{where}: key 'finish_reason' must be one of {known}, found {row.finish_reason!r}")
        yield row


def _graded_files(runs: Sequence[EvaluatedModel]) -> list[list[tuple[str, Path]]]:
    """The benchmarks and their files of each run whose rows exist."""
    return [
        [(name, run.path.parent / "rows" / benchmark_file(name)) for name in run.benchmarks]
        for run in runs
        if run.graded is not None
    ]


def _kept_characters(arms: Mapping[str, Sequence[EvaluatedModel]]) -> int:
    """How many characters of an answer's start, and of its end, the page has room for; at least 100."""
    characters, encoded, seen, taken = [], [], set(), 0
    for runs in arms.values():
        for of_run in _graded_files(runs):
            for benchmark, file in of_run:
                for row in _rows(file):
                    characters.append(len(row.completion))
                    encoded.append(_size(row.completion))
                    if (benchmark, row.id) not in seen:
                        seen.add((benchmark, row.id))
                        taken += _size(row.problem) + _size(row.answer)
    lengths, sizes = np.array(characters), np.array(encoded)
    room = ROOM - taken - _AROUND * len(lengths)
    for kept in (digit * 10**power for power in range(6, 1, -1) for digit in range(9, 0, -1)):
        share = np.minimum(1.0, 2 * kept / np.maximum(lengths, 1))  # as if all characters had the same size
        if kept == 100 or (share * sizes).sum() <= room:
            break
    return kept


def _size(text: str) -> int:
    """The bytes of a text in the page."""
    return len(_json(text).encode()) + 5 * text.count("<")


def _problems(arms: Mapping[str, Sequence[EvaluatedModel]], kept: int) -> list[list[Any]]:
    """List [benchmark, id, problem, gold answer, answers by arm] of each problem, with ids in natural order.

    An answer is [run, sample, outcome, extracted, tokens, finish reason, text, other protocols' verdicts or null]. A
    value of which there are few is given as its index in their list.
    """
    outcomes, finishes = list(OUTCOMES), list(FINISHES)
    found: dict[tuple[int, str], list[Any]] = {}
    for arm, runs in enumerate(arms.values()):
        for run, of_run in enumerate(_graded_files(runs)):
            for benchmark, (_, file) in enumerate(_in_order(of_run, arms)):
                for row in _rows(file):
                    text = [row.problem, row.answer]
                    new = [benchmark, row.id, *text, [[] for _ in arms]]
                    problem = found.setdefault((benchmark, row.id), new)
                    if problem[2:4] != text:
                        raise InputError(f"{file}: problem {row.id!r} or its gold answer differs from other runs'")
                    verdicts = {name: verdict.correct for name, verdict in row.protocols.items()}
                    others = {name: correct for name, correct in verdicts.items() if correct is not row.correct}
                    problem[4][arm].append(
                        [
                            run,
                            row.sample,
                            outcomes.index(row.outcome),
                            None if row.extracted is None else _shortened(row.extracted),
                            row.completion_tokens,
                            finishes.index(row.finish_reason),
                            _cut(row.completion, kept),
                            others or None,
                        ]
                    )
    for problem in found.values():
        for of_arm in problem[4]:
            of_arm.sort(key=lambda answer: answer[:2])
    return [found[key] for key in sorted(found, key=lambda key: (key[0], _natural(key[1])))]


def _formulas(problems: Sequence[list[Any]]) -> dict[str, list[Node]]:
    """Convert the formulas for which the page has room, those of problems and final answers first."""
    given = [problem[place] for problem in problems for place in (2, 3)]
    answers = [answer for problem in problems for of_arm in problem[4] for answer in of_arm]
    read = [answer[3] for answer in answers if answer[3] is not None]
    pieces = [piece for *_, text, _ in answers for piece in ([text] if isinstance(text, str) else (text[0], text[2]))]
    found, left = {}, TREE_ROOM
    for source, tree in formulas([*given, *read, *pieces], [*(problem[3] for problem in problems), *read]):
        left -= _size(source) + _size(_json(tree))
        if left < 0:
            break
        found[source] = tree
    return found


def _in_order(of_run: list[tuple[str, Path]], arms: Mapping[str, Sequence[EvaluatedModel]]) -> list[tuple[str, Path]]:
    """A run's benchmarks in the order of the base's."""
    order = list(arms[BASE][0].benchmarks)
    return sorted(of_run, key=lambda named: order.index(named[0]))


def _natural(name: str) -> tuple[list[str | int], str]:
    """By this key x-2 comes before x-10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))], name


def _cut(text: str, kept: int) -> Cut:
    return text if len(text) <= 2 * kept else [text[:kept], len(text) - 2 * kept, text[-kept:]]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_READ else f"{text[:_LONGEST_READ]} … ({len(text):,} characters)"


def _samples(runs: Sequence[EvaluatedModel]) -> int:
    """The largest number of answers to a problem in a run of this arm."""
    return max((of.samples for run in runs for of in (run.graded or {}).values()), default=0)


def _relative(path: Path, out: str) -> str:
    return Path(os.path.relpath(path, out)).as_posix()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _embedded(data: Any) -> str:
    """Encode JSON that neither ends a script element nor begins a comment, and has no line end of JavaScript's own."""
    return _json(data).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _resource(name: str) -> str:
    return (files("micota_fast.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _style(colours: Sequence[str]) -> str:
    light, dark = theme_variables()
    rules = [f".arm-{arm} {{ --series: var({THEME[colour][0]}); }}\n" for arm, colour in enumerate(colours)]
    return _resource("answers.css").replace("LIGHT", light).replace("DARK", dark) + "".join(rules)


def _form(
    arms: Mapping[str, Sequence[EvaluatedModel]],
    problems: Sequence[list[Any]],
    benchmarks: Sequence[str],
    kept: int | None,
) -> str:
    counts = [sum(problem[0] == benchmark for problem in problems) for benchmark in range(len(benchmarks))]
    sets = "".join(
        f'<option value="{place}">{escape(name)} ({counts[place]:,})</option>' for place, name in enumerate(benchmarks)
    )
    outcomes, boxes = "", ""
    for place, name in enumerate(arms):
        answers = [problem[4][place] for problem in problems]
        if any(answers):
            outcomes += f"<label>{escape(name)} <select data-arm={place}>{_outcome_options(answers)}</select></label>\n"
        boxes += f"<label><input type=checkbox data-arm={place} checked> {escape(name)}</label>\n"
    hint = "Looks in problems, gold answers and answers."
    if kept is not None:
        hint += (
            f" Of long answers only the first and last {kept:,} characters are in this page; the rest is not searched."
        )
    return (
        '<form id="filters" role="search" aria-labelledby="filter-heading" autocomplete="off">\n'
        '<h2 id="filter-heading">Filter</h2>\n'
        f'<div><label for="benchmark">Benchmark</label><select id="benchmark"><option value="">all ({len(problems):,})'
        f"</option>{sets}</select></div>\n"
        '<div><label for="text">Text</label><input id="text" type="search" spellcheck="false" aria-describedby="hint">'
        "</div>\n"
        f'<fieldset class="outcomes"><legend>Outcome under each arm</legend><div>\n{outcomes}</div></fieldset>\n'
        f"<fieldset><legend>Arms shown</legend><div>\n{boxes}</div></fieldset>\n"
        '<div class="buttons"><button type="reset">Clear filters</button></div>\n'
        f'<p class="hint" id="hint">{hint}</p>\n</form>\n'
    )


def _outcome_options(answers: Sequence[list[Any]]) -> str:
    """The options by which an arm's answers can be filtered; `answers` has a list for each problem."""
    options = {"": "any"}
    if max(map(len, answers)) > 1:
        options |= {
            "all": "always right",
            "some": "right at least once",
            "lacking": "not always right",
            "none": "never right",
        }
    else:
        options |= {"all": "right", "none": "not right"}
    every = {answer[2] for of_problem in answers for answer in of_problem}
    options |= {str(place): name for place, (_, name) in enumerate(OUTCOMES.values()) if place and place in every}
    return "".join(f'<option value="{value}">{text}</option>' for value, text in options.items())


def _pager(label: str) -> str:
    return (
        f'<nav class="pager" aria-label="{label}"><button type="button" class="previous">Previous</button>'
        '<span class="place"></span><button type="button" class="next">Next</button></nav>\n'
    )


def _files(
    arms: Mapping[str, Sequence[EvaluatedModel]],
    folders: Mapping[str, Sequence[str]],
    benchmarks: Sequence[str],
    out: str,
) -> str:
    named = ", ".join(f"<code>{escape(benchmark_file(name))}</code>" for name in benchmarks)
    there = "".join(
        f"<li>{escape(name)}{f', run {place}' if len(of_arm) > 1 else ''}: <code>{escape(folder)}/</code></li>\n"
        for name, of_arm in folders.items()
        for place, folder in enumerate(of_arm, 1)
    )
    missing = "".join(
        f"<li>{escape(name)}: beside <code>{escape(_relative(run.path, out))}</code></li>\n"
        for name, runs in arms.items()
        for run in runs
        if run.graded is None
    )
    return (
        '<section id="files" aria-labelledby="files-heading">\n<h2 id="files-heading">Where the rows lie</h2>\n'
        f"<p>Every answer whole, with its verdicts, one JSON object a line, in files named {named}, in these folders "
        f"(from that of this page):</p>\n<ul>\n{there}</ul>\n"
        + (f"<p>Without graded rows, so not shown:</p>\n<ul>\n{missing}</ul>\n" if missing else "")
        + "</section>\n"
    )
