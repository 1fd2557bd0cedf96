"""The one loss of the project; imported as `micota_fast.kernels`."""

from .linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
