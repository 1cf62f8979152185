"""Tables, arrays and tensors in, and results in the form of what came in."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

OUTPUTS = ("like", "default", "pandas", "polars")


def names_of(y: Any) -> list[str] | None:
    """The name of a pandas or polars series, or those of the columns of a table; None where there is none."""
    columns = getattr(y, "columns", None)
    if columns is not None and not callable(columns) and np.ndim(y) == 2:
        return [str(name) for name in columns]
    name = getattr(y, "name", None)
    return None if name is None or callable(name) or np.ndim(y) != 1 else [str(name)]


def family(data: Any) -> str:
    """Where data come from: "torch", "pandas", "polars" or "default"."""
    if isinstance(data, Tensor):
        return "torch"
    root = type(data).__module__.partition(".")[0]
    return root if root in ("pandas", "polars") else "default"


def to_tensor(array: Any) -> Tensor:
    """A float32 or float64 tensor of an array, which shares its memory where that can be written."""
    array = np.asarray(array)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def to_output(found: Tensor, like: Any, names: list[str], output: str) -> Any:
    """Results of rows, (M,) or (M, K), as a tensor, an array, or a series or table with names and the index of `like`.

    `output` is one of `OUTPUTS`: "like" follows what came in.
    """
    if isinstance(like, Tensor):
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        return found.to(dtype=dtype, device=like.device)
    kind = family(like) if output == "like" else output
    array = found.detach().cpu().numpy()
    if kind == "pandas":
        import pandas

        index = like.index if family(like) == "pandas" else None
        if array.ndim == 1:
            return pandas.Series(array, index=index, name=names[0])
        return pandas.DataFrame(array, index=index, columns=names)
    if kind == "polars":
        import polars

        if array.ndim == 1:
            return polars.Series(names[0], array)
        return polars.DataFrame(array, schema=names)
    return array
