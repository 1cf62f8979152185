r"""
The chapter
===========

Attention pooling as "Dive into Deep Learning" teaches it (chapter "Attention Pooling: Nadaraya-Watson Kernel
Regression"): fifty noisy points, an average of them for every query, weights that a Gaussian kernel gives, and a kernel
whose width is learned. The op takes the place of the two lines that build the (M, N) matrix of weights.
"""

import matplotlib.pyplot as plt
import torch

import nwfast
from nwfast import datasets

# %%
# Fifty inputs, uniform on (0, 5), with :math:`y = 2 \sin x + x^{0.8}` and noise; fifty test inputs with the truth.

data = datasets.chapter(seed=0)
x, y = data.x_train, data.y_train

# %%
# **Average pooling** ignores the query: that is the kernel at w = 0. **Non-parametric pooling** weighs each example by
# its distance to the query, at w = 1.

average = nwfast.nadaraya_watson(data.x_test, x, y, w=0.0)
pooled = nwfast.nadaraya_watson(data.x_test, x, y, w=1.0)

Q = data.x_test.repeat_interleave(len(x)).reshape(-1, len(x))  # the textbook, for comparison
textbook = torch.softmax(-((Q - x) ** 2) / 2, dim=1) @ y
print(f"largest difference to the textbook: {(pooled - textbook).abs().max():.1e}")

# %%
# **Parametric pooling** learns w. No example may help to predict itself, or the narrowest kernel would win: the chapter
# tiles the data into (50, 49) matrices without the diagonal, ``exclude_self=True`` leaves the example out where it is.

net = nwfast.NWKernelRegression(w=0.5)
optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
losses = []
for _epoch in range(5):
    optimiser.zero_grad()
    loss = ((net(x, x, y, exclude_self=True) - y) ** 2 / 2).sum()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
with torch.no_grad():
    learned = net(data.x_test, x, y)
learned_weights = net.attention_weights

errors = {
    name: (fit - data.y_truth).square().mean().item()
    for name, fit in [("average", average), ("w = 1", pooled), ("learned w", learned)]
}
print(f"w = {net.w.item():.2f}; losses " + ", ".join(f"{loss:.1f}" for loss in losses))
for name, error in errors.items():
    print(f"mean squared error, {name}: {error:.3f}")

# %%
# The learned kernel is sharper, its fit closer to the truth and less smooth.

figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
axes.plot(data.x_test, data.y_truth, label="truth")
axes.plot(data.x_test, average, "--", color="0.6", label="average")
axes.plot(data.x_test, pooled, label="w = 1")
axes.plot(data.x_test, learned, label=f"learned, w = {net.w.item():.1f}")
axes.plot(x, y, "o", alpha=0.5, label="examples")
axes.set(xlabel="x", ylabel="y", xlim=(0, 5), ylim=(-1, 5))
axes.legend(frameon=False, ncols=2)
plt.show()

# %%
# The weights themselves are a matrix of all pairs, made only where one asks for it.

figure, both = plt.subplots(1, 2, figsize=(6.4, 3), layout="constrained")
shown = {"w = 1": nwfast.attention_weights(data.x_test, x, w=1.0), "learned w": learned_weights}
for axes, (name, weights) in zip(both, shown.items(), strict=True):
    image = axes.imshow(weights.numpy(), cmap="Reds")
    axes.set(title=name, xlabel="examples, in order", ylabel="test inputs")
    figure.colorbar(image, ax=axes, shrink=0.7)
plt.show()
