"""Kernel regression for people with data: bandwidths, estimators, standard errors, and their files.

`nwfast.select_bandwidth`, `nwfast.NadarayaWatsonRegressor` and `nwfast.LocalLinearRegressor` come from here; they need
SciPy and scikit-learn, which `import nwfast` does not import.
"""

# How a bandwidth may be found: by a criterion that is minimised, or by a rule of thumb.
CRITERIA = ("loo", "gcv", "aicc")
RULES = ("silverman", "scott")
