"""A package that is not there is named together with the extra that brings it."""

import json

import pytest

from headwise import HeadwiseError
from headwise.extras import need


def test_a_module_that_is_there_is_given() -> None:
    assert need("json", "analysis") is json
    assert need("importlib.metadata", "analysis").version


def test_a_package_that_is_not_there_is_named_with_its_extra() -> None:
    with pytest.raises(HeadwiseError, match=r"needs no_such_package.*pip install 'headwise\[analysis\]'"):
        need("no_such_package.part", "analysis")


def test_a_part_that_a_package_lacks_is_its_own_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"json\.nothing"):
        need("json.nothing", "analysis")
