"""What the commands share in talking to the terminal: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

from rich.console import Console

out = Console()
err = Console(stderr=True)


def print_json(value: Any) -> None:
    """Plain JSON, without colours or wrapping, for the next program in the pipe."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def hush() -> None:
    """Keeps the libraries' own progress bars and notes out of the output; a level chosen in the environment stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def command_line() -> str:
    """The command as it was given, to be copied and run again."""
    return shlex.join(["headwise", *sys.argv[1:]])
