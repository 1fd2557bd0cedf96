r"""math-verify's own verdicts, for differential tests: no pair is settled or refuted before it is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from micota_fast.grading.spelling import normalise

_CODE = r"""
import functools, json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
read = functools.cache(lambda answer: parse("\\boxed{" + answer + "}", targets, parsing_timeout=None))
verdicts = []
for answer, gold in json.load(sys.stdin):
    try:
        equal = verify(read(gold), read(answer), timeout_seconds=None, allow_set_relation_comp=True)
    except Exception:
        equal = False
    verdicts.append("correct" if equal else "wrong")
print(json.dumps(verdicts))
"""


def math_verify_verdicts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Of (answer, gold) pairs, read and compared as it does; without limits, so the pairs must be tame."""
    spelled = [(normalise(answer), normalise(gold)) for answer, gold in pairs]
    distinct = list(dict.fromkeys(spelled))
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", _CODE]
    run = subprocess.run(
        command, input=json.dumps(distinct), capture_output=True, text=True, check=True, env=environment
    )
    verdicts = dict(zip(distinct, json.loads(run.stdout.splitlines()[-1]), strict=True))
    return [verdicts[pair] for pair in spelled]
