"""What a running generation shows."""

import io

import pytest

from micota_fast.generation.endpoint import Endpoint, Load, ServerInfo
from micota_fast.generation.progress import Meters, Screen
from micota_fast.generation.sglang_servers import parse_load


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("micota_fast.generation.progress.time.monotonic", lambda: now[0])
    return now


def endpoints() -> list[Endpoint]:
    first, second = Endpoint("http://a:1", 99), Endpoint("http://b:1", 99)
    first.up()
    first.in_flight, first.load = 30, Load(running=28, waiting=2, usage=0.5)
    first.info = ServerInfo(device="cuda", tp_size=2, dp_size=2)
    second.info = ServerInfo(device="cuda", tp_size=2)
    return [first, second]


def test_a_line_says_how_far_how_fast_and_at_what_cost(clock: list[float]) -> None:
    meters = Meters(done=100, accepted=60)
    clock[0] += 10.0
    for i in range(50):
        meters.answer(prompt_tokens=10, completion_tokens=200)
        meters.judge(None if i % 2 else "wrong")
    line = meters.line(400, endpoints())
    assert line == (
        "[#######             ] 150 of 400  50% accepted  1,000 tok/s out, 50 in  "
        "30 in flight (28 running, 2 queued, KV 50%) on 1 of 2 servers  2.4 GPU s an accepted answer  0:00:50 left"
    )
    summary = meters.summary(endpoints())
    assert summary["rejected"] == {"wrong": 25}
    assert (summary["answers"], summary["accepted"], summary["seconds"]) == (50, 25, 10.0)


def test_speeds_are_those_of_the_last_minute(clock: list[float]) -> None:
    meters = Meters(done=0, accepted=None)
    for second in range(200):
        clock[0] += 1.0
        meters.answer(0, 100 if second < 100 else 10)
        line = meters.line(1000, [])
    assert "10 tok/s out" in line
    assert "accepted" not in line
    assert "0:13:20 left" in line


def test_without_figures_none_are_made_up(clock: list[float]) -> None:
    line = Meters(done=0, accepted=None).line(10, [Endpoint("http://a:1", 9)])
    assert "? left" in line
    assert "GPU" not in line
    assert "running" not in line


def test_loads_of_ranks_are_added_up() -> None:
    rank = {"num_running_reqs": 3, "num_waiting_reqs": 1, "token_usage": 0.5}
    assert parse_load({"loads": [rank, {**rank, "token_usage": 0.7}]}) == Load(6, 2, 0.6)
    for nothing in ({}, [], {"loads": [{"num_running_reqs": 3}]}, None, {"loads": 3}, {"loads": [3]}):
        assert parse_load(nothing) is None
    assert parse_load({"loads": [{**rank, "num_running_reqs": float("inf")}]}) is None


def test_a_terminal_is_rewritten_and_a_log_is_not() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), "\rlong line\rshort    \n"), (io.StringIO(), "long line\nshort\n")):
        screen = Screen(stream)
        screen.show("long line")
        screen.show("short")
        screen.end()
        assert stream.getvalue() == shown
