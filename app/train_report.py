"""The report of a training for people: tables in the terminal, and one page of HTML with plots.

The page needs nothing but itself: no script, no font, no host. It follows the reader's choice of light or dark, and
its plots shrink to the width of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from app.terminal import shown, table, utc

_Points = Sequence[Sequence[float]]

# A plot's place in its viewBox, which the page scales: left and bottom hold the numbers.
WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 340, 240, 44, 36, 10, 10
TICKS = 4

MEANINGS = {
    "auc": "area under the ROC curve",
    "ap": "average precision: area under precision over recall",
    "precision_at_top": "share of positives among the first of a day, by score; mean over days",
    "recall_at_rate": "share of positives found at the false-positive rate of the model file",
    "brier": "mean squared distance of score and label",
    "calibration_error": "how far mean score and share of positives are apart, over ten bins",
    "rows": "events trained on",
    "positives": "of these positive",
    "test_rows": "events of the test that count",
    "test_positives": "of these positive",
    "worst_difference": "of exported and trained scores, on the test and beside thresholds",
}

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #5b6570; --line: #d5dae0;
  --first: #0b62c4; --second: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e6e9ec; --soft: #a3adb8; --line: #363d45;
  --first: #6cb2ff; --second: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
p, figcaption, small { color: var(--soft); } p { margin: .3rem 0; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
figure { margin: 0; } figcaption { font-size: .85rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); fill: none; } .guide { stroke: var(--soft); stroke-dasharray: 3 3; fill: none; }
.first { stroke: var(--first); fill: none; stroke-width: 2; } .bar { fill: var(--first); }
.second { fill: var(--second); } .dot { fill: var(--first); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td:first-child { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""


def show(report: dict[str, Any]) -> None:
    """Print the figures, the decisions and the folds."""
    table(["figure", "value"], [[k, report[k]] for k in MEANINGS])
    table(*_decisions(report))
    if len(report["folds"]) > 1:
        table(*_folds(report))
    table(["", ""], [[k, report[k]] for k in ("version", "path", "seconds") if k in report])


def page(report: dict[str, Any]) -> str:
    """The report as HTML. The same report gives the same text."""
    plots, model = report["plots"], report["model"]
    what = f"{report['pipeline']}: {model['kind']} {report['version']}"
    given = ", ".join(f"{k} {v}" for k, v in model["parameters"].items()) or "the defaults"
    days = [[i, day["precision"]] for i, day in enumerate(report["days"])]
    parts = [
        f"<h1>{escape(what)}</h1>",
        f"<p>Parameters: {escape(given)}; seed {model['seed']}. Definition {report['definition']}.</p>",
        f"<p>Test from {utc(report['split'])} UTC on; labels are known after "
        f"{report['label_delay'] / 86_400_000:g} days.</p>",
        "<h2>Figures</h2>",
        _html(["figure", "value", "meaning"], [[k, report[k], MEANINGS[k]] for k in MEANINGS]),
        "<h2>Decisions</h2>",
        "<p>Of the events that reach a threshold, or a rarer decision's. A threshold is set for its share of the "
        "events trained on.</p>",
        _html(*_decisions(report)),
        '<h2>Plots</h2><div class="plots">',
        _figure("ROC: positives found over false alarms", _line(plots["roc"], guide=True)),
        _figure("Precision over recall", _line(plots["precision_recall"])),
        _figure("Calibration: share of positives over mean score, logarithmic", _calibration(plots["calibration"])),
        _figure("Scores: negatives, and positives in orange, logarithmic", _histogram(plots["histogram"])),
        _figure(f"Precision among the first {model['top']} of each day", _days(days)),
        _figure("Fall of average precision when an input is shuffled", _bars(report["importance"])),
        "</div>",
    ]  # fmt: skip
    if len(report["folds"]) > 1:
        parts += ["<h2>Folds</h2>", _html(*_folds(report))]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(what)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _decisions(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """A column for each decision: narrow enough for a phone."""
    found = report["decisions"]
    rows = [
        [name.replace("_", " "), *(one[name] for one in found)] for name in found[0] if name != "decision"
    ]
    return ["of events that reach it", *(one["decision"] for one in found)], rows


def _folds(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    names = list(report["over_folds"])
    rows = [[utc(fold["split"])[:10], *(fold[name] for name in names)] for fold in report["folds"]]
    over = [
        [which, *(report["over_folds"][name][which] for name in names)] for which in ("mean", "deviation")
    ]
    return ["test from", *(name.replace("_", " ") for name in names)], rows + over


def _html(heads: list[str], rows: list[list[Any]]) -> str:
    def row(tag: str, cells: list[Any], like: list[Any]) -> str:
        return "".join(
            f"<{tag}{' class=n' if isinstance(sample, int | float) else ''}>{escape(shown(cell))}</{tag}>"
            for cell, sample in zip(cells, like, strict=True)
        )

    body = "".join(f"<tr>{row('td', cells, cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><tr>{row("th", heads, rows[0])}</tr>{body}</table></div>'


def _figure(caption: str, svg: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">{svg}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def _axes(x: Callable[[float], str] | None, y: Callable[[float], str]) -> str:
    """Lines and numbers of both axes; x and y tell the number at a share of the length."""
    marks = [f'<path class="axis" d="M{_x(0)} {_y(1)}V{_y(0)}H{_x(1)}"/>']
    for i in range(TICKS + 1):
        share = i / TICKS
        marks.append(f'<text x="{LEFT - 5}" y="{_y(share) + 4}" text-anchor="end">{y(share)}</text>')
        if x is not None:
            marks.append(f'<text x="{_x(share)}" y="{HEIGHT - 18}" text-anchor="middle">{x(share)}</text>')
    return "".join(marks)


def _number(value: float) -> str:
    return f"{value:.2g}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"


def _line(points: _Points, guide: bool = False) -> str:
    path = "L".join(f"{_x(x)} {_y(y)}" for x, y in points)
    diagonal = f'<path class="guide" d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}"/>' if guide else ""
    return f'{_axes(_number, _number)}{diagonal}<path class="first" d="M{path}"/>'


def _calibration(bins: list[dict[str, float]]) -> str:
    """Both axes by powers of ten, down to the smallest share that is above nothing."""
    values = [v for b in bins for v in (b["score"], b["positive"]) if v > 0]
    low = math.floor(math.log10(min(values, default=0.1)))
    low = min(max(low, -6), -1)

    def place(value: float) -> float:
        return 1 - max(math.log10(value), low) / low if value > 0 else 0.0

    def power(share: float) -> str:
        return f"{10 ** (low * (1 - share)):.1g}"

    dots = "".join(
        f'<circle class="dot" r="4" cx="{_x(place(b["score"]))}" cy="{_y(place(b["positive"]))}"/>'
        for b in bins
    )
    return f'{_axes(power, power)}<path class="guide" d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}"/>{dots}'


def _histogram(counts: dict[str, list[int]]) -> str:
    """Counts by powers of ten; positives stand before the negatives."""
    most = math.log10(max(1, *counts["negative"], *counts["positive"]) + 1)
    bars = []
    for name, style in (("negative", "bar"), ("positive", "second")):
        width = 1 / len(counts[name])
        for i, count in enumerate(counts[name]):
            if count:
                top = _y(math.log10(count + 1) / most)
                inset = 0 if name == "negative" else width / 4
                bars.append(
                    f'<rect class="{style}" x="{_x(i * width + inset)}" y="{top}" '
                    f'width="{round(_x(width - 2 * inset) - _x(0) - 0.5, 1)}" height="{round(_y(0) - top, 1)}"/>'
                )
    return _axes(_number, lambda share: _count(10 ** (share * most) - 1)) + "".join(bars)


def _days(points: _Points) -> str:
    """A bar for each day, from the first of the test on."""
    width = 1 / max(1, len(points))
    bars = "".join(
        f'<rect class="bar" x="{_x((i + 0.1) * width)}" y="{_y(share)}" '
        f'width="{round(_x(0.8 * width) - _x(0), 1)}" height="{round(_y(0) - _y(share), 1)}"/>'
        for i, share in points
    )
    return _axes(None, _number) + bars


def _bars(falls: dict[str, float]) -> str:
    """The ten inputs that tell most, with their names."""
    shownfalls = list(falls.items())[:10]
    most = max([fall for _, fall in shownfalls], default=0.0) or 1.0
    step = (HEIGHT - TOP) / 10
    parts = []
    for i, (name, fall) in enumerate(shownfalls):
        width = round(max(0.0, fall) / most * (WIDTH - RIGHT - 60), 1)
        y = round(TOP + i * step, 1)
        parts.append(
            f'<rect class="bar" x="0" y="{y + 12}" width="{width}" height="5"/>'
            f'<text x="0" y="{y + 9}">{escape(name)} {fall:.3f}</text>'
        )
    return "".join(parts)
