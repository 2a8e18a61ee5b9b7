"""HTML of the report: escaping, tables, figures and the page. No scripts, no network access."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    anchor: str
    """Fragment of its address; letters and hyphens."""
    title: str
    """Heading, plain text."""
    body: str
    """Finished HTML."""


def text(value: Any) -> str:
    """`value` as escaped text: the only way anything read from a file enters the page."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table of finished cells whose first column names the rows."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table class="{kind}">{header}<tbody>{body}</tbody></table></div>'


def figure(title: str, uri: str, caption: str, *, wide: bool = False) -> str:
    """A chart with heading and caption; the texts are escaped here."""
    style = ' class="wide"' if wide else ""
    return (
        f"<figure{style}><h3>{text(title)}</h3>"
        f'<img src="{uri}" alt="{text(title)}. {text(caption)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def figures(items: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(items)}</div>'


def dot(color: str) -> str:
    """A run's colour as a small disc."""
    return f'<span class="dot" style="background:{color}"></span>'


def page(*, title: str, lead: str, sections: Sequence[Section], left_out: Sequence[str]) -> str:
    """The whole document. `lead` and the bodies are finished HTML, the rest is plain text."""
    links = "".join(f'<a href="#{s.anchor}">{text(s.title)}</a>' for s in sections)
    parts = "".join(
        f'<section id="{s.anchor}"><h2>{text(s.title)}</h2>{s.body}</section>' for s in sections
    )
    notes = "".join(f"<li>{text(note)}</li>" for note in left_out)
    missing = f'<aside><h2>Notes</h2><ul class="notes">{notes}</ul></aside>' if notes else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{_CSS}</style></head><body>"
        f"<header><h1>{text(title)}</h1>{lead}</header><nav>{links}</nav>"
        f"<main>{parts}{missing}</main></body></html>\n"
    )


def count(value: Any) -> str:
    """A whole number: exact below ten million, then with three digits and a unit."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return UNKNOWN if value is None else text(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= max(limit, 1e7):
            return f"{value / limit:.4g} {unit}"
    return f"{value:,.0f}"


def number(value: Any, digits: int = 4) -> str:
    """A measured number to `digits` significant digits."""
    if not isinstance(value, (int, float)):
        return UNKNOWN if value is None else text(value)
    if abs(value) >= 1000 and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 59.5 else "1 min 00 s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return UNKNOWN
    factor, unit = byte_unit(value)
    return (
        f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
    )


def byte_unit(value: float) -> tuple[float, str]:
    """The largest binary unit not above `value`: its bytes and its name."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return 1024.0**power, unit
    return 1.0, "B"


_CSS = """
:root{--ink:#1f2933;--soft:#52606d;--line:#e4e7eb;--paper:#fff;--back:#f5f7fa;--blue:#2563eb}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:3.2rem}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,nav{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:36px;padding-bottom:14px}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:0 0 14px;letter-spacing:-.01em}
h3{font-size:.95rem;margin:0 0 6px}
p{margin:0 0 12px;color:var(--soft);max-width:75ch}
nav{position:sticky;top:0;z-index:1;display:flex;gap:4px 20px;overflow-x:auto;
padding-top:10px;padding-bottom:10px;
background:rgba(245,247,250,.94);border-bottom:1px solid var(--line);font-size:.9rem}
nav a{color:var(--soft);text-decoration:none;white-space:nowrap}
nav a:hover{color:var(--blue)}
section,aside{background:var(--paper);border:1px solid var(--line);border-radius:12px;
padding:22px 24px;margin:18px 0}
.chips{display:flex;flex-wrap:wrap;gap:6px 18px;color:var(--soft);font-size:.95rem}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;
margin-bottom:20px}
.card{background:var(--back);border-radius:10px;padding:12px 14px}
.card b{display:block;font-size:1.3rem;line-height:1.35;font-weight:650;letter-spacing:-.01em;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.card span{display:block;font-size:.82rem;color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));
gap:26px 28px}
figure{margin:0;min-width:0}
figure.wide{grid-column:1/-1}
figure img{display:block;width:100%;height:auto}
figcaption{font-size:.85rem;color:var(--soft);margin-top:4px}
.scroll{overflow-x:auto;margin-bottom:8px}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:50%}
th,td{text-align:left;padding:6px 18px 6px 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:break-word}
.halves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:0 40px}
.halves .scroll{margin:0}.halves table{width:100%;table-layout:fixed}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:500;color:var(--soft);min-width:11em}
tr:last-child>*{border-bottom:0}
td.best,b.best{color:#2b8a3e}
.good{color:#2b8a3e;font-weight:600}.bad{color:#c92a2a;font-weight:600}
.settings{columns:3 320px;column-gap:28px}
.settings div.group{break-inside:avoid;margin-bottom:16px}
.settings table{min-width:100%;font-size:.85rem}
.settings th,.settings td{padding:3px 12px 3px 0;overflow-wrap:anywhere}
.settings tbody th{min-width:0;width:55%}
details{margin-top:8px}
summary{cursor:pointer;color:var(--blue);font-size:.9rem;margin-bottom:10px}
.notes{margin:0;padding-left:1.2em;color:var(--soft);font-size:.9rem}
@media (max-width:640px){header,main,nav{padding-left:14px;padding-right:14px}
section,aside{padding:16px 14px;border-radius:10px}h1{font-size:1.4rem}
.cards{grid-template-columns:repeat(2,1fr)}.card b{font-size:1.15rem}tbody th{min-width:8em}}
@media print{nav{display:none}body{background:#fff}section,aside{border:0;padding:8px 0}
figure{break-inside:avoid}}
"""
