"""`python -m nwfast demo`: the chapter on real output, then the same op on a year of flights and on a map.

No step builds a matrix of all queries and keys: leave-one-out training uses `exclude_self`, and a heatmap shows at most
200 x 200 inputs.
"""

import copy
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, backends, datasets, plotting
from ..backends.messages import how_to_install
from ..functional import nadaraya_watson
from ..nn import NWKernelRegression
from . import airports
from .flights import flights_section
from .report import Figure, Section, Table, as_html, as_text

# The reference holds several matrices of float64 scores; past this many bytes for one, the demo refuses it.
_MOST_REFERENCE_BYTES = 1e9
_BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)  # minutes
_READABLE_BANDWIDTH = 16.0


class DemoError(Exception):
    """The demo cannot run with these options; the message says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run; the defaults are the chapter's."""

    n: int = datasets.CHAPTER_SIZE
    seed: int = 0
    noise: float = 0.5
    epochs: int = 5
    lr: float = 0.5
    w: float | None = None  # start of the training; None: uniform on (0, 1), drawn after the data
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    flights: bool = True
    out: Path = Path("demo-output")

    def check(self) -> None:
        """Raise DemoError on values with which there is nothing to run."""
        if self.n < 2:
            raise DemoError(f"--n must be at least 2 (leave-one-out needs another example), got {self.n}")
        if self.n > 10**9:
            raise DemoError(f"--n must be at most 10**9, got {self.n}")
        if self.epochs < 0:
            raise DemoError(f"--epochs must not be negative, got {self.epochs}")
        if not -(2**63) <= self.seed < 2**64:
            raise DemoError(f"--seed must fit into 64 bits, got {self.seed}")
        largest = torch.finfo(self.dtype).max
        for name in ("noise", "lr"):
            value = getattr(self, name)
            if not 0 <= value <= largest:
                raise DemoError(f"--{name} must be a finite number >= 0, got {value}")
        if self.w is not None and not abs(self.w) <= largest:
            raise DemoError(f"--w must be finite, got {self.w}")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A prediction for the test inputs."""

    name: str
    w: float
    prediction: Tensor  # (m,)
    error: float  # mean squared, against the noiseless truth
    seconds: float


@dataclasses.dataclass(frozen=True)
class Training:
    """One entry an epoch: the loss before its step, and w after it."""

    start: float
    losses: list[float]
    ws: list[float]
    seconds: float


def train(
    net: NWKernelRegression,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 5,
    lr: float = 0.5,
    progress: Callable[[], object] = lambda: None,
) -> Training:
    """Train w as the chapter does: full-batch SGD on the leave-one-out loss, half the squared error, summed.

    The loss is multiplied by 50 / n, which is 1 in the chapter: a sum grows with n, and a learning rate that suits 50
    examples would overshoot with more.

    Parameters
    ----------
    net : NWKernelRegression
        Its parameter is trained in place.
    x, y : Tensor
        (n,) each.
    epochs : int
        Steps.
    lr : float
        Learning rate.
    progress : callable
        Called after each epoch.

    Examples
    --------
    >>> from nwfast import NWKernelRegression, datasets
    >>> data = datasets.chapter(seed=0)
    >>> run = train(NWKernelRegression(w=0.5), data.x_train, data.y_train)
    >>> run.losses[-1] < run.losses[0] / 1.5
    True
    """
    started = time.perf_counter()
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    start, losses, ws = net.w.item(), [], []
    for _ in range(epochs):
        optimiser.zero_grad()
        # The chapter's ((net(x, x, y, exclude_self=True) - y) ** 2 / 2).sum(), with its derivative in one pass.
        loss = net.leave_one_out_loss(x, y, reduction="sum") * (datasets.CHAPTER_SIZE / (2 * len(x)))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        ws.append(net.w.item())
        progress()
    return Training(start, losses, ws, time.perf_counter() - started)


def run(options: Options, *, quiet: bool = False) -> str:
    """Run the demo, write figures and page into ``options.out``, and return the report as text.

    Parameters
    ----------
    options : Options
        What to run.
    quiet : bool
        Show no progress bar.

    Raises
    ------
    DemoError
        The options make no sense, the backend cannot run here, or the directory cannot be written.
    ModuleNotFoundError
        matplotlib or tqdm is not installed.
    """
    started = time.perf_counter()
    options.check()
    name = _backend(options)
    tqdm = _require_packages()
    _prepare(options.out)
    why_no_flights = _why_no_flights(options, name)
    steps = 6 + options.epochs + (0 if why_no_flights else 2 + len(_BANDWIDTHS) + airports.STEPS)
    with tqdm(total=steps, unit="step", file=sys.stderr, disable=quiet) as bar:
        sections = _chapter_sections(options, bar)
        if why_no_flights:
            sections.append(Section("Flights and airports", [f"Left out: {why_no_flights}."]))
        else:
            sections += [
                flights_section(options.dtype, options.backend, _BANDWIDTHS, _READABLE_BANDWIDTH, bar),
                airports.airports_section(options.dtype, options.backend, bar),
            ]
    title = (
        f"nwfast {__version__}: Nadaraya-Watson kernel regression, n = {options.n}, seed {options.seed}, "
        f"{str(options.dtype).removeprefix('torch.')}, backend {name}, {torch.get_num_threads()} threads"
    )
    figures = [figure for section in sections for figure in section.figures]
    page = options.out / "index.html"
    try:
        for figure in figures:
            (options.out / figure.name).write_bytes(figure.png)
        page.write_text(as_html(title, sections), encoding="utf-8")
    except OSError as error:
        raise DemoError(f"cannot write to {options.out}: {error}") from error
    seconds = time.perf_counter() - started
    return (
        f"{as_text(title, sections)}\n\nWrote {page} and {len(figures)} figures beside it in {seconds:.1f} s."
    )


def _backend(options: Options) -> str:
    try:
        name = backends.resolve(options.backend, torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        raise DemoError(str(error)) from error
    matrix = 8.0 * options.n * max(options.n, datasets.CHAPTER_SIZE)
    if name == "reference" and matrix > _MOST_REFERENCE_BYTES:
        raise DemoError(
            f"n = {options.n} is too large for the backend 'reference': it builds the (n, n) matrix, "
            f"{matrix / 1e9:.0f} GB and more than once; see python -m nwfast info for the others"
        )
    return name


def _why_no_flights(options: Options, backend: str) -> str:
    if not options.flights:
        return "--no-flights was given"
    if backend == "reference":
        return "the backend 'reference' builds the matrix of all pairs, 857 GB for 327 346 flights"
    return datasets.why_no_flights()


def _require_packages():
    try:
        import matplotlib.figure  # noqa: F401
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo needs the package {(error.name or '').partition('.')[0]}: {how_to_install('demo')}",
            name=error.name,
        ) from error
    return tqdm


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DemoError(f"cannot write to {out}: {error}") from error


def _chapter_sections(options: Options, bar) -> list[Section]:
    generator = torch.Generator().manual_seed(options.seed)
    data = datasets.chapter(options.n, noise=options.noise, seed=generator, dtype=options.dtype)
    start = options.w
    if start is None:
        start = torch.rand((1,), generator=generator, dtype=torch.float64).item()
    net = NWKernelRegression(w=start, backend=options.backend, dtype=options.dtype)
    bar.set_description("compiling")
    _warm_up(net)
    bar.update()

    def fit(name: str, w: float | Tensor) -> Fit:
        bar.set_description(name)
        started = time.perf_counter()
        with torch.no_grad():
            prediction = nadaraya_watson(data.x_test, data.x_train, data.y_train, w, backend=options.backend)
        seconds = time.perf_counter() - started
        error = (prediction.double() - data.y_truth.double()).square().mean().item()
        bar.update()
        return Fit(name, float(w), prediction, error, seconds)

    average = fit("average pooling", 0.0)
    plain = fit("kernel regression", 1.0)
    bar.set_description("training w")
    training = train(
        net, data.x_train, data.y_train, epochs=options.epochs, lr=options.lr, progress=bar.update
    )
    if not net.w.isfinite().all():
        raise DemoError(
            f"the training diverged to w = {net.w.item()}: try a smaller --lr than {options.lr:g}"
        )
    learned = fit("learned w", net.w.detach())

    bar.set_description("drawing")
    sections = [
        _data_section(options, data),
        _pooling_section(data, average, "average"),
        _pooling_section(data, plain, "nonparametric", _weights(plain.w, data, options)),
        _products_section(options.backend),
    ]
    bar.update()
    sections += [
        _training_section(options, training),
        _pooling_section(data, learned, "learned", _weights(learned.w, data, options)),
        _fits_section([average, plain, learned]),
    ]
    bar.update()
    return sections


def _warm_up(net: NWKernelRegression) -> None:
    """One small call of each kind, so that no time below is that of an import or a just-in-time compiler."""
    x = torch.linspace(0.0, 1.0, 8, dtype=net.w.dtype)
    train(copy.deepcopy(net), x, x, epochs=1)
    with torch.no_grad():
        net(x, x, x)


def _weights(w: float, data: datasets.Chapter, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Weights to draw with the training and the test inputs they belong to, thinned where there are many."""
    keys, queries = plotting.heatmap_inputs(data.x_train, data.x_test)
    net = NWKernelRegression(w=w, backend=options.backend, dtype=options.dtype).requires_grad_(False)
    net(queries, keys, keys)
    return net.attention_weights, keys, queries


# What the pages say.


def _data_section(options: Options, data: datasets.Chapter) -> Section:
    figure = plotting.regression(*data, prediction=None, title="Data: y = 2 sin x + x^0.8 + noise")
    text = (
        f"{len(data.x_train)} training inputs uniform on (0, 5), y = 2 sin x + x^0.8 plus normal noise of standard "
        f"deviation {options.noise:g}; {len(data.x_test)} test inputs from 0 to {data.x_test[-1].item():.4g}."
    )
    return Section(
        "Data set", [text], figures=[_figure("data", figure, "Training data and the noiseless truth.")]
    )


def _fits_section(fits: list[Fit]) -> Section:
    rows = [(fit.name, f"{fit.w:.4f}", f"{fit.error:.4f}", f"{fit.seconds:.4f}") for fit in fits]
    return Section(
        "Test error",
        ["Mean squared error of the predictions at the test inputs against the noiseless truth."],
        [Table(("fit", "w", "test error", "seconds"), rows)],
    )


def _pooling_section(
    data: datasets.Chapter, fit: Fit, name: str, heatmap: tuple[Tensor, Tensor, Tensor] | None = None
) -> Section:
    title = {
        "average": "Average pooling: every weight is 1/n",
        "nonparametric": "Non-parametric attention pooling: w = 1",
        "learned": f"Parametric attention pooling: learned w = {fit.w:.3f}",
    }[name]
    figures = [
        _figure(
            name,
            plotting.regression(*data, prediction=fit.prediction, title=title),
            f"Prediction with w = {fit.w:.4g}; test error {fit.error:.4f}.",
        )
    ]
    if heatmap is not None:
        weights, keys, queries = heatmap
        sharpness = weights.max(-1).values.mean().item()
        thinned = len(keys) < len(data.x_train) or len(queries) < len(data.x_test)
        caption = f"Attention weights; the largest of a row is {sharpness:.3f} on average." + (
            f" Computed for {len(queries)} of the test inputs and {len(keys)} of the training inputs."
            if thinned
            else ""
        )
        drawn = plotting.heatmap(weights, keys, queries, f"Attention weights, w = {fit.w:.3f}")
        figures.append(_figure(f"{name}-weights", drawn, caption))
    return Section(title, figures=figures)


def _products_section(backend: str) -> Section:
    product = torch.bmm(torch.ones(2, 1, 4), torch.ones(2, 4, 6))
    weights, values = torch.full((2, 10), 0.1), torch.arange(20.0).reshape(2, 10)
    averages = torch.bmm(weights.unsqueeze(1), values.unsqueeze(-1))
    pooled = nadaraya_watson(torch.zeros(2), torch.zeros(2, 10), values, w=0.0, backend=backend)

    def numbers(tensor: Tensor) -> str:
        return ", ".join(f"{value:.4g}" for value in tensor.flatten().tolist())

    rows = [
        ("ones (2, 1, 4) x ones (2, 4, 6)", str(tuple(product.shape)), "all " + numbers(product.unique())),
        ("weights 0.1 (2, 1, 10) x values 0..19 (2, 10, 1)", str(tuple(averages.shape)), numbers(averages)),
        ("the same average by the op: w = 0, values (2, 10)", str(tuple(pooled.shape)), numbers(pooled)),
    ]
    text = (
        "(n, a, b) x (n, b, c) gives (n, a, c); with weights in the first factor these are weighted averages."
    )
    return Section("Batched matrix products", [text], [Table(("product", "shape", "values"), rows)])


def _training_section(options: Options, training: Training) -> Section:
    text = [
        f"SGD with learning rate {options.lr:g} on all {options.n} examples at once, in {training.seconds:.3f} s. "
        "Key i is left out for query i: net.leave_one_out_loss(x, y) gives the loss of the chapter's loop and its "
        "derivative in one pass. The loss is half the squared error, summed over the "
        "examples; some editions of the chapter do not halve it, which doubles a step in w."
    ]
    if options.n != datasets.CHAPTER_SIZE:
        text.append(
            f"The sum is multiplied by 50/n = {datasets.CHAPTER_SIZE / options.n:g}, so that the learning rate of the "
            "chapter, which has n = 50, suits this n."
        )
    rows = [("start", "", f"{training.start:.4f}")]
    rows += [
        (str(epoch), f"{loss:.4f}", f"{w:.4f}")
        for epoch, (loss, w) in enumerate(zip(training.losses, training.ws, strict=True), 1)
    ]
    figures = []
    if training.losses:
        drawn = plotting.loss(training.losses, "Leave-one-out loss in training")
        figures = [_figure("loss", drawn, "Loss before the step of each epoch.")]
    return Section("Training of w", text, [Table(("epoch", "loss", "w after"), rows)], figures)


def _figure(name: str, figure, caption: str) -> Figure:
    return Figure(f"{name}.png", plotting.png(figure), caption)
