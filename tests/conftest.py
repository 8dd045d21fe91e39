"""The markers of the tests. Plain `pytest` leaves out `slow` and `gpu`; `make test-all` runs all this machine can."""

import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported, by whatever test that happens to be: its kernels then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

MARKERS = {
    "slow": "takes more than half a minute, or measures time: run by `make test-all`, not by `make test`",
    "zoo": "uses a real model of the zoo, fetched and converted at first use (about 100 MB each)",
    "gpu": "needs a CUDA device",
    "browser": "clicks in headless Chromium (Debian: chromium, chromium-driver); skipped where there is none",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("browser") and not browser:
            item.add_marker(pytest.mark.skip(reason="no Chromium: apt-get install chromium chromium-driver"))
