r"""
The slope of a fit, three ways
==============================

A fit is differentiable in the places at which it is asked for, so its slope there is one call of autograd. For
``local_linear`` there is a second slope, that of the line which was fitted. This example compares both with the true
derivative of a curve, and shows where they part: at the ends of the data.
"""

import matplotlib.pyplot as plt
import torch

import nwfast

generator = torch.Generator().manual_seed(0)
x = 6 * torch.rand(2000, generator=generator, dtype=torch.float64)
y = torch.sin(x) + 0.2 * torch.randn(2000, generator=generator, dtype=torch.float64)
w = nwfast.select_bandwidth(x, y, degree=1).w

# %%
# The bandwidth is the one found for lines. By autograd: each output depends on its own query alone, so the gradient of
# their sum holds all slopes.

query = torch.linspace(0, 6, 241, dtype=torch.float64, requires_grad=True)
fit = nwfast.nadaraya_watson(query, x, y, w)
(slope_of_mean,) = torch.autograd.grad(fit.sum(), query)

line, fitted = nwfast.local_linear(query, x, y, w, return_slope=True)
(slope_of_line,) = torch.autograd.grad(line.sum(), query)

# %%
# Is it the derivative? A central difference of the fit says so, as far as differences can.

step = 1e-5
ahead, behind = (nwfast.nadaraya_watson(query.detach() + s, x, y, w) for s in (step, -step))
gap = ((ahead - behind) / (2 * step) - slope_of_mean).abs().max().item()
print(f"autograd against a central difference: {gap:.1e}")

# %%
# Against the truth, cos x, in the middle of the data and within a bandwidth of their ends:

truth = torch.cos(query.detach())
near_end = (query.detach() < 1 / w) | (query.detach() > 6 - 1 / w)
slopes = {
    "local mean, autograd": slope_of_mean,
    "local line, autograd": slope_of_line,
    "local line, fitted slope": fitted.detach(),
}
errors = {
    name: [(slope - truth)[part].square().mean().sqrt().item() for part in (~near_end, near_end)]
    for name, slope in slopes.items()
}
print(f"h = {1 / w:.2f}; root mean squared error     middle     ends")
for name, (middle, ends) in errors.items():
    print(f"{name:<36}  {middle:>8.3f} {ends:>8.3f}")

figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
for name, slope in slopes.items():
    axes.plot(query.detach(), slope, label=name)
axes.plot(query.detach(), truth, "k--", linewidth=1, label="truth, cos x")
axes.set(xlabel="x", ylabel="slope")
axes.legend(frameon=False)
plt.show()

# %%
# The local mean flattens where data end: beyond them there is nothing to average with. The line has no such bias. Its
# fitted slope is an estimate of its own, as good as the derivative of its fit among the data and better at their ends:
# take it where the slope is what is wanted. The derivative of the fit belongs inside of larger computations, whose
# gradients have to be those of what they compute.
