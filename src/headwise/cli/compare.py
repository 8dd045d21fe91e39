"""`headwise scan --compare A B`: two models, checkpoints or saved scans side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headwise.cli.console import command_line, err, hush, out, print_json
from headwise.cli.texts import chapters, inputs_of
from headwise.files import check_writable, replacing

if TYPE_CHECKING:
    from headwise.models import Opened
    from headwise.scan import Scan
    from headwise.scan.comparison import Comparison


def compare_models(
    one: str, other: str, texts: list[tuple[str, str]], out_file: Path | None, as_json: bool, **asked: Any
) -> None:
    if out_file is not None:
        check_writable(out_file)
    hush()
    from headwise.scan import Scan, heads
    from headwise.scan.comparison import side_by_side

    sides = [open_side(name) for name in (one, other)]
    scans = [
        side
        if isinstance(side, Scan)
        else heads(side, inputs=inputs_of(side, texts), progress=True, command=command_line(), **asked)
        for side in sides
    ]
    with err.status("comparing heads and layers"):
        found = side_by_side(scans, sides, [words for _, words in texts] or chapters(), asked["seed"])
    if out_file is not None:
        with replacing(out_file) as unfinished:
            found.to_html(unfinished)
    if as_json:
        return print_json({"models": list(found.names), "columns": rows(found.summary), "heads": rows(found.heads)})
    _print(found)
    if out_file is not None:
        out.print(f"wrote {out_file}", markup=False, highlight=False, soft_wrap=True)


def open_side(name: str) -> Opened | Scan:
    """A saved scan, by its suffix, or a model."""
    if Path(name).suffix in (".nc", ".zarr"):
        from headwise.scan import Scan

        return Scan.load(name)
    from headwise.models import open_model

    with err.status(f"opening {name}"):
        return open_model(name)


def rows(table: Any) -> list[dict[str, Any]]:
    """Rows as JSON has them: what is not known is null."""
    plain = table.astype(object)
    return plain.where(plain.notna(), None).to_dict("records")


def _print(found: Comparison) -> None:
    first, second = found.names
    table = Table("question", "mean of each", "correlation", "top 10 shared", "changes most", title_justify="left",
                  title=f"{first} and {second}: {len(found.heads)} heads")  # fmt: skip
    for row in found.summary.itertuples():
        change = f"{row.most_changed} [dim]{row.change:+.3f}[/]" if row.most_changed else "-"
        means = f"{row.mean:.3f} [dim]and[/] {row.mean_other:.3f}"
        table.add_row(row.title, means, f"{row.spearman:.2f}", str(row.shared_top10), change)
    out.print(table)
    same = (found.heads["role"] == found.heads["role_other"]).sum()
    out.print(f"Same role: {same} of {len(found.heads)} heads.", highlight=False)
    if "layers" in found.similarity:
        known = found.heads.dropna(subset="similarity")
        line = f"Attention maps: similarity {known['similarity'].mean():.3f} at the same place, "
        out.print(f"{line}{found.heads['best_similarity'].mean():.3f} to the best match anywhere.", highlight=False)
        layers = found.similarity["layers"]
        nearest = ", ".join(
            f"{int(a)}-{int(layers['layer_b'][b])}"
            for a, b in zip(layers["layer_a"], layers.argmax("layer_b").values, strict=True)
        )
        out.print(f"Most alike layers: {nearest}", markup=False, highlight=False)
