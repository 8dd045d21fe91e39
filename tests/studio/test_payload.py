"""A payload that does not fit is refused in one sentence that names the field; a bare one is drawn."""

import copy

import pytest

from headwise.errors import HeadwiseError
from headwise.studio import render_report
from tests.studio.synthetic import payload

SMALL = payload(2, 3)
BARE = {
    "version": 1,
    "model": {"name": "bare"},
    "streams": [{"name": "text", "layers": [0], "heads": 2}],
    "questions": [{"name": "sinks", "grid": {"text": [[0.5, None]]}}],
}


def changed(path, value):
    found = copy.deepcopy(SMALL)
    part = found
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    return found


WRONG = [
    (("version",), 2, "payload.version"),
    (("model", "name"), "", "payload.model.name"),
    (("streams",), [], "payload.streams"),
    (("streams", 0, "heads"), 0, "payload.streams[0].heads"),
    (("questions",), [], "payload.questions"),
    (("questions", 1, "grid", "text", 0, 2), float("nan"), "payload.questions[1].grid.text[0][2]"),
    (("questions", 1, "grid", "text", 0, 2), "much", "payload.questions[1].grid.text[0][2]"),
    (("questions", 1, "grid", "text"), [[0.1, 0.2, 0.3]], "questions['entropy'].grid['text'] has 1 layers"),
    (("questions", 1, "sem", "text", 1), [0.1] * 4, "questions['entropy'].sem['text'][1] has 4 heads"),
    (("questions", 1, "grid"), {"sound": [[0.1]]}, "questions['entropy'].grid['sound']: there is no such stream"),
    (("questions", 1, "name"), "sinks", "questions: the name 'sinks' is there twice"),
    (("questions", 0, "paper"), {"title": "t", "arxiv": 'x"><script>'}, "payload.questions[0].paper.arxiv"),
    (("roles", "text"), [["sink"] * 3], "roles['text'] has 1 layers"),
    (("details", "text:2:0"), {}, "details['text:2:0'] names no head"),
    (("details", "text:0:0", "distance", "edges"), [0, 1], "payload.details['text:0:0'].distance: 2 edges"),
    (("details", "text:0:0", "segments", "names"), [], "payload.details['text:0:0'].segments: 0 names"),
    (("sample", "rows"), {"text:0:0": [[[0, 1.0]]]}, "payload.sample: rows['text:0:0'] has 1 rows"),
    (("sample",), {"tokens": ["a"], "rows": {"text:0:0": [[[5, 1.0]]]}}, "points behind the last of 1 tokens"),
    (("sample",), {"tokens": ["a"], "rows": {"text": [[[0, 1.0]]]}}, "sample.rows['text'] names no head"),
    (
        ("matrices",),
        [{"title": "t", "row_names": ["0"], "column_names": ["0", "1"], "values": [[1.0]]}],
        "payload.matrices[0]: the values do not fit 1 rows and 2 columns",
    ),
]


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=[words for _, _, words in WRONG])
def test_a_bad_field_is_named(path, value, words):
    with pytest.raises(HeadwiseError) as error:
        render_report(changed(path, value))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["version", "model", "streams", "questions"])
def test_a_missing_field_is_named(field):
    with pytest.raises(HeadwiseError, match=rf"payload\.{field}: Field required"):
        render_report({key: value for key, value in SMALL.items() if key != field})


@pytest.mark.parametrize("given", [None, [], "payload", 3])
def test_what_is_no_payload_is_refused(given):
    with pytest.raises(HeadwiseError, match="payload: "):
        render_report(given)


def test_a_bare_payload_is_enough():
    assert "bare: attention heads" in render_report(BARE)


@pytest.mark.parametrize(
    "part", ["created", "tokens", "command", "roles", "role_rules", "details", "sample", "left_out"]
)
def test_every_optional_part_may_be_missing(part):
    render_report({key: value for key, value in SMALL.items() if key != part})
