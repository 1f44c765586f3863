"""Charts of weights over domains: what the adversary weighs, what is drawn, how many count."""

from collections.abc import Mapping

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._html import number
from drgr.report._records import Numbers, RunRecord
from drgr.report._style import ACCENT, SeriesStyle, add_curve, empty_figure, plain, rounded


def adversary_curves(run: RunRecord, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws the adversary's weight of each domain over steps."""
    return _weight_chart(
        {record.step: record.adversary for record in run.train},
        styles,
        kind="adversary",
        title="Adversarial weight of each domain",
        caption="The higher the weight, the more the objective looks at the domain.",
    )


def sampling_curves(run: RunRecord, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws the probability that a training sequence is drawn from each domain."""
    return _weight_chart(
        {record.step: record.sampling for record in run.train},
        styles,
        kind="sampling",
        title="Sampling weight of each domain",
        caption="What share of the training data each domain is drawn with.",
    )


def effective_domains(run: RunRecord, *, num_domains: int) -> Chart:
    """Draws the effective number of domains ``1 / sum(q^2)``, with alarms as triangles."""
    style = SeriesStyle(
        key="effective",
        label="effective domains",
        colour="#0E8A9A",
        dash="solid",
        symbol="circle",
        pattern="",
    )
    figure = empty_figure(x_title="training step", y_title="domains", height=300)
    points = [(record.step, record.effective_domains) for record in run.train]
    drawn = add_curve(figure, points, style=style, value_format=".2f")
    top = 1.06 * max(2, num_domains)
    figure.update_yaxes(range=[0, top])
    _add_alarms(figure, run, top=top)
    last = next((value for _, value in reversed(points) if value is not None), None)
    ending = "" if last is None else f": {number(last, 1)} of {num_domains} at the end"
    return Chart(
        kind="effective-domains",
        title=f"Effective number of domains{ending}",
        caption="Near 1, a single domain takes all the weight. Triangles on the axis are alarms.",
        figure=figure if drawn else None,
    )


def _weight_chart(
    weights: Mapping[int, Numbers],
    styles: Mapping[str, SeriesStyle],
    *,
    kind: str,
    title: str,
    caption: str,
) -> Chart:
    figure = empty_figure(x_title="training step", y_title="weight")
    figure.update_layout(hovermode="x unified")
    drawn = [
        add_curve(
            figure,
            [(step, named.get(name)) for step, named in weights.items()],
            style=style,
            value_format=".1%",
        )
        for name, style in styles.items()
    ]
    figure.update_yaxes(rangemode="tozero", tickformat=".0%")
    return Chart(kind=kind, title=title, caption=caption, figure=figure if any(drawn) else None)


def _add_alarms(figure: go.Figure, run: RunRecord, *, top: float) -> None:
    if not run.alarms:
        return
    figure.add_scatter(
        x=rounded([float(alarm.step) for alarm in run.alarms]),
        y=[0.02 * top] * len(run.alarms),
        mode="markers",
        name="alarm",
        marker={"symbol": "triangle-up", "size": 12, "color": ACCENT},
        text=[plain(alarm.message) for alarm in run.alarms],
        cliponaxis=False,
        hovertemplate="alarm at step %{x}: %{text}<extra></extra>",
    )
