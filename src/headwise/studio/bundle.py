"""One script from the ES modules under assets/, so that the report needs no server and no network.

Each module becomes a function that returns its exports, in the order they need each other. The modules keep to the few
forms of import and export below, which a test holds; nothing else in them is touched."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

ASSETS = files("headwise.studio") / "assets"
IMPORT = re.compile(r'^import (\{[^}]*\}|\* as \w+) from "(\.[^"]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?:async )?(?:function|const|class) (\w+)", re.MULTILINE)
EXPORT_LIST = re.compile(r"export\{([^}]*)\};?\s*$")  # how the minified d3 ends


@cache
def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def script(entry: str) -> str:
    """The modules that `entry` needs, then `entry` itself."""
    order: list[str] = []
    visit(entry, order, ())
    return "\n".join(["'use strict';", *(wrapped(module) for module in order)])


def visit(module: str, order: list[str], above: tuple[str, ...]) -> None:
    if module in above:
        raise ValueError(f"the modules import each other in a circle: {' -> '.join((*above, module))}")
    if module in order:
        return
    for _, target in IMPORT.findall(asset(module)):
        visit(beside(module, target), order, (*above, module))
    order.append(module)


def beside(module: str, target: str) -> str:
    """The path under assets/ of what a module imports."""
    parts: list[str] = []
    for part in (*PurePosixPath(module).parent.parts, *PurePosixPath(target).parts):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def variable(module: str) -> str:
    return "module_" + re.sub(r"\W", "_", module)


def wrapped(module: str) -> str:
    code = asset(module)
    listed = EXPORT_LIST.search(code)
    if listed:
        pairs = [pair.strip().split(" as ") for pair in listed[1].split(",")]
        exports = ", ".join(f"{pair[-1]}: {pair[0]}" for pair in pairs)
        code = EXPORT_LIST.sub("", code)
    else:
        exports = ", ".join(EXPORT.findall(code))
    code = IMPORT.sub(lambda found: taken(found[1], variable(beside(module, found[2]))), code)
    code = EXPORT.sub(lambda found: found[0].removeprefix("export "), code)
    return f"// {module}\nconst {variable(module)} = (() => {{\n{code}\nreturn {{ {exports} }};\n}})();"


def taken(names: str, source: str) -> str:
    if names.startswith("*"):
        return f"const {names.removeprefix('* as ')} = {source};\n"
    return f"const {names.replace(' as ', ': ')} = {source};\n"
