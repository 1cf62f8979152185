"""Nadaraya-Watson kernel regression: attention pooling with a Gaussian kernel, without the (M, N) matrix."""

from . import backends
from .functional import attention_weights, local_linear, nadaraya_watson
from .index import KeyIndex
from .leave_one_out import leave_one_out_loss
from .nn import NWKernelRegression

__version__ = "0.1.0"
__all__ = [
    "KeyIndex",
    "NWKernelRegression",
    "attention_weights",
    "backends",
    "leave_one_out_loss",
    "local_linear",
    "nadaraya_watson",
]
