"""The demo's result as one HTML file: no script, no reference to anything outside the file.

Every text is escaped. The page says first what protected the patients and what failed, then what
the network was worth, then what each node said on its own socket.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from p2pfed.report.bars import accuracy_dots

__all__ = ["METHODS", "demo_page"]

METHODS = {
    "alone": "alone",
    "together_gate": "with the gate",
    "together_none": "no privacy",
    "pooled": "pooled",
}

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums;
} th, td { text-align: right; white-space: nowrap; padding: .3rem .5rem;
  border-bottom: 1px solid #8884; } th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
code { overflow-wrap: anywhere; }
.bad { color: #d55e00; font-weight: bold; }
.small { opacity: .75; font-size: .9rem; }
"""


def demo_page(report: Mapping[str, Any]) -> str:
    """Render the demo's report.

    Args:
        report: `task`, `seed`, `privacy`, `failures`, `comparison` (a list with `hospital`,
            `patients` and own/everyone accuracies by method) and `gate` (status by node).

    Returns:
        A standalone HTML document.
    """
    failures = "".join(f'<p class="bad">Failed: {_text(f)}</p>' for f in report["failures"])
    comparison = report["comparison"]
    own = [(one["hospital"], _scores(one, "own")) for one in comparison]
    everyone = [(one["hospital"], _scores(one, "everyone")) for one in comparison]
    pictures = "".join(
        f"<figure>{_svg(accuracy_dots(rows, title=title, subtitle='accuracy'))}</figure>"
        for rows, title in (
            (everyone, "On all hospitals' tests"),
            (own, "On the hospital's own tests"),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>p2pfed demo: {_text(report['task'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Five daemons, one model: {_text(report['task'])}</h1>"
        f"<p>{_text(report['privacy'])}; seed {_text(report['seed'])}.</p>{failures}"
        f"<h2>What the network is worth</h2>{pictures}{_comparison_table(comparison)}"
        '<p class="small">"With the gate" and "no privacy" are the network\'s common models. Alone '
        "and pooled use the same optimiser; their learning rate was chosen on a validation fifth "
        "of the training patients. Pooling is impossible for real hospitals; it is here to "
        "compare.</p>"
        f"<h2>What each node said</h2>{_node_table(report['gate'])}</body></html>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _svg(document: str) -> str:
    return document[document.index("<svg") :]


def _scores(one: Mapping[str, Any], where: str) -> dict[str, float]:
    return {label: one[method][where] for method, label in METHODS.items()}


def _row(cells: Sequence[object], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{_text(c)}</{tag}>" for c in cells) + "</tr>"


def _comparison_table(comparison: Sequence[Mapping[str, Any]]) -> str:
    rows = [_row(("own / all tests", "patients", *METHODS.values()), "th")]
    for one in comparison:
        pairs = [f"{one[m]['own']:.3f} / {one[m]['everyone']:.3f}" for m in METHODS]
        rows.append(_row((one["hospital"], one["patients"], *pairs)))
    return f"<table>{''.join(rows)}</table>"


def _node_table(statuses: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [_row(("node", "model hash", "deltas", "ε spent", "releases", "sent"), "th")]
    for name, status in statuses.items():
        run, spent = status["run"], status["privacy"]
        rows.append(
            "<tr>"
            f"<td>{_text(name)}</td><td><code>{_text(run['model_hash'][:24])}…</code></td>"
            f"<td>{_text(run['deltas'])}</td><td>{spent['spent_epsilon']:.2f}</td>"
            f"<td>{_text(spent['releases'])}</td>"
            f"<td>{status['traffic']['sent_bytes'] / 1000:.0f} kB</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"
