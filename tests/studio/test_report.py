"""The page: safe whatever the data says, loads nothing, not too large."""

import base64
import hashlib
import json
import re

import pytest

from headwise.errors import HeadwiseError
from headwise.studio import render_report, write_report
from headwise.studio.bundle import ASSETS, asset, script
from tests.studio.synthetic import payload

HOSTILE = "</script><script>window.pwned = 1</script><!--<script>\u2028&amp;\"'`${window.pwned = 1}"
PAGE = render_report(payload(3, 4))


def data_in(page):
    return re.search(r'<script type="application/json" id="headwise-data">(.*?)</script>', page, re.DOTALL)[1]


def test_the_data_come_back_unchanged():
    given = payload(3, 4)
    found = json.loads(data_in(render_report(given)))
    assert found["questions"][0]["grid"] == given["questions"][0]["grid"]
    assert found["sample"]["rows"] == given["sample"]["rows"]


def test_hostile_text_stays_text():
    given = payload(3, 4)
    given["model"]["name"] = given["command"] = given["questions"][0]["title"] = HOSTILE
    given["sample"]["tokens"][0] = HOSTILE
    given["role_rules"][HOSTILE] = HOSTILE
    page = render_report(given)
    assert page.count("</script>") == PAGE.count("</script>")
    assert page.count("<script") == PAGE.count("<script")
    assert not set("<>&\u2028") & set(data_in(page))
    assert json.loads(data_in(page))["command"] == HOSTILE
    assert "<title>&lt;/script&gt;" in page


def test_nothing_is_loaded():
    code = PAGE.replace(data_in(PAGE), "")
    assert re.findall(r'\b(?:src|srcset|href|action|poster)="([^"]*)"', code) == ["data:,"]
    assert not re.search(
        r"@import|url\(\s*['\"]?(?!#)\w|\bfetch\(|XMLHttpRequest|importScripts|\bimport\(|new Worker", code
    )
    assert "default-src 'none'" in code


@pytest.mark.parametrize(("directive", "tag"), [("script-src", "<script>"), ("style-src", "<style>")])
def test_the_policy_lets_this_script_and_style_run(directive, tag):
    text = re.search(rf"{tag}(.*?)</{tag[1:]}", PAGE, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"{directive} 'sha256-{digest}'" in PAGE


def test_the_file_stays_small():
    assert len(render_report(payload(30, 9)).encode()) < 600_000
    assert len(PAGE) - len(data_in(PAGE)) < 150_000


def test_the_file_is_written_whole_or_not_at_all(tmp_path):
    path = write_report(payload(2, 2), tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    before = path.read_bytes()
    with pytest.raises(HeadwiseError):
        write_report({"version": 1}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(HeadwiseError, match="does not exist"):
        write_report(payload(2, 2), tmp_path / "nowhere" / "report.html")


def test_every_module_fits_the_bundler():
    code = script("report.js")
    modules = [file.name for file in ASSETS.iterdir() if file.name.endswith(".js")]
    for name in modules:
        assert f"// {name}\n" in code, f"{name} is not used"
        assert "export default" not in asset(name)
    assert not re.search(r"^(import|export)\b", code, re.MULTILINE)


def test_text_is_readable_on_its_ground():
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for marks, in both themes."""
    light, dark = re.findall(r"\.hw(?:\[data-theme=\"dark\"\])? \{\n(.*?)\n\}", asset("report.css"), re.DOTALL)[:2]
    for block in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for ground in ("paper", "panel", "wash"):
            for text in ("ink", "muted", "accent"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        marks = ["focus", "bar", "strong-line", *(name for name in colours if name.startswith("role-"))]
        for mark in marks:
            assert contrast(colours[mark], colours["panel"]) >= 3, mark


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
