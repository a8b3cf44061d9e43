"""Settings of the documentation build."""

import sys
from pathlib import Path

import nemolet

sys.path.insert(0, str(Path(__file__).parent))
import tree

project = "nemolet"
author = "the nemolet authors"
version = release = nemolet.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence", "deflist"]
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]


def setup(app):  # type: ignore[no-untyped-def]
    """Fill the table of files of today into the page that shows it."""

    def fill(app, name, source):  # type: ignore[no-untyped-def]
        if name == "architecture":
            source[0] = tree.filled(source[0])

    app.connect("source-read", fill)
