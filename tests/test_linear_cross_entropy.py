"""The fused loss against a dense float64 reference: values, gradients, memory, edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from micota_fast.kernels import linear_cross_entropy
from micota_fast.kernels import linear_cross_entropy as loss_of_package
from micota_fast.kernels.reference import dense_linear_cross_entropy

loss_module = __import__("sys").modules[loss_of_package.__module__]
