"""Density of attention rows against their formulas, and a method that makes them denser."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwise import attend, scan, steer
from headwise.attention import HeadOutput, Inputs, Map
from headwise.errors import HeadwiseError
from tests.scan.models import bert, llama

TEXT = "the old man went to the river and the water was cold"


@pytest.mark.parametrize("make", [llama, bert])
def test_equals_the_formulas(make):
    opened = make()
    found = scan.heads(opened, texts=[TEXT], questions=[scan.Density()]).heads.set_index(["layer", "head"])
    with torch.no_grad(), attend(opened, readings=[Map()]) as run:
        opened.model(**opened.encode(TEXT))
    maps = torch.as_tensor(run.tree["text"].dataset["map"].values).double().reshape(2, 4, -1)
    n = int(maps.shape[-1] ** 0.5)
    for layer in range(2):
        for head in range(4):
            density, slope = [], []
            for i, a in enumerate(maps[layer, head].view(n, n)):
                keys = i + 1 if make is llama else n
                if keys > 1:
                    a = a[:keys]
                    density.append(torch.special.entr(a).sum() / np.log(keys))
                    slope.append((torch.diag(a) - torch.outer(a, a)).norm())
            row = found.loc[(layer, head)]
            assert row["density"] == pytest.approx(float(torch.stack(density).mean()), abs=1e-5)
            assert row["dense_rows"] == pytest.approx(float((torch.stack(density) > 0.9).double().mean()))
            assert row["softmax_slope"] == pytest.approx(float(torch.stack(slope).mean()), abs=1e-5)


def test_uniform_mix_is_the_mean_value_at_one_and_nothing_at_zero():
    opened = bert()
    inputs = opened.encode(TEXT)
    with torch.no_grad():
        plain = opened.model(**inputs)[0]
        with steer.apply(opened, steer.UniformMix(lam=0.0)):
            assert torch.equal(opened.model(**inputs)[0], plain)
        readings = [HeadOutput(what="vector"), Inputs(what=("v",))]
        with attend(opened, readings=readings, edits=steer.UniformMix(lam=1.0).edits(opened)) as run:
            opened.model(**inputs)
    values = run.tree["text"].dataset
    mean = values["input_v"].mean("key")
    np.testing.assert_allclose((values["head_output"] - mean).values, 0, atol=1e-5)


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"at least 1 row of the map; got 0"):
        scan.Density(rows=0)
    with pytest.raises(HeadwiseError, match=r"between 0 and 1; got 1.5"):
        steer.UniformMix(lam=1.5)
