"""The command line. One file a command; whatever is heavy (torch, transformers) is imported inside the commands.

Exit codes: 0 done; 1 done, and the answer is "no" (`doctor` found a layer out of reach, a study's claim fails);
2 a mistake the caller can act on, told in one sentence.
"""

from __future__ import annotations

import sys

import typer

from headwise.cli.doctor import doctor
from headwise.cli.generate import generate
from headwise.cli.models import app as models
from headwise.cli.patterns import app as patterns
from headwise.cli.scan import scan
from headwise.cli.steer import app as steer
from headwise.cli.study import app as study
from headwise.cli.swap import app as swap
from headwise.errors import HeadwiseError

app = typer.Typer(
    name="headwise",
    help="Scan, steer, swap and study the attention heads of any model, at the speed of flash attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(scan)
app.command()(doctor)
app.command()(generate)
app.add_typer(models)
app.add_typer(patterns)
app.add_typer(steer)
app.add_typer(study)
app.add_typer(swap)


def main() -> None:
    """The entry point: a mistake becomes one line on stderr and exit code 2."""
    try:
        app()
    except HeadwiseError as error:
        print(f"headwise: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
