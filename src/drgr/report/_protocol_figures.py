"""Charts of the protocol: the worst case against its radius, and losses by token frequency."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._protocol_records import ProtocolRecord
from drgr.report._style import ACCENT, NEUTRAL, SeriesStyle, empty_figure, plain, rounded

_POOLED = SeriesStyle(
    key="protocol-pooled",
    label="all domains",
    colour=NEUTRAL,
    dash="solid",
    symbol="circle",
    pattern="",
)


def robust_curve(record: ProtocolRecord) -> Chart:
    """Draws the worst case over target mixtures against the radius of their set."""
    robust = record.robustness
    style = SeriesStyle(
        key="protocol-robust",
        label="worst case",
        colour=ACCENT,
        dash="solid",
        symbol="circle",
        pattern="",
    )
    name = robust.divergence or "divergence"
    figure = empty_figure(x_title=f"radius ({plain(name)})", y_title="bits per byte")
    is_drawn = _add_line(figure, robust.radii, robust.values, style)
    for value, label in ((robust.mean, "mean"), (robust.worst, "worst domain")):
        if value is not None:
            figure.add_hline(
                y=value,
                line={"color": NEUTRAL, "width": 1.5, "dash": "dot"},
                annotation={"text": label, "showarrow": False},
            )
    caption = (
        "Expected loss under the worst mixture of domains within a radius of the uniform one: from "
        "the mean at 0 to the worst domain. Flat is robust."
    )
    if robust.converged is False:
        caption += " The solver did not reach its tolerance."
    return Chart(
        kind="protocol-robust",
        title="Worst case against the size of the shift",
        caption=caption,
        figure=figure if is_drawn else None,
    )


def decile_curves(record: ProtocolRecord, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws the loss of tokens by how frequent they are in the training split."""
    figure = empty_figure(x_title="tenth of the text, rarest tokens first", y_title="nats")
    figure.update_layout(hovermode="x unified")
    lines = [(styles[name], domain.deciles) for name, domain in record.domains.items()]
    lines.append((_POOLED, record.fairness.deciles))
    drawn = [
        _add_line(figure, list(range(1, len(losses) + 1)), losses, style) for style, losses in lines
    ]
    return Chart(
        kind="protocol-deciles",
        title="Loss by the frequency of the predicted token",
        caption="Mean loss of the tokens of each tenth of the training text, sorted from rare to "
        "frequent tokens; grey is all domains together. Gaps have no such token.",
        figure=figure if any(drawn) else None,
    )


def _add_line(
    figure: go.Figure,
    x: Sequence[float | None],
    y: Sequence[float | None],
    style: SeriesStyle,
) -> bool:
    if not any(value is not None for value in y):
        return False
    figure.add_scatter(
        x=list(x),
        y=rounded(y),
        name=plain(style.label),
        mode="lines+markers",
        line={"color": style.colour, "dash": style.dash, "width": 2.0},
        marker={"symbol": style.symbol, "size": 6, "color": style.colour},
        meta={"series": style.key, "choice": None},
        hovertemplate="%{y:.3f}",
    )
    return True
