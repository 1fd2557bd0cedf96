"""What GPUs can do, by their makers' data sheets."""

# Dense bfloat16 TFLOP/s from NVIDIA's data sheets, by a part of the device's name; the first match counts.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("H800", 989.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("RTX 4090", 165.0),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by the name torch gives it; None where it is not in the table."""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS if part in device_name), None)
