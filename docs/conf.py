"""Sphinx settings of the site. `docs/stage.py` lays out what it reads."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static"

project = "dpo_mini"
author = "the authors of dpo_mini"
copyright = author
html_title = "DPO, derived and checked"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
smartquotes_action = "D"  # dashes alone: what a log says is found as the log says it
nb_execution_mode = "off"  # the committed outputs are what the tests compared
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_heading_slug_func = "stage.anchor"
myst_links_external_new_tab = False
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_static_path = [str(ROOT / "docs" / "_static"), str(MATHJAX)]
mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False
html_show_sphinx = False
html_favicon = "_static/favicon.svg"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False
napoleon_use_param = False


def write_as_rst(app, what, name, obj, options, lines) -> None:
    """Docstrings: $...$ is mathematics, `...` is code, and `Source: ...` is a section."""
    text = "\n".join(lines)
    text = re.sub(r"^(\s*)Source: ", r"\n\1Source:\n\1  ", text, flags=re.M)
    # Code first: what stands between backticks holds no mathematics.
    parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part.strip('`')}``"
        else:
            words = re.split(r"\$([^$]+)\$", part)  # every second one is mathematics
            words[::2] = [word.replace("|", r"\|") for word in words[::2]]
            words[1::2] = [f":math:`{' '.join(word.split())}`\\ " for word in words[1::2]]
            parts[i] = "".join(words)
    lines[:] = "".join(parts).split("\n")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", write_as_rst, priority=400)  # before napoleon
