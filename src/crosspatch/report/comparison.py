# SPDX-License-Identifier: Apache-2.0
"""report.html of a comparison: which of several ways to train is better, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from crosspatch.metrics.paired import Estimate
from crosspatch.report.curves import percents, sketching
from crosspatch.report.figures import COLOURS, INK
from crosspatch.report.figures import to_svg as svg
from crosspatch.report.page import count, percent, render, write_page
from crosspatch.report.run import PAGE
from crosspatch.report.story import named, plural
from crosspatch.training.compare_report import how_measured, typed
from crosspatch.training.compared import Compared, Row

CURVES = 6  # candidates whose learning curves are told apart by colour


def write_comparison(found: Compared) -> Path:
    """report.html in the comparison's folder. Raises UsageError where it cannot be written."""
    path = found.out / PAGE
    write_page(path, comparison_page(found))
    return path


def comparison_page(found: Compared) -> str:
    """The page of a comparison of which one run at least has ended."""
    kind = "pictures with all labels right" if found.several else "accuracy"
    balanced = found.baseline.balanced is not None
    against = f"against {named(found.baseline.name, 16)}"
    head = ["candidate", f"{kind} on test", "95 % range", against, "95 % range", "p (Holm)"]
    head += ["balanced", "rarest classes"] if balanced else []
    cost = ["candidate", "calibration error", "time a run", "epochs", "images/s", "parameters",
            "multiply-adds"]  # fmt: skip
    plan = found.plan
    budget = plural(plan.epochs, "epoch") if plan.epochs else f"{plan.each or 0:.0f} s"
    return render(
        "compare.html",
        title=" or ".join(named(row.name, 24) for row in found.rows[:4])
        + (f" or {len(found.rows) - 4} more" if len(found.rows) > 4 else ""),
        data=named(plan.data, 80),
        lead=_answer(found),
        trained=(
            f"Each was trained {plural(len(found.seeds), 'time')} with {budget} a run, on the same "
            f"{found.pictures['train']:,} pictures, and judged on the same "
            f"{found.pictures['test']:,}."
        ),
        verdicts=[(_level(row), named(row.name), row.verdict) for row in found.rows[1:]],
        head=head,
        rows=[_cells(row, balanced) for row in found.rows],
        cost_head=cost,
        cost_rows=[_cost(row) for row in found.rows],
        differences=differences(found),
        curves=learning_curves(found),
        how=list(how_measured(found)),
        command=typed(plan.command),
    )  # fmt: skip


def _answer(found: Compared) -> str:
    """The whole comparison in a sentence."""
    base = named(found.baseline.name, 24)
    better = [named(row.name, 24) for row in found.rows[1:] if _level(row) == "good"]
    worse = [named(row.name, 24) for row in found.rows[1:] if _level(row) == "bad"]
    if better:
        return f"Better than {base}: {', '.join(better)}."
    if len(worse) == len(found.rows) - 1:
        return f"Keep {base}: {'it is better' if len(worse) == 1 else 'all others are worse'}."
    return f"Nothing was shown to be better than {base}."


def _level(row: Row) -> str:
    return {"better": "good", "worse": "bad"}.get(row.verdict.split(" ", 1)[0], "")


def _cells(row: Row, balanced: bool) -> list[Any]:
    p = "–" if row.p is None else f"{row.p:.3f}" if row.p >= 0.0005 else "<0.001"
    cells = [named(row.name), *_share(row.accuracy), *_gap(row.difference), p]
    return cells + ([" ".join(_share(one)[:1]) for one in (row.balanced, row.tail)]
                    if balanced else [])  # fmt: skip


def _share(found: Estimate | None) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    low, high = max(0.0, 100 * found.low), min(100.0, 100 * found.high)
    return percent(found.mean), f"{low:.1f} to {high:.1f}"


def _gap(found: Estimate | None) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    return f"{100 * found.mean:+.1f}", f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"


def _cost(row: Row) -> list[str]:
    cost = row.cost
    ece = percent(cost["ece"]) if "ece" in cost else "–"
    seconds = f"{cost['seconds']:,.0f} s" if "seconds" in cost else "–"
    epochs = f"{cost['epochs']:.1f}" if "epochs" in cost else "–"
    rest = [count(cost.get(key)) for key in ("images_per_second", "parameters", "macs")]
    return [named(row.name), ece, seconds, epochs, *rest]


def differences(found: Compared) -> Markup | None:
    """Each candidate's difference from the first, with its interval; seeds as ticks."""
    gaps = [(row, row.difference) for row in found.rows if row.difference is not None]
    if not gaps:
        return None
    theirs = {run.seed: run.correct.mean() for run in found.baseline.runs}
    with sketching(7.4, 1.0 + 0.42 * len(gaps)) as (figure, panel):
        for place, (row, gap) in enumerate(gaps):
            colour = COLOURS[place % len(COLOURS)]
            panel.plot([100 * gap.low, 100 * gap.high], [place, place], color=colour)
            panel.plot(100 * gap.mean, place, "o", color=colour)
            ticks = [100 * (run.correct.mean() - theirs[run.seed])
                     for run in row.runs if run.seed in theirs]  # fmt: skip
            panel.plot(ticks, [place + 0.25] * len(ticks), "|", color=colour)
        panel.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        panel.set_yticks(range(len(gaps)), [named(row.name, 26) for row, _ in gaps])
        panel.set_ylim(len(gaps) - 0.4, -0.6)
        panel.set_xlabel(f"points against {named(found.baseline.name, 26)}")
        return svg(figure, "Differences of test accuracy from the first candidate")


def learning_curves(found: Compared) -> Markup | None:
    """The figure on validation over the steps: a line for the mean of the seeds."""
    drawn = [row for row in found.rows if any(run.curve for run in row.runs)][:CURVES]
    if not drawn:
        return None
    with sketching(7.4, 3.0) as (figure, panel):
        for row, colour in zip(drawn, COLOURS, strict=False):
            lines = [np.array([(step, value) for step, _, value in run.curve])
                     for run in row.runs if run.curve]  # fmt: skip
            least = min(map(len, lines))
            mean = np.mean([line[:least] for line in lines], axis=0)
            panel.plot(*mean.T, color=colour, label=named(row.name, 26),
                       marker="o" if least == 1 else None)  # fmt: skip
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("steps")
        percents(panel.yaxis)
        panel.legend()
        return svg(figure, "The figure on validation over the steps of training, by candidate")
