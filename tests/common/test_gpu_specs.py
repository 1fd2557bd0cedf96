"""The table of GPUs."""

import pytest

from micota_fast.common.gpu_specs import GPUS, peak_flops


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
    ],
)
def test_a_device_has_the_flops_of_the_longest_name_in_its_own(device: str, tflops: float) -> None:
    assert peak_flops(device) == tflops * 1e12


def test_a_device_that_is_not_in_the_table_has_no_known_flops() -> None:
    assert peak_flops("AMD EPYC") is None


def test_units_are_bytes_and_flops() -> None:
    for name, gpu in GPUS.items():
        assert 20e9 <= gpu.memory <= 200e9, name
        assert 2e11 <= gpu.bandwidth <= 1e13, name
        assert 5e13 <= gpu.flops <= 5e15, name
