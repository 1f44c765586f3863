"""Charts that set several runs side by side; colours tell runs apart, not domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from drgr.report._charts import Chart
from drgr.report._html import number
from drgr.report._records import RunRecord, ValidationRecord
from drgr.report._style import SeriesStyle, add_curve, empty_figure, plain, rounded
from drgr.report._summary import RunSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """A run with its summary, its name among the compared runs and its look."""

    label: str
    record: RunRecord
    summary: RunSummary
    style: SeriesStyle


def common_order(runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    """Orders the runs' domains by the first run, worst first, then those it lacks."""
    names = dict.fromkeys(domain.name for run in runs for domain in run.summary.domains)
    return tuple(names)


def final_bars_by_run(
    runs: Sequence[ComparedRun], domain_styles: Mapping[str, SeriesStyle]
) -> Chart:
    """Draws final bits per byte by domain, the runs' bars next to each other."""
    order = common_order(runs)
    figure = empty_figure(
        x_title="bits per byte",
        y_title="",
        height=_height(len(order), len(runs)),
    )
    highest = 0.0
    for run in runs:
        bars = [domain for domain in run.summary.domains if domain.bits_per_byte is not None]
        highest = max([highest, *(domain.bits_per_byte or 0.0 for domain in bars)])
        figure.add_bar(
            x=[domain.bits_per_byte for domain in bars],
            y=[plain(domain_styles[domain.name].label) for domain in bars],
            orientation="h",
            name=plain(run.style.label),
            marker={"color": run.style.colour, "pattern": {"shape": run.style.pattern}},
            text=[
                number(domain.bits_per_byte, 3)
                + (" <b>\N{BLACK LEFT-POINTING TRIANGLE}</b>" if domain.is_worst else "")
                for domain in bars
            ],
            textposition="outside",
            cliponaxis=False,
            meta={"series": run.style.key, "choice": None},
            hovertemplate="%{y}: %{x:.4f} bits per byte<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        type="category",
        categoryorder="array",
        categoryarray=[plain(domain_styles[name].label) for name in order],
    )
    figure.update_xaxes(range=[0, highest * 1.3 or 1.0])
    return Chart(
        kind="compare-bars",
        title="Final held-out loss of each domain by run",
        caption="Lower is better. A triangle marks each run's worst domain; domains in the "
        "order of the first run.",
        figure=figure if highest > 0 else None,
        legend=tuple(run.style for run in runs),
    )


def worst_against_mean(runs: Sequence[ComparedRun]) -> Chart:
    """Draws one point per run: mean bits per byte against those of its worst domain."""
    points = [
        (run.summary.mean_bits_per_byte, run.summary.worst_bits_per_byte)
        for run in runs
        if run.summary.mean_bits_per_byte is not None
        and run.summary.worst_bits_per_byte is not None
    ]
    figure = empty_figure(
        x_title="mean bits per byte",
        y_title="worst domain, bits per byte",
        height=_height(len(common_order(runs)), len(runs)),
    )
    drawn = [_add_point(figure, run) for run in runs]
    if points:
        figure.update_xaxes(range=_span([mean for mean, _ in points], points))
        figure.update_yaxes(range=_span([worst for _, worst in points], points))
    return Chart(
        kind="compare-scatter",
        title="Worst domain against the mean",
        caption="Both axes span the same number of bits per byte. Lower left is better; straight "
        "down is a better worst domain at no cost in the mean.",
        figure=figure if any(drawn) else None,
        legend=tuple(run.style for run in runs),
    )


def _height(num_domains: int, num_runs: int) -> int:
    return max(300, 90 + num_domains * (20 + 16 * num_runs))


def _span(values: Sequence[float], points: Sequence[tuple[float, float]]) -> list[float]:
    """Gives both axes the same length in bits per byte, so that a trade-off is seen at its size."""
    means, worsts = zip(*points, strict=True)
    half = 0.7 * max(max(means) - min(means), max(worsts) - min(worsts), 0.02)
    middle = (max(values) + min(values)) / 2
    return [middle - half, middle + half]


def _add_point(figure: go.Figure, run: ComparedRun) -> bool:
    mean, worst = run.summary.mean_bits_per_byte, run.summary.worst_bits_per_byte
    if mean is None or worst is None:
        return False
    figure.add_scatter(
        x=rounded([mean]),
        y=rounded([worst]),
        mode="markers",
        name=plain(run.style.label),
        marker={"color": run.style.colour, "symbol": run.style.symbol, "size": 16},
        cliponaxis=False,
        text=[plain(run.summary.worst_domain or "")],
        meta={"series": run.style.key, "choice": None},
        hovertemplate="mean %{x:.4f}, worst %{y:.4f} (%{text})<extra>%{fullData.name}</extra>",
    )
    return True


def overlaid_curves(runs: Sequence[ComparedRun], domain_styles: Mapping[str, SeriesStyle]) -> Chart:
    """Draws validation curves of all runs for the worst domain, the mean or a chosen domain."""
    order = common_order(runs)
    figure = empty_figure(
        x_title="training step", y_title="bits per byte", height=_height(len(order), len(runs))
    )
    figure.update_layout(hovermode="x unified")
    choices = ["worst domain", "mean over domains", *(domain_styles[name].label for name in order)]
    drawn = [
        add_curve(
            figure,
            [(record.step, _value(record, choice, order)) for record in run.record.validation],
            style=run.style,
            choice=choice,
            visible=choice == 0,
        )
        for choice in range(len(choices))
        for run in runs
    ]
    return Chart(
        kind="compare-curves",
        title="Held-out loss during training by run",
        caption="Lower is better (validation split). Choose the worst domain, the mean or a single "
        "domain.",
        figure=figure if any(drawn) else None,
        legend=tuple(run.style for run in runs),
        choices=tuple(choices),
    )


def _value(record: ValidationRecord, choice: int, order: Sequence[str]) -> float | None:
    if choice == 0:
        return record.worst_bits_per_byte
    if choice == 1:
        return record.mean_bits_per_byte
    return record.bits_per_byte.get(order[choice - 2])
