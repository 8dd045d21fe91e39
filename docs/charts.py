"""Charts of the stored GPU runs as SVG, drawn from the numbers in the JSON and nothing else."""

from html import escape

COLOURS = ("#1f6f8b", "#99a8b2", "#e1a948", "#c8553d", "#6b8f47", "#7b5ea7", "#3d5a80")
ROW, GAP, LEFT, WIDTH, RIGHT, TOP = 17, 14, 290, 400, 80, 64
MOST = 3.0
"""Where the axis ends; longer bars are cut there, with their number beside them."""
KERNELS = (
    "cudnn", "flash", "flex, no statistics", "fused, no statistics", "fused, 16 masses + entropy", "fused, with biases",
    "portable, 16 masses + entropy + distance + top", "eager with statistics",
)  # fmt: skip


def charts(run):
    """Name -> SVG for a stored run; nothing for runs of another kind."""
    rows, device = [row for row in run.get("rows", []) if "case" in row], run.get("device", "")
    found = {}
    kernels = grouped([r for r in rows if r.get("shape") == "llama-8b" and r["case"] in KERNELS], "against_cudnn")
    if kernels:
        title = f"Attention of 32 heads, 8 key-value heads, D = 128, causal, on one {device}"
        found["kernels"] = bars(title, "time, as a multiple of cuDNN's without statistics", kernels)
    model = grouped([r for r in rows if "shape" not in r and r["case"].startswith("prefill")], "against_plain")
    if model:
        title = f"Prefill of a model of Llama-3.1-8B's shape on one {device}"
        found["prefill"] = bars(title, "time, as a multiple of the plain model's", model)
    decoding = grouped([r for r in rows if "shape" not in r and r["case"].startswith("decode")], "against_plain")
    if decoding:
        title = f"Decoding with a model of Llama-3.1-8B's shape on one {device}"
        found["decode"] = bars(title, "tokens a second, as a multiple of the plain model's", decoding)
    return found


def grouped(rows, value):
    """[(tokens, [(case, value or why it failed)])]"""
    groups = {}
    for row in rows:
        if value in row or "failed" in row:
            groups.setdefault(row["tokens"], []).append((row["case"], row.get(value, row.get("failed"))))
    return [(f"{tokens:,} tokens", cases) for tokens, cases in groups.items()]


def bars(title, axis, groups):
    """Horizontal bars in groups, with a line at 1."""
    cases = list(dict.fromkeys(case for _, group in groups for case, _ in group))
    height = TOP + sum(len(group) * ROW + GAP + ROW for _, group in groups) + 34
    width, one, end = LEFT + WIDTH + RIGHT, LEFT + WIDTH / MOST, height - 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="24" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="42" fill="#555">{escape(axis)}</text>',
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{TOP - 8}" y2="{end}" stroke="#222" stroke-dasharray="3 3"/>',
        f'<text x="{one:.1f}" y="{end + 14}" text-anchor="middle">1</text>',
    ]
    y = TOP
    for name, group in groups:
        out.append(f'<text x="12" y="{y + 10}" font-weight="bold">{escape(name)}</text>')
        y += ROW
        for case, value in group:
            out.append(f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(case)}</text>')
            if isinstance(value, str):
                out.append(f'<text x="{LEFT + 4}" y="{y + 11}" fill="#a33">{escape(value)}</text>')
            else:
                long = min(value, MOST) / MOST * WIDTH
                colour = COLOURS[cases.index(case) % len(COLOURS)]
                out.append(f'<rect x="{LEFT}" y="{y + 1}" width="{long:.1f}" height="{ROW - 4}" fill="{colour}"/>')
                number = f"{value:.0f} (cut)" if value > MOST else f"{value:.3f}"
                out.append(f'<text x="{LEFT + long + 4:.1f}" y="{y + 11}">{number}</text>')
            y += ROW
        y += GAP
    out.append("</svg>")
    return "\n".join(out) + "\n"
