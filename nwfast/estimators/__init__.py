"""Kernel regression for people with data: bandwidths, estimators, standard errors, and their files.

`nwfast.select_bandwidth`, `nwfast.NadarayaWatsonRegressor` and `nwfast.LocalLinearRegressor` come from here; they need
SciPy and scikit-learn, which `import nwfast` does not import.
"""
