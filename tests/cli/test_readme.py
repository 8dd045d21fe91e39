"""What README and the documentation say is run here, as it stands there."""

import ast
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import headwise as hw
from headwise import scan

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SLOW = "headwise scan"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands():
    lines = [line.strip() for block in blocks(README, "console") for line in block.splitlines() if line.strip()]
    return [pytest.param(line, marks=[pytest.mark.slow] if line.startswith(SLOW) else []) for line in lines]


@pytest.mark.zoo
@pytest.mark.parametrize("command", commands())
def test_readme_command(command, tmp_path):
    words = shlex.split(command)
    if words[0] == "make":  # `make test` is running now, and `make scan` is the main job of .ci/run: are they there?
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    else:
        assert words[0] == "headwise"
        words = [sys.executable, "-m", *words]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag, name in pairwise(words):
        if flag in ("--out", "--save"):
            assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.zoo
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_in_order(page):
    source = "\n".join(blocks(page, "python"))
    exec(compile(source, str(page), "exec"), {"__name__": "example"})


def test_calls_about_a_readers_own_texts_fit_the_signatures():
    """Pages of the scan room speak of texts and models that only the reader has: their calls can be read, not run."""
    bound = 0
    for page in sorted((ROOT / "docs" / "scan").glob("*.md")):
        for node in ast.walk(ast.parse("\n".join(blocks(page, "python")))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="scan" | "hw" as room), attr=name)):
                    called = getattr({"scan": scan, "hw": hw}[room], name)
                    inspect.signature(called).bind(*node.args, **{word.arg: word.value for word in node.keywords})
                    bound += 1
    assert bound > 30


@pytest.mark.zoo
def test_the_question_in_thirty_lines(capsys):
    path = ROOT / "docs" / "examples" / "own_question.py"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 30
    runpy.run_path(str(path), run_name="__main__")
    assert "punctuation_heads" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
