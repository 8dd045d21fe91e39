"""Packages that only some uses need: looked for when used, with a sentence that names the extra to install."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from headwise.errors import HeadwiseError


def need(module: str, extra: str) -> ModuleType:
    """The module, or an error that says how to get it.

    >>> need("json", "analysis").dumps([1])
    '[1]'
    """
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise HeadwiseError(f"This needs {package}, which is not installed: pip install 'headwise[{extra}]'.")
    return import_module(module)
