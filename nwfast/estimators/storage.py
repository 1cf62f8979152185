"""Fitted estimators in files: NumPy's npz, arrays and one JSON text, so that reading one runs nothing of it."""

import json
import os
import zipfile
from typing import Any

import numpy as np
import torch

from .model import State
from .selection import BandwidthSelection
from .sites import Sites

_FORMAT = "nwfast-estimator"
_VERSION = 1
_SITES = ("x", "y", "mass", "unit", "within")
_PARAMETERS = ("bandwidth", "missing", "progress", "variance")
_PLAIN = (
    "n_dropped_",
    "n_outputs_",
    "n_features_in_",
    "n_observations_",
    "output_names_",
    "r2_",
    "loss_",
    "effective_dof_",
)


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator."""
    from .. import __version__

    state, selection = estimator._state, estimator.selection_
    parameters = {
        name: value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
        for name, value in ((name, getattr(estimator, name)) for name in _PARAMETERS)
    }
    text = {
        "format": _FORMAT,
        "version": _VERSION,
        "nwfast": __version__,
        "class": estimator._kind,
        "parameters": parameters,
        "attributes": {name: getattr(estimator, name) for name in _PLAIN},
        "single": estimator._single,
        "plain": state.sites.plain,
        "residual_dof": state.residual_dof,
        "constant": state.constant,
        "feature_names": [str(name) for name in getattr(estimator, "feature_names_in_", [])],
        "report": estimator.report_,
        "selection": None
        if selection is None
        else {
            name: getattr(selection, name)
            for name in ("loss", "criterion", "degree", "at_bound", "note", "evaluations")
        },
    }
    arrays = {name: getattr(state.sites, name).cpu().numpy() for name in _SITES}
    arrays |= {"bandwidth": np.asarray(estimator.bandwidth_), "variance": state.variance().cpu().numpy()}
    if selection is not None:
        arrays |= {
            "lower": selection.lower,
            "upper": selection.upper,
            "path_bandwidth": selection.path[0],
            "path_loss": selection.path[1],
        }
    with open(path, "wb") as file:
        np.savez(file, text=np.array(json.dumps(text)), **arrays)


def load(path: str | os.PathLike[str], kinds: dict[str, Any] | None = None) -> Any:
    """Read an estimator that `save` wrote: one of `kinds`, by its name, without of the public ones.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file, or one that holds no estimator.
    """
    wrong = f"{os.fspath(path)!r} is no model that nwfast saved"
    try:
        with np.load(path, allow_pickle=False) as file:
            text = json.loads(str(file["text"]))
            if text.get("format") != _FORMAT:
                raise ValueError(wrong)
            if text["version"] > _VERSION:
                raise ValueError(
                    f"{os.fspath(path)!r} is of a newer format ({text['version']}, this nwfast knows {_VERSION}): "
                    f"it was saved by nwfast {text['nwfast']}"
                )
            arrays = {name: file[name] for name in file.files if name != "text"}
    except (zipfile.BadZipFile, KeyError, EOFError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(wrong) from error
    except ValueError as error:
        if str(error).startswith(repr(os.fspath(path))):
            raise
        raise ValueError(wrong) from error
    if kinds is None:
        from .regressor import KINDS

        kinds = KINDS
    if text["class"] not in kinds:
        raise ValueError(wrong)
    estimator = kinds[text["class"]](**text["parameters"])
    for name in _PLAIN:
        setattr(estimator, name, text["attributes"][name])
    if text["feature_names"]:
        estimator.feature_names_in_ = np.array(text["feature_names"], dtype=object)
    estimator.bandwidth_ = arrays["bandwidth"]
    estimator.report_ = text["report"]
    estimator._single = text["single"]
    found = text["selection"]
    estimator.selection_ = None
    if found is not None:
        path_found = arrays["path_bandwidth"], arrays["path_loss"]
        found["at_bound"] = tuple(found["at_bound"])
        estimator.selection_ = BandwidthSelection(
            bandwidth=arrays["bandwidth"],
            lower=arrays["lower"],
            upper=arrays["upper"],
            path=path_found,
            **found,
        )
    x, y, mass, unit, within = (torch.from_numpy(arrays[name]) for name in _SITES)
    sites = Sites(x, y, mass, unit, within, text["plain"])
    w = torch.from_numpy(1 / estimator.bandwidth_).to(sites.x)
    state = State(sites, w, estimator._degree, "constant", text["residual_dof"])
    state.constant = text["constant"]
    state._variance = torch.from_numpy(arrays["variance"])
    estimator._state = state
    return estimator
