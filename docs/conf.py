"""Sphinx settings of the site. `make docs` builds it: no network, neither at the build nor when a page is read."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import nwfast  # noqa: E402

project = "nwfast"
author = copyright = "the nwfast developers"
version = release = nwfast.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "site_parts",
]
exclude_patterns = ["figures", "gallery/**.md5"]

# Pages
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as on GitHub
html_math_renderer = "mathml"
smartquotes = False

# The reference: types are in the docstrings.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_param = False  # names that share a description stay together
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc|obj)", r"(?!nwfast\b).*")]  # of other packages: they are not linked

# The gallery
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "site_parts.reading_order",
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "write_computation_times": False,
    "image_scrapers": ("matplotlib",),
    "abort_on_example_error": True,
}

html_theme = "furo"
html_title = f"nwfast {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
