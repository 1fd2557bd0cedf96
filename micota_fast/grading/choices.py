r"""The string rule of multiple choice: the letter in the last box, as `C`, `(C)`, `\text{C}` or with its option."""

import re

from micota_fast.grading.answers import extract_boxed
from micota_fast.grading.forms import choice
from micota_fast.grading.grader import Verdict
from micota_fast.grading.spelling import normalise


def grade_choice(completion: str, gold: str) -> Verdict:
    """Return `correct`, `wrong` or `no_answer`; a box that holds no letter is wrong, whatever option it repeats."""
    answer = extract_boxed(completion)
    if not answer:
        return Verdict("no_answer", None)
    found = choice(normalise(answer))
    return Verdict("correct" if found is not None and found[0].upper() == gold else "wrong", answer)


def why_unreadable_as_choice(gold: str) -> str | None:
    """Say why no letter would equal this gold answer; None if one can. As `why_unreadable`."""
    return None if re.fullmatch("[A-Z]", gold) else "is not one capital letter"
