"""What GPUs can do, by NVIDIA's data sheets: the one table of it."""

from typing import NamedTuple


class GPU(NamedTuple):
    """One GPU.

    Attributes:
        name: the part of torch's name of the device that identifies it.
        flops: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: bytes per second that can be read from its memory.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "h100": GPU("H100", 989e12, 80e9, 3.35e12),
    "h100-pcie": GPU("H100 PCIe", 756e12, 80e9, 2.0e12),
    "h100-nvl": GPU("H100 NVL", 835e12, 94e9, 3.9e12),
    "h200": GPU("H200", 989e12, 141e9, 4.8e12),
    "h200-nvl": GPU("H200 NVL", 835e12, 141e9, 4.8e12),
    "gh200": GPU("GH200", 989e12, 96e9, 4.0e12),
    "b200": GPU("B200", 2250e12, 180e9, 8.0e12),
    "gb200": GPU("GB200", 2500e12, 186e9, 8.0e12),
    "a100": GPU("A100", 312e12, 80e9, 2.04e12),
    "a100-40gb": GPU("A100", 312e12, 40e9, 1.56e12),
    "a800": GPU("A800", 312e12, 80e9, 2.04e12),
    "h800": GPU("H800", 989e12, 80e9, 3.35e12),
    "l40s": GPU("L40S", 362e12, 48e9, 0.864e12),
    "l40": GPU("L40", 181e12, 48e9, 0.864e12),
    "l4": GPU("L4", 121e12, 24e9, 0.3e12),
    "a10g": GPU("A10G", 70e12, 24e9, 0.6e12),
    "rtx4090": GPU("RTX 4090", 165e12, 24e9, 1.01e12),
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device by the name torch gives it; None: it is not in the table."""
    found = [gpu for gpu in GPUS.values() if gpu.name in device_name]
    return max(found, key=lambda gpu: len(gpu.name)).flops if found else None  # a GH200 is not an H200
