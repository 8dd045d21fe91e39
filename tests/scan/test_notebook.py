"""A scan in a notebook: a small fragment without scripts, and figures that show the numbers."""

import base64
import io
import json
import re

import numpy as np
import pytest
import xarray as xr

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.colours import COOL, NOTHING, WARM, limits, painted, rgb
from headwise.scan.notebook import png
from tests.scan.models import llama

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife."


@pytest.fixture(scope="module")
def found() -> scan.Scan:
    result = scan.heads(llama(), texts=[TEXT], questions=["sinks", "entropy", "positional_heads", "copy_heads"])
    place = {"stream": ["text"], "layer": [0, 1], "lag": np.arange(1, 6)}
    curve = xr.DataArray(np.arange(10.0).reshape(1, 2, 5), place, ("stream", "layer", "lag"), "curve")
    deep = curve.expand_dims(head=[0, 1, 2, 3]).transpose("stream", "layer", "head", "lag")
    wide = xr.DataArray(np.ones((1, 12, 20)), dims=("stream", "depth", "context"), coords={"stream": ["text"]})
    one = curve.isel(layer=0, drop=True)
    data = result.data.assign(curve=curve, deep=deep, wide=wide, one=one, four=deep.expand_dims(more=[0, 1]))
    about = result.about | {"profiles": ["curve", "deep", "wide", "one", "four"]}
    return scan.Scan(data.assign(about=json.dumps(about)))


def test_a_scan_shows_itself_small_and_without_scripts(found: scan.Scan) -> None:
    page = found._repr_html_()
    assert len(page) < 30_000
    assert "<script" not in page
    assert "http" not in page
    assert page.count("<img") == len(found.about["columns"])
    assert f"{len(found.about['columns']) - 12} more columns" in page
    best = found.top("sinks", 1)
    assert f"L{best['layer'][0]}.H{best['head'][0]} {best['sinks'][0]:.3g}" in page


def test_names_in_the_page_are_escaped(found: scan.Scan) -> None:
    about = found.about
    about["model"]["name"] = about["columns"][0]["title"] = about["columns"][0]["what"] = "<b onload='x'>\""
    page = scan.Scan(found.data.assign(about=json.dumps(about)))._repr_html_()
    assert "<b onload" not in page


def test_the_thumbnail_holds_a_pixel_for_every_head(found: scan.Scan) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = re.search(r"data:image/png;base64,([^']+)'", found._repr_html_())[1]
    pixels = np.asarray(image.open(io.BytesIO(base64.b64decode(picture))))
    assert pixels.shape == (4, 2, 3), "heads down, layers across"
    np.testing.assert_array_equal(pixels, painted(found.data["sinks"].values[0].T))


def test_colours_run_from_the_first_stop_to_the_last() -> None:
    assert painted(np.array([0.0, 1.0])).tolist() == [rgb(COOL[0]), rgb(COOL[-1])]
    assert painted(np.array([np.nan])).tolist() == [rgb(NOTHING)]
    assert painted(np.array([-1.0, 0.0, 2.0])).tolist()[1:] == [rgb(WARM[0]), rgb(COOL[-1])], "zero is the palest"
    assert [limits(np.array(v)) for v in ([0.2, 1.0], [0.9, 1.0], [-1.0, 3.0], [-2.0, -0.5], [5.0, 5.0], [])] == [
        (0, 1), (0.9, 1), (-3, 3), (-2, 0), (5, 6), (0, 1)
    ]  # fmt: skip


def test_a_png_begins_and_ends_as_one() -> None:
    data = png(np.zeros((2, 3, 3), dtype=np.uint8))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"


def test_the_grid_of_a_column_holds_the_scores(found: scan.Scan, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    figure = found.plot("previous")
    (grid, bar) = figure.axes
    np.testing.assert_allclose(grid.images[0].get_array(), found.data["previous"].values[0].T)
    assert (grid.get_xlabel(), grid.get_ylabel()) == ("layer", "head")
    assert bar.get_ylabel() == "share of attention"
    assert figure.get_suptitle() == "Previous token"
    figure.savefig(tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").stat().st_size > 1000


def test_profiles_are_curves_or_maps(found: scan.Scan) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    lines = {name: [line.get_ydata().tolist() for line in found.plot(name).axes[0].lines] for name in ("one", "curve")}
    assert lines == {"one": [[0, 1, 2, 3, 4]], "curve": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]}
    assert len(found.plot("deep").axes[0].lines) == 2, "a curve a layer, the mean of its heads"
    chosen = found.plot("deep", heads=[(1, 2), (0, 0), (1, 1)]).axes[0]
    assert [text.get_text() for text in chosen.get_legend().get_texts()] == ["L1.H2", "L0.H0", "L1.H1"]
    assert found.plot("wide").axes[0].images[0].get_array().shape == (12, 20)
    assert not pyplot.get_fignums(), "nothing is left open"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("beauty",), "no 'beauty' in this scan; columns are sinks"),
        (("sinks", None, "audio"), "known for text; got 'audio'"),
        (("curve", [(0, 1)]), "no value a head; its dims are layer, lag"),
        (("four",), "has dims more, layer, lag"),
    ],
)
def test_what_cannot_be_drawn_is_said(found: scan.Scan, asked: tuple, said: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(HeadwiseError, match=said):
        found.plot(*asked)
