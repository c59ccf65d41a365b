"""Charts of a run as figures of plotly; the page gives them the reader's colours."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lightning_curv.callbacks.run_report.course import Series
from lightning_curv.callbacks.run_report.labels import Chart, name_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444")
BAND = ("sample_norm_p5", "sample_norm_p95")
SHADE = "rgba(59, 130, 246, 0.18)"
STEPPED = ("samples", "suggested_batch_size", "learning_rate")
QUIET = "#8b95a5"  # readable on light and dark
SPREAD = 100  # from which ratio on an axis is logarithmic
LEAST_SMOOTHED = 16  # points of a curve that has a running mean
SMOOTH = 25  # points to either side in a running mean, at most
MOST_NAMES = 40  # of layers on an axis
LONGEST = 22  # letters of a layer's name on an axis
EXPONENTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def curves(chart: Chart, series: Mapping[str, Series[float]]) -> Figure:
    """One chart: values pale, their running mean strong; the quantiles of the samples as a band."""
    shown = [name for name in chart.series if name in series]
    band = [name for name in BAND if name in shown]
    lines = [name for name in shown if name not in band] if len(band) == 2 else shown
    figure = _empty(chart.unit)
    if len(band) == 2:
        figure.add_traces(_band(*(series[name] for name in band)))
    for name, colour in zip(lines, _colours(lines), strict=True):
        figure.add_traces(_lines(name, series[name], colour))
    values = [value for name in shown for value in series[name].values]
    if min(values) > 0 and max(values) / min(values) > SPREAD:
        figure.update_yaxes(type="log", **_decades(min(values), max(values)))
    figure.update_layout(showlegend=len(shown) > 1)
    return figure


def _colours(names: Sequence[str]) -> list[str]:
    """The batch of the run is a mark, not a result."""
    rest = iter(COLOURS * (1 + len(names) // len(COLOURS)))
    return [QUIET if name == "samples" else next(rest) for name in names]


def _band(low: Series[float], high: Series[float]) -> list[Scatter]:
    """Two lines that are not seen, and what is between them."""
    # Here, as plotly is optional.
    from plotly.graph_objects import Scatter

    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    filled = {"fill": "tonexty", "fillcolor": SHADE, "name": "5 % to 95 %"}
    return [
        Scatter(x=low.steps, y=low.values, showlegend=False, **edge),
        Scatter(x=high.steps, y=high.values, **edge, **filled),
    ]


def _lines(name: str, series: Series[float], colour: str) -> list[Scatter]:
    """What a reader can point at, and the running mean of what is long."""
    from plotly.graph_objects import Scatter

    steps, values = series.steps, [_digits(value, 6) for value in series.values]
    line: dict[str, Any] = {"color": colour, "width": 2}
    main = Scatter(x=steps, y=values, mode="lines", line=line, name=name_of(name))
    main.hovertemplate = f"step %{{x:,}}<br>{name_of(name)} %{{y:.4g}}<extra></extra>"
    if name in STEPPED:
        main.update(line={"width": 1.5, "shape": "hv"})
        if name == "samples":
            main.update(line={"dash": "dash"})
        return [main]
    if len(values) < LEAST_SMOOTHED:
        main.update(mode="lines+markers", marker={"size": 5})
        return [main]
    # One group: a click in the legend hides both lines.
    main.update(line={"width": 1}, opacity=0.4, showlegend=False, legendgroup=name)
    mean = Scatter(
        x=steps,
        y=[_digits(mean, 6) for mean in smooth(series.values)],
        mode="lines",
        line=line,
        hoverinfo="skip",
    )
    mean.update(name=name_of(name), legendgroup=name)
    return [main, mean]


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over about a twentieth of the points, centred: nothing comes late.

    Example:
        >>> smooth([0.0, 3.0, 3.0, 3.0, 9.0])
        [0.0, 2.0, 3.0, 5.0, 9.0]
    """
    most = min(SMOOTH, max(1, len(values) // 40))
    sums = [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        # Shorter at the ends, but as far to either side: else a trend would be shifted there.
        reach = min(most, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def heat_map(rows: Series[dict[str, float]], layers: Sequence[str]) -> Figure | None:
    """A row per layer, a column per step; `None` if there is nothing to show."""
    from plotly import graph_objects

    columns = rows.values
    layers = [layer for layer in layers if any(layer in column for column in columns)]
    numbers = [[column.get(layer) for column in columns] for layer in layers]
    values = [value for row in numbers for value in row if value is not None]
    if not values:
        return None
    logarithmic = any(value > 0 for value in values) and all(value >= 0 for value in values)
    names = [_plain(layer) for layer in layers]
    shown = [[_logarithm(v) if logarithmic else _digits(v) for v in row] for row in numbers]
    figure = _empty("")
    figure.add_trace(
        graph_objects.Heatmap(
            x=rows.steps,
            y=names,
            z=shown,
            # colours are of logarithms, what the pointer shows is not
            customdata=[[_digits(value) for value in row] for row in numbers],
            colorscale="Viridis" if logarithmic else "RdBu",
            # of two signs: the middle colour is zero
            zmid=None if logarithmic else 0,
            hovertemplate="%{y}<br>step %{x:,}<br>%{customdata:.4g}<extra></extra>",
            colorbar=_colour_bar(shown) if logarithmic else {"thickness": 10, "outlinewidth": 0},
            hoverongaps=False,
        )
    )
    every = -(-len(layers) // MOST_NAMES)
    figure.update_yaxes(
        type="category",
        autorange="reversed",
        showgrid=False,
        ticksuffix="  ",
        tickvals=names[::every],
        ticktext=[_plain(_short(layer, layers)) for layer in layers[::every]],
    )
    figure.update_layout(height=max(220, 90 + 18 * len(layers)), hovermode="closest")
    return figure


def _digits(value: float | None, digits: int = 4) -> float | None:
    """Not more than are seen: long numbers make a large page."""
    return None if value is None else float(f"{value:.{digits}g}")


def _logarithm(value: float | None) -> float | None:
    return round(math.log10(value), 3) if value else None


def _decades(low: float, high: float) -> dict[str, Any]:
    """Ticks of a logarithmic axis, written out where that is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    exponents = range(first, last + 1, max(1, (last - first) // 5))
    return {"tickvals": [10.0**e for e in exponents], "ticktext": [_power(e) for e in exponents]}


def _power(exponent: int) -> str:
    """Of ten.

    Example:
        >>> _power(-2), _power(3), _power(-7)
        ('0.01', '1,000', '10⁻⁷')
    """
    if -4 <= exponent <= 5:
        return f"{10.0**exponent:,.{max(0, -exponent)}f}"
    return f"10{str(exponent).translate(EXPONENTS)}"


def _colour_bar(shown: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Powers of ten, not their exponents."""
    values = [10.0**value for row in shown for value in row if value is not None]
    decades = _decades(min(values), max(values))
    exponents = [math.log10(value) for value in decades["tickvals"]]
    return {**decades, "tickvals": exponents, "thickness": 10, "outlinewidth": 0}


def _plain(name: str) -> str:
    """Not taken for markup by plotly."""
    return html.escape(name, quote=False)


def _short(layer: str, layers: Sequence[str]) -> str:
    """The end of a long name, if it tells layers apart."""
    if len(layer) <= LONGEST:
        return layer
    end = layer[-LONGEST + 1 :]
    return layer if sum(other.endswith(end) for other in layers) > 1 else f"…{end}"


def _empty(unit: str) -> Figure:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    figure.update_layout(
        template="none",
        height=270,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        font={"family": "inherit", "size": 12, "color": QUIET},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    axis = {
        "automargin": True,
        "zeroline": False,
        "ticks": "",
        "gridcolor": "rgba(139,149,165,.22)",
    }
    figure.update_xaxes(title={"text": "optimizer step", "standoff": 8}, showgrid=False, **axis)
    figure.update_yaxes(title={"text": unit, "standoff": 8}, **axis)
    return figure
