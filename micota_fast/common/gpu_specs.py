"""What GPUs can do, by NVIDIA's data sheets and architecture white papers: the one table of it."""

from typing import NamedTuple


class GPU(NamedTuple):
    """One GPU.

    Attributes:
        name: the part of torch's name of the device that identifies it.
        flops: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: bytes per second that can be read from its memory.
        sms: streaming multiprocessors.
        l2: bytes of the L2 cache.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    sms: int
    l2: int


GPUS = {
    "h100": GPU("H100", 989e12, 80e9, 3.35e12, 132, 50 << 20),
    "h100-pcie": GPU("H100 PCIe", 756e12, 80e9, 2.0e12, 114, 50 << 20),
    "h100-nvl": GPU("H100 NVL", 835e12, 94e9, 3.9e12, 132, 50 << 20),
    "h200": GPU("H200", 989e12, 141e9, 4.8e12, 132, 50 << 20),
    "h200-nvl": GPU("H200 NVL", 835e12, 141e9, 4.8e12, 132, 50 << 20),
    "gh200": GPU("GH200", 989e12, 96e9, 4.0e12, 132, 50 << 20),
    "b200": GPU("B200", 2250e12, 180e9, 8.0e12, 148, 126 << 20),
    "gb200": GPU("GB200", 2500e12, 186e9, 8.0e12, 148, 126 << 20),
    "a100": GPU("A100", 312e12, 80e9, 2.04e12, 108, 40 << 20),
    "a100-40gb": GPU("A100", 312e12, 40e9, 1.56e12, 108, 40 << 20),
    "a800": GPU("A800", 312e12, 80e9, 2.04e12, 108, 40 << 20),
    "h800": GPU("H800", 989e12, 80e9, 3.35e12, 132, 50 << 20),
    "l40s": GPU("L40S", 362e12, 48e9, 0.864e12, 142, 96 << 20),
    "l40": GPU("L40", 181e12, 48e9, 0.864e12, 142, 96 << 20),
    "l4": GPU("L4", 121e12, 24e9, 0.3e12, 58, 48 << 20),
    "a10g": GPU("A10G", 70e12, 24e9, 0.6e12, 80, 6 << 20),
    "rtx4090": GPU("RTX 4090", 165e12, 24e9, 1.01e12, 128, 72 << 20),
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device by the name torch gives it; None: it is not in the table."""
    found = [gpu for gpu in GPUS.values() if gpu.name in device_name]
    return max(found, key=lambda gpu: len(gpu.name)).flops if found else None  # a GH200 is not an H200
