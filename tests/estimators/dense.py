"""Fits by their (M, n) matrices of linear weights, in float64: what the sums of nwfast.estimators are held against."""

import numpy as np


def weights(query, x, bandwidth, degree, mass=None, exclude=None):
    """Rows l with fit = l @ y, (M, n), and those of the slopes, (M, D, n).

    `exclude` (M,): a key that each row leaves out.
    """
    mass = np.ones(len(x)) if mass is None else mass
    d = x[None] - query[:, None]
    score = -0.5 * ((d / bandwidth) ** 2).sum(-1)
    if exclude is not None:
        score[np.arange(len(query)), exclude] = -np.inf
    with np.errstate(divide="ignore"):
        score = score + np.log(mass)
    k = np.exp(score - score.max(1, keepdims=True))
    p = k / k.sum(1, keepdims=True)
    if degree == 0:
        mean = p @ x
        return p, np.einsum("mn,mnd->mdn", p, (x[None] - mean[:, None]) / bandwidth**2)
    rows, slopes = [], []
    for at, own in zip(d, p, strict=True):
        design = np.concatenate([np.ones((len(x), 1)), at], 1)
        solved = np.linalg.solve(design.T @ (own[:, None] * design), (own[:, None] * design).T)
        rows.append(solved[0])
        slopes.append(solved[1:])
    return np.array(rows), np.array(slopes)


def leave_one_out(x, y, bandwidth, degree):
    """Residuals (n, C) of fits to all other rows, and those fits' linear weights (n, n)."""
    rows = weights(x, x, bandwidth, degree, exclude=np.arange(len(x)))[0]
    return y - rows @ y, rows


def criterion(name, x, y, bandwidth, degree):
    """A criterion of unweighted rows by its definition."""
    n = len(x)
    if name == "loo":
        return (leave_one_out(x, y, bandwidth, degree)[0] ** 2).mean()
    hat = weights(x, x, bandwidth, degree)[0]
    variance, trace = ((y - hat @ y) ** 2).mean(0), np.trace(hat)
    if name == "gcv":
        return (variance / (1 - trace / n) ** 2).mean()
    return np.log(variance).mean() + 1 + 2 * (trace + 1) / (n - trace - 2)
