"""The site builds without a warning, has all public names, and no link of the pages is dead; what pages run, runs."""

import doctest
import inspect
import os
import posixpath
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import nwfast
from nwfast import datasets, plotting

DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md")]
RUN = [
    *sorted(DOCS.glob("tutorials/*.md")),
    DOCS / "coming-from.md",
]  # tests/estimators/test_docs.py: estimator.md


def name_of(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """The text of a page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "``", text)


def anchors(page):
    """What GitHub and MyST make of the headings of a page."""
    headings = re.findall(
        r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_relative_link_is_dead(page):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        generated = target == DOCS / "gallery"
        if not (target.exists() or generated) or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_links_are_found():
    assert {"pairs-that-are-left-out", "small-calls"} < anchors(DOCS / "performance.md")
    assert prose(DOCS / "index.md").count("](") > 10


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of a copy of the sources, whose examples do not run."""
    for package in ("sphinx", "myst_parser", "sphinx_gallery", "latex2mathml", "furo"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("gallery", "__pycache__"))
    for name in ("examples", "benchmarks", "ARCHITECTURE.md"):
        (folder / name).symlink_to(ROOT / name)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-D",
        "plot_gallery=0",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "docs", "out"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_has_an_entry(site):
    from sphinx.util.inventory import InventoryFile

    with open(site / "out" / "objects.inv", "rb") as file:
        entries = InventoryFile.load(file, "", posixpath.join)
    found = {name for kind, names in entries.items() if kind.startswith("py:") for name in names}
    names = {f"nwfast.{name}" for name in nwfast.__all__}
    for module in (plotting, datasets):
        public = getattr(module, "__all__", None) or [
            name
            for name, part in vars(module).items()
            if inspect.isfunction(part) and part.__module__ == module.__name__ and not name.startswith("_")
        ]
        names |= {f"{module.__name__}.{name}" for name in public}
    for kind in (nwfast.NadarayaWatsonRegressor, nwfast.NWKernelRegression):
        base = kind.__mro__[1] if kind.__mro__[1].__module__.startswith("nwfast.") else kind
        methods = [name for name, part in vars(base).items() if inspect.isfunction(part) and name[0] != "_"]
        names |= {f"nwfast.{kind.__name__}.{name}" for name in methods}
    assert not names - found


def test_the_site_needs_no_network(site):
    pages = list((site / "out").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', text)
        assert not [address for address in map("".join, loaded) if "//" in address]
    assert (site / "out" / "linear-time.html").read_text().count("<math") > 50


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    monkeypatch.undo()  # with the seeds of the page, whatever NWFAST_TEST_SEED is
    monkeypatch.chdir(tmp_path)
    failed, _ = runpy.run_path(str(DOCS / "figures.py"))["run"](page)
    assert failed == 0


@pytest.mark.parametrize("page", [*RUN, DOCS / "estimator.md"], ids=name_of)
def test_code_that_runs_is_marked_so(page):
    """Blocks of Python begin with a prompt, so that doctest sees them, or show what is no program."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert all(block.startswith(">>> ") for block in blocks)
    assert len(doctest.DocTestParser().get_examples(page.read_text())) >= len(blocks)
