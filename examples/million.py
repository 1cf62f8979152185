r"""
A bandwidth for a million points
================================

Cross-validation takes, for each bandwidth, a fit to all other observations at each of them: :math:`10^{12}` pairs for a
million. In linear time these are some hundredths of a second, and the whole search for the bandwidth is about one.
"""

import time

import matplotlib.pyplot as plt
import numpy as np

import nwfast

n = 1_000_000
random = np.random.default_rng(0)
x = random.uniform(0, 10, n)
truth = np.sin(x) + 0.3 * np.sin(40 * x)
y = truth + random.standard_normal(n)

# %%
# The noise is more than three times as high as the fast part of the curve: no eye finds it among the points.

start = time.perf_counter()
selection = nwfast.select_bandwidth(x, y)
seconds = time.perf_counter() - start
print(
    f"h = {float(selection):.4f}, in {seconds:.1f} s and {selection.evaluations} evaluations of the criterion"
)

# %%
# The criterion over the bandwidth, less the mean square of the noise, which no bandwidth takes away and which is known
# here: with it the minimum would be too level to be seen.

wide = float(selection) * np.geomspace(0.2, 30, 25)
model = nwfast.NadarayaWatsonRegressor(bandwidth=float(selection)).fit(x[:, None], y)
_, curve = model.bandwidth_curve(wide / float(selection))

grid = np.linspace(4, 6, 800)[:, None]
fit, std = model.predict(grid, return_std=True)
shown = np.flatnonzero((x > 4) & (x < 6))[:1500]

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
noise = np.mean((y - truth) ** 2)
left.loglog(wide, curve - noise, ".-")
left.plot(float(selection), selection.loss - noise, "o", color="C3")
left.set(xlabel="bandwidth", ylabel="leave-one-out error - noise")
right.plot(x[shown], y[shown], ".", color="0.8", markersize=2)
right.plot(grid, np.sin(grid) + 0.3 * np.sin(40 * grid), "k--", linewidth=1, label="truth")
right.plot(grid, fit, color="C3", label="fit")
right.set(xlabel="x", ylim=(-2.5, 1.5))
right.legend(frameon=False)
plt.show()

# %%
# The fit is off by about its standard error:

inside = np.sin(grid[:, 0]) + 0.3 * np.sin(40 * grid[:, 0])
error = float(np.sqrt(np.mean((fit - inside) ** 2)))
print(f"error {error:.4f}, standard error {std.mean():.4f}")
