"""Steering 8,192 tokens makes no matrix of queries by keys."""

import json
import subprocess
import sys

import pytest

LENGTH = 8192
MATRIX = LENGTH**2 * 4
"""Bytes of one head's matrix in single precision: 256 MB."""
SCRIPT = """
import json, resource, sys, torch
import headwise as hw
from headwise import steer
from transformers import LlamaConfig, LlamaForCausalLM

n = int(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, max_position_embeddings=n)
opened = hw.open_model(LlamaForCausalLM(config).eval())
ids = torch.randint(3, 60, (1, n))
parts = hw.Segments.from_spans({"first": (0, 1), "span": (100, 900), "other": (900, n - 1), "last": (n - 1, n)}, n)
ways = {
    "bias": [steer.TokenScale(gain=2.0)],
    "emphasis": [steer.Emphasis("span", alpha=0.1)],
    "some heads and queries": [steer.Knockout("span", queries="last"), steer.TokenScale("span", 3.0, heads=((1, 1),))],
    "reweight": [steer.FoundInTheMiddle(("span", "other"), relevance=(0.0, 1.0), queries=None)],
    "gain": [steer.ScaleHeads(gain=0.5)],
    "blend": [steer.SoftInjection(torch.ones(2, 2, 16), torch.full((2, 2), 0.5))],
    "split": [steer.SplitSoftmax("span", tau=0.5)],
    "sinks": [steer.ACT(heads=((0, 1), (1, 0)), threshold=1e-3).prepare, steer.ACT(sinks=((1, 1, (3, 4)),))],
    "shift": [steer.FocusDirections(torch.ones(2, 2, 16))],
    "forced": [steer.ForceAttention((5, 9), heads=((0, 1),))],
    "rule": [steer.PatternMask("offset:-3", heads=((1, 0),), mode="fix"), steer.PatternMask("window:9")],
    "frozen": [steer.FreezeToPositional(((0, 0), (1, 1)), offsets=torch.zeros(2, 4096))],
    "uniform": [steer.UniformMix(heads=((0, 0),))],
    "recompute": [steer.PositionalHiddenScaling(5, layers=(0, 1))],
    "buckets": [steer.AttentionBuckets((1.0, 2.0))],
}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
asked = dict(input_ids=ids, use_cache=False, logits_to_keep=1)
with torch.inference_mode():
    opened.model(**asked)
    found = {"plain": peak()}
    for name, methods in ways.items():
        methods = [m if isinstance(m, steer.Method) else m(opened, {"input_ids": ids}) for m in methods]
        with steer.apply(opened, *methods, segments=parts):
            opened.model(**asked)
        found[name] = peak()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in kilobytes on Linux only")
def test_no_method_makes_the_matrix() -> None:
    """All methods together, one after the other in one process, peak below half of one head's matrix over plain."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(LENGTH)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, peak in found.items():
        assert peak - found["plain"] < MATRIX / 2, f"{name}: {(peak - found['plain']) / 2**20:.0f} MB more than plain"
