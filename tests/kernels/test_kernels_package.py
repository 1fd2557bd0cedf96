"""The folder at the repository's root that transformers takes for Hugging Face's package of the same name."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT

PROGRAM = """
import sys

import torch
import micota_fast.kernels
import kernels  # as transformers does where it runs at the repository's root

assert kernels.__file__ == micota_fast.kernels.__file__
assert not [name for name in sys.modules if name.startswith("kernels.")], "the operator is defined twice"
hidden, weight = torch.ones(3, 4), torch.ones(5, 4)
print(float(micota_fast.kernels.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, -100]))))
"""


@pytest.mark.slow
def test_a_second_import_under_another_name_defines_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 1.6094379) < 1e-6  # log 5


def test_a_module_of_the_package_that_is_imported_first_runs_once() -> None:
    """Or a class would be there twice, and no instance of one is one of the other."""
    program = """
from micota_fast.kernels.soft_targets import SoftTargets
import micota_fast.kernels.reference

assert micota_fast.kernels.SoftTargets is micota_fast.kernels.reference.SoftTargets is SoftTargets
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
