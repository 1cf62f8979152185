r"""
Attention with a Gaussian kernel, in a transformer block
========================================================

Softmax attention scores a pair by an inner product, :math:`q \cdot k`; kernel regression by a distance,
:math:`-\tfrac12 \lVert (q - k)\, w \rVert^2`. In a block the second takes the place of the first as it stands: shapes
are those of ``scaled_dot_product_attention``, the (M, N) matrix is built in neither pass, and the width w of each head
is learned with everything else.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional

import nwfast

torch.manual_seed(0)

# %%
# What the two compute
# --------------------
# Multiplied out, :math:`-\tfrac12 \lVert u - v \rVert^2 = u \cdot v - \tfrac12 \lVert v \rVert^2 - \tfrac12 \lVert u
# \rVert^2`, and what is the same for all keys cancels in the softmax. So the kernel is dot-product attention with one
# more feature, which pulls keys of large norm down:

batch, heads, tokens, features = 2, 4, 32, 8
query, key, value = torch.randn(3, batch, heads, tokens, features).unbind()
w = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(heads, 1)  # one a head

kernel = nwfast.nadaraya_watson(query, key, value, w)

u, v = query * w.unsqueeze(-1), key * w.unsqueeze(-1)
with_one = torch.cat([u, torch.ones_like(u[..., :1])], dim=-1)
with_norm = torch.cat([v, -v.square().sum(-1, keepdim=True) / 2], dim=-1)
as_attention = functional.scaled_dot_product_attention(with_one, with_norm, value, scale=1.0)
same = (kernel - as_attention).abs().max().item()
print(f"kernel and attention with the norms of the keys: {same:.1e} apart")

# %%
# Where all keys have the same norm (as after a normalisation of queries and keys), the two are the same without it:

unit = functional.normalize(key, dim=-1)
dot = functional.scaled_dot_product_attention(query * w.unsqueeze(-1) ** 2, unit, value, scale=1.0)
same_unit = (nwfast.nadaraya_watson(query, unit, value, w) - dot).abs().max().item()
print(f"keys of norm 1: {same_unit:.1e} apart")

# %%
# In a block
# ----------


class KernelAttention(nn.Module):
    """Multi-head self-attention whose scores are a Gaussian kernel with a learned width for each head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.log_w = nn.Parameter(torch.full((heads, 1), -0.5 * torch.tensor(width / heads).log().item()))

    def forward(self, x, key_weight=None):
        """Tokens (B, T, width), and weights (B, 1, T) of the keys, 0 for those that may not be seen."""
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nwfast.nadaraya_watson(q, k, v, self.log_w.exp(), key_weight=key_weight)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """The usual block around it: normalise, attend, add; normalise, two layers, add."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = KernelAttention(width, heads)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, key_weight=None):
        """Tokens (B, T, width) in and out."""
        x = x + self.attend(self.before(x), key_weight)
        return x + self.layers(self.after(x))


# %%
# A task for which attention is needed: each sequence holds 16 points of a sine of its own, (x, y), and a last token,
# which knows its x alone and is to say y. There is no such sine in the weights; it has to be read from the sequence.


def sequences(count: int, points: int = 16):
    """Tokens (count, points + 1, 3): x, y and a flag, y hidden in the last; and that y, (count,)."""
    x = torch.rand(count, points + 1) * 4 - 2
    phase, height = torch.rand(2, count, 1) * 3
    y = height * torch.sin(2 * x + 2 * phase)
    asked = torch.zeros_like(x)
    asked[:, -1] = 1.0
    return torch.stack([x, y * (1 - asked), asked], dim=-1), y[:, -1]


model = nn.Sequential(nn.Linear(3, 16), Block(16, 4), Block(16, 4), nn.Linear(16, 1))
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
errors = []
for _step in range(150):
    tokens, wanted = sequences(64)
    optimiser.zero_grad()
    loss = functional.mse_loss(model(tokens)[:, -1, 0], wanted)
    loss.backward()
    optimiser.step()
    errors.append(loss.item())

with torch.no_grad():
    tokens, wanted = sequences(1000)
    error = functional.mse_loss(model(tokens)[:, -1, 0], wanted).item()
    # What can be said of y without a look at the sequence is its mean.
    blind = wanted.var().item()
print(f"squared error on new sequences: {error:.3f}; without the sequence {blind:.3f}")
widths = [block.attend.log_w.detach().exp().flatten().tolist() for block in (model[1], model[2])]
print("w of the heads:", "; ".join(", ".join(f"{width:.2f}" for width in head) for head in widths))

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
axes.plot(errors)
axes.axhline(blind, color="0.6", linestyle="--")
axes.annotate("without the sequence", (len(errors), blind), (0, 4), textcoords="offset points", ha="right")
axes.set(xlabel="step", ylabel="squared error", ylim=(0, None))
plt.show()

# %%
# What it is not: a mask for each pair. ``key_weight`` masks keys for all queries of a sequence (padding, say); a causal
# mask, which differs from query to query, is not there.

with torch.no_grad():
    seen = torch.ones(len(tokens), 1, 17)
    seen[:, :, 8:16] = 0.0  # half of the points hidden
    hidden = model[1].attend(model[0](tokens), seen)
print("with half of the keys left out:", tuple(hidden.shape))
