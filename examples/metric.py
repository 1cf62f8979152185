"""
Learn a metric: one w for each feature
======================================

With several features one bandwidth for all of them says that all matter alike. A w for each is a metric, and the
leave-one-out loss is differentiable in it: features that say nothing get a w near 0, and are out. The data are the 442
diabetes patients that come with scikit-learn: ten measurements, and how far the disease has gone a year later.

Ten parameters can also be fitted to noise. So every error below is on patients that took no part in the fit.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes

import nwfast

data = load_diabetes(scaled=False)
features, progress = torch.from_numpy(data.data), torch.from_numpy(data.target)

# %%
# The loss is that of leave-one-out, and its logarithm is minimised, so that no unit matters. Steps are taken in log w:
# w stays positive. A price on the sum of w, as in the lasso, lets go of features that hardly pay.


def learn(x, y, parameters, price=0.0, steps=40):
    """W that minimises log loss + price * sum(w), of `parameters` entries: 1 shared, or 1 for each feature."""
    log_w = torch.full((parameters,), -0.3, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([log_w], lr=0.2)
    for _step in range(steps):
        optimiser.zero_grad()
        w = log_w.exp()
        (nwfast.leave_one_out_loss(x, y, w).log() + price * w.sum()).backward()
        optimiser.step()
    return log_w.detach().exp()


# %%
# Four times, 300 patients to learn from and 142 to be judged by; each feature is brought to deviation 1 first.

kinds = {"one w": (1, 0.0), "one for each": (10, 0.0), "one for each, at a price": (10, 0.02)}
inside = {name: [] for name in kinds}
outside = {name: [] for name in kinds}
for split in range(4):
    order = torch.randperm(len(progress), generator=torch.Generator().manual_seed(split))
    known, new = order[:300], order[300:]
    scaled = (features - features[known].mean(0)) / features[known].std(0)
    for name, (parameters, price) in kinds.items():
        w = learn(scaled[known], progress[known], parameters, price)
        loss = nwfast.leave_one_out_loss(scaled[known], progress[known], w)
        fit = nwfast.nadaraya_watson(scaled[new], scaled[known], progress[known], w)
        inside[name].append(loss)
        outside[name].append((fit - progress[new]).square().mean())

print("root mean squared error     leave-one-out   new patients")
for name in kinds:
    rms = [torch.stack(losses[name]).mean().sqrt().item() for losses in (inside, outside)]
    print(f"{name:<26}  {rms[0]:>13.1f}   {rms[1]:>12.1f}")

# %%
# Leave-one-out falls with every freedom that it is given, and what it promises for new patients does not come true
# without the price: with a few hundred observations ten bandwidths are fitted to noise, too. With it the metric is
# better on new patients, and says on what: body mass index, blood pressure and two of the blood serum values.

metric = w  # of the last split, at a price
figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
axes.bar(data.feature_names, metric.numpy())
axes.set(ylabel="w, in 1 / deviation", title="What counts for the distance between two patients")
plt.show()
