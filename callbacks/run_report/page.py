"""One HTML file with everything in it: it loads nothing, and its security policy forbids it to."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_curv.callbacks.run_report.evidence import Finding

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MARKS = {"warning": "!", "advice": "→", "note": "i"}


@dataclass(frozen=True)
class Picture:
    """A figure and what is said of it.

    Args:
        title: above.
        note: below the title.
        figure: of plotly.
    """

    title: str
    note: str
    figure: Figure


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Args:
        title: name of the model.
        subtitle: how the run ended, and when.
        facts: of the run, names and values.
        versions: of packages, in one line.
        findings: in words.
        checked: statements of rules and what came of them.
        curves: series by step.
        maps: layers and steps, by quantity.
        remark: on what is shown.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    versions: str
    findings: Sequence[Finding]
    checked: Sequence[tuple[str, str]]
    curves: Sequence[Picture]
    maps: Sequence[Picture]
    remark: str

    def html(self) -> str:
        """All of it, with the code that draws."""
        from plotly.offline import get_plotlyjs

        figures: dict[str, str] = {}
        body = [self._header(), self._findings(), self._charts(figures), self._maps(figures)]
        data = ",".join(f"{json.dumps(name)}:{figure}" for name, figure in figures.items())
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="color-scheme" content="light dark">',
                f"<title>{_text(self.title)}: curvature report</title>",
                f"<style>{_file('page.css')}</style></head><body><main>",
                *body,
                f"<footer>{_text(self.remark)}<br>{_text(self.versions)}</footer></main>",
                # all of plotly: the page loads nothing
                f"<script>{get_plotlyjs()}</script>",
                f"<script>const FIGURES={{{_safe(data)}}};{_file('page.js')}</script>",
                "</body></html>\n",
            ]
        )

    def _header(self) -> str:
        facts = "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
            for name, value in self.facts
        )
        return (
            f"<header><p class=kind>Curvature report</p><h1>{_text(self.title)}</h1>"
            f"<p class=subtitle>{_text(self.subtitle)}</p><dl>{facts}</dl></header>"
        )

    def _findings(self) -> str:
        items = "".join(
            f'<li class="{finding.kind}">'
            f"<span class=mark aria-hidden=true>{MARKS[finding.kind]}</span>"
            f"<div><h3>{_text(finding.title)}</h3><p>{_text(finding.text)}</p></div></li>"
            for finding in self.findings
        )
        if not items:
            items = "<li class=none><div><p>No rule found anything to remark on.</p></div></li>"
        rules = "".join(
            f"<tr><td>{_text(statement)}</td><td>{_text(outcome)}</td></tr>"
            for statement, outcome in self.checked
        )
        return (
            f"<section><h2>Findings</h2><ul class=findings>{items}</ul><details><summary>The "
            f"{len(self.checked)} rules and what came of them</summary><table>{rules}</table>"
            "</details></section>"
        )

    def _charts(self, figures: dict[str, str]) -> str:
        cards = "".join(_card(picture, _keep(figures, picture.figure)) for picture in self.curves)
        return f"<section><h2>Over the run</h2><div class=grid>{cards}</div></section>"

    def _maps(self, figures: dict[str, str]) -> str:
        if not self.maps:
            return ""
        options = "".join(
            f"<option value={number}>{_text(picture.title)}</option>"
            for number, picture in enumerate(self.maps)
        )
        cards = "".join(
            f"<div class=map{' hidden' if number else ''}>"
            f"{_card(picture, _keep(figures, picture.figure))}</div>"
            for number, picture in enumerate(self.maps)
        )
        choice = f"<label>Show <select id=choice>{options}</select></label>"
        return f"<section><h2>Layers over the run</h2>{choice}{cards}</section>"


def _card(picture: Picture, name: str) -> str:
    note = f"<p>{_text(picture.note)}</p>" if picture.note else ""
    height = int(picture.figure.layout.height)
    return (
        f"<figure class=card><figcaption><h3>{_text(picture.title)}</h3>{note}</figcaption>"
        f'<div class=plot id={name} style="height:{height}px"></div></figure>'
    )


def _keep(figures: dict[str, str], figure: Figure) -> str:
    name = f"plot{len(figures)}"
    figures[name] = figure.to_json()
    return name


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(text)


def _safe(data: str) -> str:
    """No layer's name ends the script."""
    return data.replace("</", "<\\/").replace("<!--", "<\\!--")


POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
