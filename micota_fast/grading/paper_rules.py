r"""The answer rules of the paper's evaluation, by strings alone: for parity with its tables, not for judging.

They are those of the Small-Model-Learnability-Gap tasks (https://github.com/Small-Model-Gap/Small-Model-Learnability-Gap
at 814cf97, lm-evaluation-harness/lm_eval/tasks), which the authors ran:

- hendrycks_math_500 and, with zeros trimmed, AIME, AMC and Olympiad: the last box, and equality after the string
  normalisation of MATH (Hendrycks et al. 2021, https://github.com/hendrycks/math, modeling/math_equivalence.py).
- gsm8k_cot_zeroshot, filter `flexible-extract`, the one that math_metric_gsm8k.py reports: the last number.

What they get wrong is kept, as it is in the figures to compare with:

- no mathematics: 0.25 is not \frac{1}{4}, 2\sqrt{3} not \sqrt{12}, 1,000 not 1000, (B) not \text{(B)};
- one `\boxed ` with a space anywhere in the text beats every other box, and runs up to a dollar sign or the end;
- braces that are escaped count as braces, so `\boxed{\{1\}` never closes and `\boxed{\}}` ends early;
- `\\` becomes `\`, in matrices as well; dollar signs without a backslash stay;
- up to two characters before the only `=` are dropped: `x = 5` and `xy=5` are 5, `xy = 5` is not;
- units are cut at `\text{ ` with a space; where that stands twice, where a slash has other than two integers around
  it, or where `\sqrt` or `\frac` ends the answer, the normalisation fails and the raw strings are compared;
- the MATH-500 task drops no leading zeros; the others do, so that 0 is the empty string there.
"""

import re

from micota_fast.grading.answers import why_unreadable
from micota_fast.grading.grader import Verdict

_BRACE = re.compile(r"[{}]")


def grade_by_string(completion: str, gold: str, trim_zeros: bool = False) -> Verdict:
    r"""`correct`, `wrong` or `no_answer` by the rule of the MATH-500 task, with `trim_zeros` by that of the others.

    Never raises. Where a box holds an `\fbox{` the original stops its run by an AssertionError; here it is `wrong`.
    """
    box = last_box(completion)
    if box is None:
        return Verdict("no_answer", None)
    answer = box_content(box)
    if answer is None:
        return Verdict("wrong", box)
    return Verdict("correct" if equivalent(answer, gold, trim_zeros) else "wrong", answer)


def grade_last_number(completion: str, gold: str) -> Verdict:
    """`correct`, `wrong` or `no_answer` by GSM8K's rule: the last run of digits, commas, points and dollar signs.

    A run of two or more such characters counts even without a digit, so an ellipsis after the answer is the answer.
    """
    runs = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", completion)
    if not runs:
        return Verdict("no_answer", None)
    return Verdict("correct" if _bare_number(runs[-1]) == _bare_number(gold) else "wrong", runs[-1])


def why_unreadable_as_string(gold: str) -> str | None:
    """Say why no box would equal this gold answer by the rule of strings; None if one can. As `why_unreadable`."""
    if "$" in gold.replace("\\$", ""):
        return "has $ signs, which this rule compares; keep what is between them"
    return "has a box, which this rule compares; keep its content" if "\\boxed" in gold else why_unreadable(gold)


def why_unreadable_as_number(gold: str) -> str | None:
    """Say why no number would equal this gold answer by GSM8K's rule; None if one can. As `why_unreadable`.

    A whole solution of GSM8K can be read, as the rule takes what follows `#### `.
    """
    number = _bare_number(gold)
    if not number.strip():
        return "is empty"
    return None if re.fullmatch(r"-?[0-9.]*[0-9][0-9.]*", number) else "is not a number and nothing else"


def _bare_number(text: str) -> str:
    """As the metric `exact_match` of the task compares it: its regexes_to_ignore and ignore_case."""
    text = text.replace(",", "").replace("$", "")
    return re.sub(r"\.$", "", text.rpartition("#### ")[2]).lower()


def last_box(text: str) -> str | None:
    r"""The last `\boxed{...}` with its command, the last `\fbox{...}` if there is none; None if it never closes."""
    if "\\boxed " in text:
        return "\\boxed " + text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0 and brace.group() == "}":
            return text[start : brace.end()]
    return None


def box_content(box: str) -> str | None:
    r"""Without the command and the braces; None if an `\fbox{` stands elsewhere than at the start."""
    if "\\fbox{" in box:
        return box[len("\\fbox{") : -1] if box.startswith("\\fbox{") else None
    if box.startswith("\\boxed "):
        return box[len("\\boxed ") :]
    return box[len("\\boxed{") : -1]


def equivalent(answer: str, gold: str, trim_zeros: bool = False) -> bool:
    """Equality of the normalised strings, or of the strings themselves where one cannot be normalised."""
    if trim_zeros:
        try:
            answer, gold = answer.lstrip("0"), gold.lstrip("0")
            answer = _without_zero_decimals(answer)
            gold = _without_zero_decimals(gold)
        except ValueError:
            return answer == gold
    try:
        return normalise(answer) == normalise(gold)
    except ValueError:
        return answer == gold


def _without_zero_decimals(text: str) -> str:
    """5.00 as 5; the part after a second point is not looked at, so 5.0.3 is 5 as well."""
    parts = text.split(".")
    return parts[0] if len(parts) > 1 and not parts[1].rstrip("0") else text


_REPLACED = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)


def normalise(text: str) -> str:
    """The normalisation of MATH.

    Raises:
        ValueError: where the original fails, too.
    """
    for old, new in _REPLACED:
        text = text.replace(old, new)
    if text.count("\\text{ ") > 1:
        raise ValueError("two units")
    text = text.partition("\\text{ ")[0].replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    if text.count("=") == 1:
        left, _, right = text.partition("=")
        if len(left) <= 2:
            text = right
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    return _slash_as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _braced_roots(text: str) -> str:
    r"""`\sqrt3` as `\sqrt{3}`."""
    first, *rest = text.split("\\sqrt")
    if "" in rest:
        raise ValueError("nothing under a root")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{2}` as `\frac{1}{2}`, unless a fraction has less than two characters after it."""
    first, *rest = text.split("\\frac")
    for number, part in enumerate(rest):
        if not part:
            raise ValueError("nothing in a fraction")
        if part[0] != "{":
            if len(part) < 2:
                return text
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            rest[number] = f"{{{part[0]}}}{below}"
    return "\\frac".join([first, *rest])


def _slash_as_fraction(text: str) -> str:
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
