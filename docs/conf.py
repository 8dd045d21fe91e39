"""The documentation: `make docs` builds it with warnings as errors, some tables from the code and the evidence."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "headwise"
author = "The headwise authors"
project_copyright = "The headwise authors, Apache-2.0"
version = release = installed("headwise")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.intersphinx", "sphinx_copybutton"]
intersphinx_mapping = {}  # builds must not depend on the network
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated", "examples"]
html_theme = "furo"
html_title = "headwise"
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
suppress_warnings = ["autodoc.mocked_object"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show them already in words; jaxtyping's shapes make them unreadable as types
autodoc_default_options = {"members": True, "undoc-members": False}
copybutton_exclude = ".linenos, .gp, .go"


def docstring_to_rst(app, what, name, obj, options, lines):
    """Our docstrings are plain text with `code` in backticks and indented examples: say so in reStructuredText."""
    result, text, previous = [], [], ""
    for line in lines:
        example = line.startswith("    ") and not previous.strip() and not line.strip().startswith((">>>", "..."))
        if line.startswith(("    ", ">>>")):
            result += prose(text)
            text = []
            if example and (not result or not any(r.startswith("    ") for r in result[-2:])):
                result += ["::", ""]
            result.append(line)
        else:
            if line.startswith("- ") and previous.strip() and not previous.startswith(("- ", "  ")):
                text.append("")  # a list begins after a blank line
            text.append(line)
        previous = line
    lines[:] = result + prose(text)


def prose(lines):
    """Code in backticks, which may go on over a line's end, as literals; what else means something, escaped."""
    parts = re.split(r"(`+[^`]*`+)", "\n".join(lines))
    parts = [f"``{p.strip('`')}``" if p.startswith("`") else re.sub(r"([*|_\\])", r"\\\1", p) for p in parts]
    return "".join(parts).split("\n") if lines else []


def setup(app):
    import generate

    app.connect("autodoc-process-docstring", docstring_to_rst)
    app.connect("builder-inited", lambda app: generate.write(HERE / "_generated"))
