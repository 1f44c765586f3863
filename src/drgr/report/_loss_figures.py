"""Charts of losses: held-out by domain over training and at the end, and the training objective."""

from collections.abc import Mapping

from drgr.report._bars import Bar, add_reference, bars_height, ranked_bars
from drgr.report._charts import Chart
from drgr.report._html import number
from drgr.report._records import RunRecord
from drgr.report._style import NEUTRAL, SeriesStyle, add_curve, empty_figure
from drgr.report._summary import RunSummary


def loss_curves(run: RunRecord, summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws validation bits per byte by domain over steps, the worst domain thicker."""
    height = min(620, max(380, bars_height(len(styles))))
    figure = empty_figure(x_title="training step", y_title="bits per byte", height=height)
    figure.update_layout(hovermode="x unified")
    drawn = [
        add_curve(
            figure,
            [(record.step, record.bits_per_byte.get(name)) for record in run.validation],
            style=style,
            width=4.0 if name == summary.worst_domain else 1.8,
        )
        for name, style in styles.items()
    ]
    return Chart(
        kind="loss-curves",
        title="Held-out loss of each domain during training",
        caption="Lower is better. The thick line is the domain that is worst at the end "
        "(validation split).",
        figure=figure if any(drawn) else None,
    )


def final_bars(summary: RunSummary, styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws final bits per byte by domain, worst on top and marked, with the mean as a line."""
    bars = [
        Bar(
            value=domain.bits_per_byte,
            shown=number(domain.bits_per_byte, 3)
            + (" \N{BLACK LEFT-POINTING TRIANGLE} worst" if domain.is_worst else ""),
            style=styles[domain.name],
            is_marked=domain.is_worst,
        )
        for domain in summary.domains
        if domain.bits_per_byte is not None
    ]
    figure = ranked_bars(bars, x_title="bits per byte", unit="bits per byte")
    if summary.mean_bits_per_byte is not None:
        add_reference(figure, summary.mean_bits_per_byte, f"mean {summary.mean_bits_per_byte:.3f}")
    return Chart(
        kind="final-bars",
        title=_final_title(summary),
        caption=f"Lower is better. Worst domain on top; the dotted line is the mean "
        f"({summary.source}).",
        figure=figure if bars else None,
    )


def objective_curves(run: RunRecord) -> Chart:
    """Draws the mean training loss and the objective that is minimised."""
    mean = SeriesStyle(
        key="loss-mean",
        label="mean loss",
        colour=NEUTRAL,
        dash="solid",
        symbol="circle",
        pattern="",
    )
    objective = SeriesStyle(
        key="loss-objective",
        label="objective",
        colour="#0E8A9A",
        dash="solid",
        symbol="diamond",
        pattern="",
    )
    figure = empty_figure(x_title="training step", y_title="nats per token", height=300)
    figure.update_layout(hovermode="x unified")
    drawn = [
        add_curve(figure, [(record.step, record.loss) for record in run.train], style=mean),
        add_curve(
            figure, [(record.step, record.objective) for record in run.train], style=objective
        ),
    ]
    return Chart(
        kind="objective",
        title="Training loss and the robust objective",
        caption="The objective weighs domains by the adversary; its distance from the mean loss is "
        "the price of robustness.",
        figure=figure if any(drawn) else None,
        legend=(mean, objective),
    )


def _final_title(summary: RunSummary) -> str:
    if summary.worst_domain is None or summary.worst_bits_per_byte is None:
        return "Final held-out loss of each domain"
    worst = f"{summary.worst_domain} is worst at {summary.worst_bits_per_byte:.3f} bits per byte"
    if summary.mean_bits_per_byte is None:
        return f"Final held-out loss: {worst}"
    return f"Final held-out loss: {worst}, the mean is {summary.mean_bits_per_byte:.3f}"
