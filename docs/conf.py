# SPDX-License-Identifier: GPL-2.0-or-later
"""Sphinx's configuration: make docs. Needs neither Salt nor dom0: what the modules import of Salt is mocked."""

import importlib.util
import os
import sys
import types

from sphinx.ext.autodoc.mock import mock

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(_ROOT, "_utils"))

import pullrpc  # noqa: E402


def _load(kind):
    """Import one of Salt's three files of the same name, as ``modules.qvm_remote`` and so on."""
    name = f"{kind}.qvm_remote"
    spec = importlib.util.spec_from_file_location(name, os.path.join(_ROOT, f"_{kind}", "qvm_remote.py"))
    module = importlib.util.module_from_spec(spec)
    # The names that Salt's loader gives a module are looked up when a function is called, and none is called here.
    with mock(["salt"]):
        spec.loader.exec_module(module)
    sys.modules.setdefault(kind, types.ModuleType(kind))
    sys.modules[name] = module


for _kind in ("modules", "states", "engines"):
    _load(_kind)

project = "qvm-remote"
author = "the qvm-remote developers"
release = version = pullrpc.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "diagrams"]
add_module_names = False
autodoc_member_order = "bysource"
html_theme = "alabaster"
html_theme_options = {
    "description": "SSH for dom0, without a network",
    "page_width": "1060px",
    "font_family": "sans-serif",
    "head_font_family": "sans-serif",
    "show_powered_by": False,
}
html_static_path = ["static"]
html_css_files = ["dark.css"]
html_copy_source = False
html_show_copyright = False
