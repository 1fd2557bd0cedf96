"""The rules by which answers enter a corpus, on the spot and in the background."""

import asyncio
from dataclasses import replace

import pytest

from helpers.waiting import soon, standstill
from micota_fast.common.records import Completion
from micota_fast.config.corpus import FilterSettings
from micota_fast.corpus.rules import RUN_WORDS, Judge, Judgement, foreign_share, reject_at_once, repeated_share

ROW = Completion("p", 0, "What is 3 + 4?", "7", "It is \\boxed{7}.", "stop", 9, 5, None)
RULES = FilterSettings(max_tokens=100, max_foreign=0.02, max_repeated=0.3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"finish_reason": "length"}, "truncated"),
        ({"finish_reason": "abort"}, "aborted"),
        ({"completion_tokens": 100}, "too_long"),
        ({"completion": "It is 7."}, "no_answer"),
        ({"completion": "<think>\\boxed{7}</think>"}, "no_answer"),  # a box in a thought is no answer
        ({"completion": "<think>\\boxed{7}</think>It is 7."}, "no_answer"),
        ({"completion": "It is 7.</think>It is \\boxed{7}.", "opened": "<think>\n"}, None),
        ({"completion": "It is \\boxed{7}.", "opened": "<think>\n"}, "unclosed_thought"),
        ({"completion": "<think>a</think>b</think>\\boxed{7}"}, "malformed_thought"),
        ({"completion": "首先我们计算一下 \\boxed{7}"}, "foreign_script"),
        ({"completion": "Wait, let me compute that once more. " * 40 + "\\boxed{7}"}, "repetition"),
        ({"finish_reason": "length", "completion": "首先"}, "truncated"),  # the first rule that holds
    ],
)
def test_each_rule(changes: dict[str, object], reason: str | None) -> None:
    assert reject_at_once(replace(ROW, **changes), RULES) == reason


def test_rules_that_are_not_set_reject_nothing() -> None:
    loose = FilterSettings(require_correct=False, require_boxed=False)
    for text in ("首先我们计算一下", "again and " * 500, ""):
        assert reject_at_once(replace(ROW, completion=text), loose) is None


@pytest.mark.parametrize(
    ("answer", "problem", "share"),
    [
        ("abc", "x", 0.0),
        ("α + β = γ, 𝑥 ∈ ℝ, 12 % ²", "let x be", 0.0),  # mathematics is no language
        ("答案是 7", "求 x", 0.0),  # a Chinese problem may be answered in Chinese
        ("ответ x", "find x", 5 / 6),
        ("答案 ab", "12 + 3 =", 0.5),  # a problem without letters is taken for English
        ("123 + 4", "x", 0.0),
    ],
)
def test_foreign_share(answer: str, problem: str, share: float) -> None:
    assert foreign_share(answer, problem) == pytest.approx(share)


def test_repeated_share() -> None:
    words = [f"w{i}" for i in range(200)]
    assert repeated_share(" ".join(words)) == 0.0
    assert repeated_share("") == 0.0
    loop = [f"l{i}" for i in range(RUN_WORDS)]
    # 100 words, then a run of 16 ten times: nine of them have occurred before.
    text = " ".join(words[:100] + loop * 10)
    assert repeated_share(text) == pytest.approx(9 * RUN_WORDS / (100 + 10 * RUN_WORDS))
    short = " ".join(["so x = 3 then", *words[:100], "so x = 3 then"])
    assert repeated_share(short) == 0.0  # a short turn of phrase is no loop


def test_repeated_share_is_linear() -> None:
    with soon():
        repeated_share("x " * 200_000)


def test_the_loop_goes_on_while_answers_are_compared() -> None:
    """One comparison takes a second of processor time; the event loop meanwhile turns, and others are judged."""
    rules = FilterSettings(timeout_s=1.0, workers=2)
    hostile = replace(ROW, completion="\\boxed{10^{10^{10}}}")
    cases = [ROW, replace(ROW, completion="\\boxed{8}"), hostile, replace(ROW, completion="\\boxed{\\sqrt{49}}")]

    async def judge_all() -> list[str | None]:
        with Judge(rules) as judge:

            async def one(row: Completion) -> Judgement:
                return judge.at_once(row) or await judge.compared(row)

            judged = await asyncio.gather(*(one(row) for row in cases))
        return [judgement.reason for judgement in judged]

    reasons, still = asyncio.run(standstill(judge_all()))
    assert reasons == [None, "wrong", "timeout", None]
    assert still < 0.5


def test_a_run_that_is_broken_off_does_not_wait_for_its_comparisons() -> None:
    hostile = [replace(ROW, completion=f"\\boxed{{{base}^{{10^{{10}}}}}}") for base in range(2, 10)]

    async def broken_off(judge: Judge) -> None:
        asyncio.gather(*(judge.compared(row) for row in hostile))
        await asyncio.sleep(1.0)
        raise KeyboardInterrupt

    with soon(), Judge(FilterSettings(timeout_s=600.0, workers=1)) as judge, pytest.raises(KeyboardInterrupt):
        asyncio.run(broken_off(judge))


def test_a_judge_whose_grader_cannot_work_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def one() -> Judgement:
        with Judge(FilterSettings()) as judge:

            def broken(_: object) -> None:
                raise RuntimeError("no workers here")

            monkeypatch.setattr(judge._grader, "grade", broken)
            return await judge.compared(ROW)

    with pytest.raises(RuntimeError, match="no workers here"):
        asyncio.run(one())
