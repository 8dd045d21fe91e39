"""Freed memory is kept inside the block, and given back after it: page faults counted in a process of its own."""

import json
import os
import platform
import subprocess
import sys

import pytest

from headwise.attention.memory import CHOSEN

SCRIPT = """
import json, resource, torch
from headwise.attention.memory import kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        held = [torch.ones(3 * 2**20) for _ in range(3)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

with kept():
    torch.ones(3 * 2**23)
    faults()
    inside = faults()
    with kept():
        faults()
    nested = faults()
    grown = resident()
print(json.dumps([inside, nested, grown - resident()]))
"""


def run(**extra: str) -> list[int]:
    env = {name: value for name, value in os.environ.items() if name not in CHOSEN} | extra
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_is_kept_inside_and_given_back_after() -> None:
    inside, nested, given_back = run()
    assert inside < 1000  # ten rounds of three arrays of 3,072 pages fetch 92,160 where nothing is kept
    assert nested < 1000
    assert given_back > 2**26


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_setting_of_the_user_stays() -> None:
    assert run(MALLOC_MMAP_THRESHOLD_="1048576")[0] > 50_000
