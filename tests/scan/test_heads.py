"""`scan.heads` on whole models: against eager attention maps, files, resuming, and what it refuses."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from headwise import scan
from headwise.attention.readings import Top
from headwise.errors import HeadwiseError
from headwise.models import Segments, open_model
from headwise.paper import Paper
from headwise.scan.needles import haystack
from headwise.scan.positional import separators
from tests.scan.models import bert, circuit, llama

WORDS = haystack().split()
TEXTS = [" ".join(WORDS[:130]), " ".join(WORDS[200:280])]
ASKED = ["sinks", "entropy", "distance", "positional_heads"]


def eager(opened: object, text: str) -> np.ndarray:
    """Weights [layer, head, query, key]."""
    opened.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = opened.model(**opened.encode(text), output_attentions=True).attentions
    opened.model.set_attn_implementation("sdpa")
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("make", [llama, bert])
def test_scores_equal_those_of_eager_attention(make: object) -> None:
    opened = make()
    found = scan.heads(opened, texts=TEXTS, questions=ASKED).data.sel(stream="text")
    maps = [eager(opened, text) for text in TEXTS]
    rows = [a.shape[2] for a in maps]

    def mean(values: list[np.ndarray]) -> np.ndarray:
        """Over all queries of all texts."""
        return np.concatenate(values, -1).mean(-1)

    causal = make is llama
    visible = [np.tril(np.ones((n, n))) if causal else np.ones((n, n)) for n in rows]
    alpha = [a.sum(2) / v.sum(0) for a, v in zip(maps, visible, strict=True)]
    away = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in rows]
    marks = [separators(opened, opened.encode(t)).numpy() for t in TEXTS]
    wanted = {
        "sinks": np.mean([a[..., 0] for a in alpha], 0),
        "sink_share": np.mean([a[..., 0] > 0.3 for a in alpha], 0),
        "entropy": mean([-(a * np.log(np.where(a > 0, a, 1))).sum(-1) for a in maps]),
        "distance": mean([(a * d).sum(-1) for a, d in zip(maps, away, strict=True)]),
        "self": mean([np.diagonal(a, axis1=2, axis2=3) for a in maps]),
        "local": mean([(a * (d <= 8)).sum(-1) for a, d in zip(maps, away, strict=True)]),
        "separator": mean([(a * m).sum(-1) for a, m in zip(maps, marks, strict=True)]),
    }
    back = [np.pad(np.diagonal(a, -1, 2, 3), ((0, 0), (0, 0), (1, 0))) for a in maps]
    wanted["previous"] = mean(back)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=2e-5, err_msg=name)


def test_details_split_the_whole_of_every_head() -> None:
    opened = llama()
    found = scan.heads(opened, texts=TEXTS[1], questions=["entropy"])
    length = opened.encode(TEXTS[1])["input_ids"].shape[1]
    assert length <= 128, "all queries are read for the profile, so that it can be compared"
    weights = eager(opened, TEXTS[1])
    away = np.subtract.outer(np.arange(length), np.arange(length))
    profile = found.data["detail_bins"].sel(stream="text")
    assert profile["bin"].values.tolist() == [0, 1, 2, 4, 8, 16, 32, 64][: profile.sizes["bin"]]
    for low in profile["bin"].values:
        inside = (away >= low) & (away < max(2 * low, 1))
        np.testing.assert_allclose(profile.sel(bin=low), (weights * inside).sum(-1).mean(-1), atol=2e-5)
    masses = found.data["detail_mass"].sel(stream="text")
    assert set(masses["segment"].values) == {"first", "separator", "text"}
    np.testing.assert_allclose(masses.sum("segment"), 1, atol=1e-5)


def test_sampled_queries_come_with_an_error_that_holds() -> None:
    opened = llama()
    text = haystack()[:4000]
    whole = scan.heads(opened, texts=text, questions=["entropy"])
    some = scan.heads(opened, texts=text, questions=["entropy"], queries=64, seed=3)
    gap = np.abs(some.data["entropy"] - whole.data["entropy"])
    assert 0 < float(gap.mean()) < 2 * float(some.data["entropy_sem"].mean())
    assert float(some.data["entropy_sem"].mean()) > float(whole.data["entropy_sem"].mean())
    assert "sem" in some.top("entropy", 3)


def test_the_induction_circuit_scores_one_and_its_parts_their_roles() -> None:
    opened = circuit()
    question = scan.InductionHeads(seeds=2, length=6, repeats=4, sequences=2)
    found = scan.heads(opened, texts="Mr. Bennet replied that he had not.", questions=[question, "positional_heads"])
    table = found.heads.set_index("layer")
    np.testing.assert_allclose(table["induction_heads"][1], 1, atol=1e-5)
    assert table["induction_heads"][0] < 0.05
    assert table["previous"][0] > 0.85
    assert table["duplicate_token"][1] < 1e-5
    assert table["role"].tolist() == ["previous token", "induction"]


def test_the_induction_circuit_copies() -> None:
    opened = circuit()
    found = scan.heads(opened, questions=[scan.CopyHeads(seeds=2, length=8)]).heads
    np.testing.assert_allclose(found["copy_heads"][1], 1, atol=1e-5)
    np.testing.assert_allclose(found["copy_weights"][1], 1, atol=1e-4)
    assert found["copy_heads"][0] == -1


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_files_give_back_the_same_scan(suffix: str, tmp_path: object) -> None:
    found = scan.heads(llama(), texts=TEXTS, questions=ASKED)
    path = found.save(tmp_path / f"scan{suffix}")
    again = scan.Scan.load(path)
    xr.testing.assert_identical(found.data, again.data)
    assert again.payload() == found.payload()
    assert found.save(path) == path, "a file is replaced"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_that_are_no_scan_are_refused(tmp_path: object) -> None:
    (tmp_path / "a.nc").write_bytes(b"no netCDF")
    xr.Dataset({"x": 1}).to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    for name, said in (("a.nc", "cannot be read"), ("b.nc", "not a scan"), ("c.nc", "existing"), ("d.txt", "existing")):
        with pytest.raises(HeadwiseError, match=said):
            scan.Scan.load(tmp_path / name)
    with pytest.raises(HeadwiseError, match="ends in"):
        scan.heads(llama(), texts=TEXTS[1], questions=["entropy"]).save(tmp_path / "scan.csv")


def test_the_payload_is_plain_json_with_all_parts() -> None:
    found = scan.heads(llama(), texts=TEXTS, questions=ASKED)
    payload = json.loads(json.dumps(found.payload(), allow_nan=False))
    assert payload["version"] == 1
    assert payload["streams"] == [{"name": "text", "layers": [0, 1], "heads": 4}]
    names = [q["name"] for q in payload["questions"]]
    assert names[:3] == ["sinks", "sink_share", "sinks_any"]
    assert "separator" in names
    for question in payload["questions"]:
        assert {"title", "what", "unit", "threshold", "higher", "paper", "grid", "sem"} <= set(question)
        assert np.shape(question["grid"]["text"]) == (2, 4)
    assert len(payload["details"]) == 8
    assert np.isclose(sum(payload["details"]["text:1:3"]["distance"]["mass"]), 1, atol=1e-3)
    rows = payload["sample"]["rows"]
    assert 2 <= len(rows) <= 8
    assert all(len(r) == len(payload["sample"]["tokens"]) for r in rows.values())
    assert all(j <= i for r in rows.values() for i, pairs in enumerate(r) for j, _ in pairs)
    assert set(np.ravel(payload["roles"]["text"])) <= set(payload["role_rules"])


def test_a_stopped_scan_goes_on_where_it_was(tmp_path: object, monkeypatch: object) -> None:
    opened, path = llama(), tmp_path / "half.nc"
    question = scan.InductionHeads(seeds=4, length=6, repeats=3, sequences=1)
    whole = scan.heads(opened, texts=TEXTS, questions=[question, "entropy"])
    calls = []

    def stop(done: int, total: int, note: str) -> None:
        calls.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan.heads(opened, texts=TEXTS, questions=[question, "entropy"], checkpoint=path, progress=stop)
    assert path.exists()
    with pytest.raises(HeadwiseError, match="another scan"):
        scan.heads(opened, texts=TEXTS[:1], questions=[question, "entropy"], checkpoint=path)
    calls.clear()
    again = scan.heads(
        opened, texts=TEXTS, questions=[question, "entropy"], checkpoint=path, progress=lambda *a: calls.append(a[0])
    )
    assert calls == [0, 3, 4, 5, 6]
    assert not path.exists()
    xr.testing.assert_allclose(again.data.drop_vars("about"), whole.data.drop_vars("about"))


def test_questions_share_passes_and_equal_readings() -> None:
    plan = scan.plan(llama(), texts=TEXTS, questions=ASKED)
    assert len(plan.passes) == len(TEXTS)
    kinds = [type(r).__name__ for r in plan.passes[0].readings]
    assert kinds.count("Entropy") == 1, "the question and the details ask for the same"
    assert "4 questions" in str(plan)
    assert plan.seconds > 0


class Sharpness(scan.Question):
    """A question somebody else wrote, in the fewest lines."""

    paper = Paper("A Title", "0000.00000")
    title, what, unit, higher = "Sharpness", "Mean of the largest weight.", "share", "looks at one token"

    def readings(self, opened: object) -> list[Top]:
        return [Top(1, per="head")]

    def score(self, values: xr.Dataset) -> xr.DataArray:
        return values["top_value"].isel(rank=0)


def test_a_question_of_somebody_else() -> None:
    opened = llama()
    found = scan.heads(opened, texts=TEXTS[0], questions=[Sharpness(), "sinks"])
    np.testing.assert_allclose(found.heads["sharpness"], eager(opened, TEXTS[0]).max(-1).mean(-1).ravel(), atol=1e-5)
    assert found.top("sharpness", 1)["sharpness"][0] == found.heads["sharpness"].max()
    with pytest.raises(HeadwiseError, match="no question 'blur'"):
        found.top("blur")


def test_encoders_get_the_questions_that_fit() -> None:
    found = scan.heads(bert(), texts=TEXTS[1])
    assert set(found.about["questions"]) == set(ASKED)
    assert all("language model" in found.left_out[n] for n in ("induction_heads", "copy_heads", "retrieval_heads"))
    with pytest.raises(HeadwiseError, match="induction_heads needs a decoder-only language model"):
        scan.heads(bert(), texts=TEXTS[1], questions=["induction_heads"])


def test_pictures_get_the_questions_that_fit() -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14)
    opened = open_model(Dinov2Model(config).eval())
    found = scan.heads(opened, inputs={"pixel_values": torch.randn(1, 3, 28, 28)})
    assert found.about["questions"] == ["sinks", "entropy"]
    assert "patches of a picture" in found.left_out["distance"]
    assert "language model" in found.left_out["induction_heads"]
    assert found.heads["entropy"].notna().all()
    assert len(found.heads) == 6
    assert "distance" not in next(iter(found.payload()["details"].values()))
    with pytest.raises(HeadwiseError, match="induction_heads needs a decoder-only language model"):
        scan.heads(opened, questions=[scan.InductionHeads()])


def test_speech_has_a_row_for_every_head_of_every_stream() -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=20, num_mel_bins=8,
        decoder_start_token_id=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    opened = open_model(WhisperForConditionalGeneration(config).eval())
    batch = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.tensor([[1, 5, 6, 7, 8]])}
    found = scan.heads(opened, inputs=[batch])
    assert found.heads.groupby("stream").size().to_dict() == {"audio": 8, "cross": 2, "text": 2}
    table = found.heads.set_index("stream")
    assert table["entropy"].notna().all()
    assert table["distance"]["cross"].isna().all()
    assert table["distance"]["audio"].notna().all()
    assert "induction_heads" in found.left_out
    json.dumps(found.payload(), allow_nan=False)


def test_retrieval_needs_answers_and_says_so() -> None:
    opened = llama()
    question = scan.RetrievalHeads(contexts=(60,), depths=2, max_new=2)
    with pytest.raises(HeadwiseError, match="answered 0 of 6 questions"):
        scan.heads(opened, questions=[question])
    with pytest.raises(HeadwiseError, match="1024 positions"):
        scan.heads(opened, questions=[scan.RetrievalHeads(contexts=(1000,))])
    lenient = scan.heads(llama(max_position_embeddings=512), texts=TEXTS[1])
    assert "512 positions" in lenient.left_out["retrieval_heads"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"texts": TEXTS, "questions": ["sink"]}, "none called 'sink'; there are sinks, entropy"),
        ({"texts": TEXTS, "questions": []}, "one or more different questions"),
        ({"texts": TEXTS, "questions": ["sinks", "sinks"]}, "one or more different questions"),
        ({"texts": TEXTS, "questions": [3]}, "names or Question objects"),
        ({"questions": ["sinks"]}, "give texts="),
        ({"texts": TEXTS, "inputs": TEXTS}, "not both"),
        ({"texts": [""], "questions": ["sinks"]}, "empty"),
        ({"texts": TEXTS, "segments": [Segments.positions(3)]}, "one for each of the 2 inputs"),
        ({"texts": TEXTS[0], "segments": Segments.positions(3)}, "3"),
    ],
)
def test_mistakes_are_named(given: dict, said: str) -> None:
    with pytest.raises(HeadwiseError, match=said):
        scan.heads(llama(), **given)


def test_a_scan_leaves_the_model_as_it_was() -> None:
    opened = llama()
    opened.model.train()
    opened.model.model.layers[1].eval()
    before = {name: module.training for name, module in opened.model.named_modules()}
    scan.heads(opened, texts=TEXTS[1], questions=["entropy"])
    assert before == {name: module.training for name, module in opened.model.named_modules()}
