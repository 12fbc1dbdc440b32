"""The documentation site: `sphinx-build -W docs build/site`, with the `docs` extra installed."""

import jax_nsa

project = "jax_nsa"
author = "The jax_nsa authors"
release = version = jax_nsa.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["journal"]  # experiments: for those who change kernels, not for users
html_theme = "furo"
html_title = f"jax_nsa {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links from pages to source files of the repository

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have shapes and dtypes, which say more
napoleon_google_docstring = True
napoleon_numpy_docstring = False
