"""The documentation site: ``make docs``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, whatever is installed

import varcon_loss  # noqa: E402

project = "varcon-loss"
author = "varcon-loss contributors"
copyright = author
version = release = varcon_loss.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# Pages are Markdown that also reads well where it is not built.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The notebook is kept without outputs and run at each build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_typehints = "none"  # the docstrings give types, shapes and units
autodoc_member_order = "bysource"
default_role = "py:obj"  # single backticks in docstrings name objects
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "params_style")]

copybutton_exclude = ".linenos, .gp, .go"
html_theme = "furo"
html_title = f"varcon-loss {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7cb8f2", "color-brand-content": "#7cb8f2"},
}
