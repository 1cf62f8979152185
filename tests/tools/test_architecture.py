"""ARCHITECTURE.md names what is there."""

import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "ARCHITECTURE.md").read_text()
PATHS = sorted(set(re.findall(r"`((?:csrc|nwfast|tests|benchmarks|docs)/[\w./-]+)`", PAGE)))
# `name` in `path`, as the page says where something is.
NAMES = sorted(set(re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/]+\.\w+)`", PAGE)))


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "path"), NAMES)
def test_every_name_is_where_the_page_says(name, path):
    assert re.search(rf"\b{name}\b", (ROOT / path).read_text())


def test_the_page_was_read():
    assert len(PATHS) > 40
    assert len(NAMES) > 4
