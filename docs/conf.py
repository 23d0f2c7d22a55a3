"""The site: `make docs` builds it into build/docs, without a network, warnings being errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mambavision import __version__ as release  # noqa: E402

project, html_title = "mambavision-triton", f"mambavision-triton {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|nn|os|collections|typing|Tensor|PathLike|Any)\b.*")]

html_theme = "furo"
html_copy_source = html_show_sphinx = html_show_copyright = False
highlight_language = "none"
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0e7c86", "color-brand-content": "#0e7c86"},
    "dark_css_variables": {"color-brand-primary": "#5cc4cd", "color-brand-content": "#5cc4cd"},
}

myst_heading_anchors = 3
# In docstrings, backticks hold code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88


def _formulas(app, what, name, obj, options, lines):
    """What a docstring indents after a blank line keeps its lines."""
    for i in range(len(lines) - 1, 0, -1):
        if lines[i].startswith("    ") and not lines[i - 1].strip():
            above = next((line for line in lines[i - 1 :: -1] if line.strip()), "")
            if not above.startswith((" ", ">>>")):
                lines[i:i] = ["::", ""]


def setup(app):
    app.connect("autodoc-process-docstring", _formulas)
