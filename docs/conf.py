"""Settings of the documentation build."""

import nemolet

project = "nemolet"
author = "the nemolet authors"
version = release = nemolet.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence", "deflist"]
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]
