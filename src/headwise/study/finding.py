"""Finding: what a study measured, what the paper says, and whether that holds here."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.files import replacing

VERDICTS = ("holds", "fails", "untestable")


@dataclass(frozen=True)
class Finding:
    """The result of one study. The last six fields are filled in by whoever runs the study, where it leaves them empty.

    >>> Finding({"loss": 1.5}, expected="below 2", verdict="holds", reason="1.5 is below 2").verdict
    'holds'
    """

    measured: dict[str, Any]
    expected: str
    verdict: str
    reason: str
    model: str = ""
    seeds: Sequence[int] = ()
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise HeadwiseError(f"verdict: wanted one of {', '.join(VERDICTS)}, got {self.verdict!r}.")
        if not self.reason:
            raise HeadwiseError(f"reason: a finding that {self.verdict} needs one sentence that says why, got none.")
        object.__setattr__(self, "measured", plain(self.measured))
        object.__setattr__(self, "seeds", [int(seed) for seed in self.seeds])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Finding:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(cls)}
            return cls(**{name: value for name, value in stored.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise HeadwiseError(f"evidence: {path} is damaged ({error}); run the study again to replace it.") from None


def plain(value: Any) -> Any:
    """The value as JSON holds it: numpy and torch numbers become Python's, arrays lists, what is not finite None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch: scalars as well as arrays
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise HeadwiseError(f"measured: a finding holds numbers, text, lists and dicts, got {type(value).__name__}.")


def hardware() -> str:
    """One line that says on what the study ran."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line = f"{platform.system()} {platform.machine()}, {_cpu()}, {cores} cores"
    return f"{line}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else line


def versions() -> dict[str, str]:
    """The versions a number may depend on."""
    found = {"python": platform.python_version()}
    for package in ("headwise", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that was never installed
            found[package] = "not installed"
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
