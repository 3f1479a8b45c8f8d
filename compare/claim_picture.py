"""A claim's figure: accuracy along an axis, a line a layer with the range of its seeds, and the verdict."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from subquad.compare.curves import name_ends, plot
from subquad.compare.recall_claims import Lines, Verdict, seeds
from subquad.compare.recall_tasks import Task

AXES = {
    "pairs": "key/value pairs to keep",
    "state_bytes": "state of one sequence (bytes)",
    "length": "length of the sequence (tokens; the first is that of training)",
    "distance": "distance from question to answer (tokens)",
}


def draw_claim(verdict: Verdict, lines: Lines, tasks: Sequence[Task], path: Path, kind: str) -> None:
    """Draw as "png" or "svg". Of several tasks each has its own level of chance."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots()
    plot(axes, {label: [(p.x, 100 * p.mean) for p in line] for label, line in lines.items()})
    ends = []
    for drawn in axes.get_lines():
        line, colour = lines[drawn.get_label()], drawn.get_color()
        xs, means = [p.x for p in line], [100 * p.mean for p in line]
        below = [100 * (p.mean - p.least) for p in line]
        above = [100 * (p.greatest - p.mean) for p in line]
        axes.errorbar(xs, means, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1.2, capsize=4)
        ends.append((drawn.get_label(), xs[-1], means[-1], colour))
    xs = sorted({p.x for line in lines.values() for p in line})
    axes.set(xscale="log", xlim=(xs[0] / 1.15, xs[-1] * 1.15), ylim=(-4, 106))
    axes.set(xlabel=AXES.get(verdict.claim.x, verdict.claim.x), ylabel="right answers (%)")
    if len(xs) <= 10:
        axes.set_xticks(xs)
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    own = {getattr(task, verdict.claim.x, None): 100 * task.chance for task in tasks}
    level = [own.get(x, 100 * tasks[0].chance) for x in xs]
    axes.plot(xs, level, color="0.4", linewidth=1, linestyle=(0, (5, 4)), zorder=1)
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate("chance", (xs[0], level[0]), (2, 3), textcoords="offset points", color="0.3", bbox=behind)
    figure.suptitle(textwrap.fill(verdict.claim.says, 88), fontsize=11, x=0.01, ha="left", parse_math=False)
    here = "agrees" if verdict.agrees else "disagrees"
    about = f"{verdict.claim.paper}; here: {here}. {tasks[0].name}, {seeds(verdict)}"
    axes.set_title(textwrap.fill(about, 100), fontsize=9, loc="left", color="0.3", parse_math=False)
    figure.draw_without_rendering()  # the names' places follow from the panel's height
    name_ends(axes, ends)
    with rc_context({"svg.hashsalt": verdict.claim.name}):  # the same runs give the same file
        figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
