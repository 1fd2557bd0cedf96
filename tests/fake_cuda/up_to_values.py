"""A plugin of pytest (`-p fake_cuda.up_to_values`): a test on the fake device passes where only values disagree.

All that comes back from that device is zeros or ones, so a comparison that a GPU's test makes at its end fails, and
says by it that everything before was executed.
"""

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Let the test end where it compares."""
    try:
        return (yield)
    except AssertionError:
        return True
