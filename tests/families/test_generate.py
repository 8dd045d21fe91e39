"""generate() under `attend`: the same tokens, and readings of prompt and decoding that fold to one sequence."""

import pytest
import torch

import headwise as hw

from .compare import READINGS, agree_folded, own_model
from .family import Family, batch_of, build, recorded
from .table import DISPATCHING

CHOSEN = """
llama mistral gemma2 gemma3_text gemma4_text gpt_oss gpt2 llama4_text cohere2 deepseek_v3 qwen3_next jamba t5 bart
whisper-WhisperForConditionalGeneration llava qwen2_vl paligemma gemma3
""".split()
FAMILIES = [family for family in DISPATCHING if family.id in CHOSEN]
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}
STEPS = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)


def prompt(family: Family, model: torch.nn.Module) -> dict:
    return {name: x for name, x in batch_of(family, model).items() if not name.startswith("decoder_")}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_generation_is_unchanged_and_reads_as_one_sequence(family: Family, cache: str):
    model, eager = own_model(family), build(family)
    batch = prompt(family, model)
    plain = model.generate(**batch, **STEPS, **CACHES[cache])
    with hw.attend(model, readings=READINGS[:-1]) as run:
        watched = model.generate(**batch, **STEPS, **CACHES[cache])
    assert torch.equal(plain, watched)
    assert torch.equal(plain, model.generate(**batch, **STEPS, **CACHES[cache]))
    if cache != "beams":  # beams change places between steps, so their rows are no one sequence
        with recorded(eager) as calls:
            assert torch.equal(plain, eager.generate(**batch, **STEPS, **CACHES[cache]))
        agree_folded(run, calls, batch)


def test_all_chosen_families_are_there():
    assert {family.id for family in FAMILIES} == set(CHOSEN)
