"""Nadaraya-Watson kernel regression: attention pooling with a Gaussian kernel, without the (M, N) matrix."""

from . import backends
from .functional import attention_weights, local_linear, nadaraya_watson
from .index import KeyIndex
from .nn import NWKernelRegression

__version__ = "0.1.0"
__all__ = [
    "KeyIndex",
    "NWKernelRegression",
    "attention_weights",
    "backends",
    "local_linear",
    "nadaraya_watson",
]
