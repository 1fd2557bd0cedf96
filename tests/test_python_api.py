"""`micota_fast.NAME`: the functions of the package, imported when they are used."""

import inspect
import subprocess
import sys

import pytest

import micota_fast

CHECK = """
import sys
import micota_fast
assert not {{"torch", "numpy", "numba"}} & sys.modules.keys()
assert {name!r} in dir(micota_fast) and callable(micota_fast.{name})
import micota_fast.train.loop, micota_fast.merge.merge, micota_fast.evaluation.evaluate, micota_fast.generation.generate
from micota_fast import {name}
assert micota_fast.{name} is {name} and callable({name})
"""


def test_every_function_has_a_signature_and_a_line_in_the_help() -> None:
    assert len(micota_fast.__all__) == 7
    for name in micota_fast.__all__:
        function = getattr(micota_fast, name)
        parameters = inspect.signature(function).parameters
        assert f"    {name}({next(iter(parameters))}" in (micota_fast.__doc__ or "")
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())
        assert inspect.getdoc(inspect.unwrap(function))


@pytest.mark.parametrize("name", ["train", "pack"])
def test_a_function_stays_one_whatever_was_imported_before_and_the_package_imports_no_torch(name: str) -> None:
    subprocess.run([sys.executable, "-c", CHECK.format(name=name)], check=True, timeout=200)


def test_what_a_package_is_called_with_reaches_its_function() -> None:
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'lr'"):
        micota_fast.train(lr=1e-4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"merge\(\) missing 1 required positional argument: 'config'"):
        micota_fast.merge()  # type: ignore[call-arg]


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(micota_fast, "distil")
    with pytest.raises(ImportError, match="cannot import name 'distil'"):
        from micota_fast import distil  # type: ignore[attr-defined]  # noqa: F401
