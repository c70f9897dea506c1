"""Figures that read the same everywhere: one colour and line style a method, and a text receipt.

A notebook test compares text and never looks at a picture. So a figure is shown as a picture and
as text: its description and a receipt read back from what was drawn.

The functions below that draw numbers take tensors too, on whatever device. Those of matplotlib,
such as `ax.plot`, read tensors of the CPU alone.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import BoundaryNorm
from matplotlib.container import BarContainer, Container
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from dpo_mini._arguments import check_count, check_fraction
from dpo_mini._files import write_whole
from dpo_mini.progress import in_notebook

__all__ = [
    "STYLES",
    "style",
    "axes",
    "panels",
    "grouped_bars",
    "curves",
    "label_lines",
    "named_points",
    "decision_chart",
    "pipeline",
    "ternary",
    "ternary_xy",
    "ternary_grid",
    "ternary_contours",
    "ternary_cloud",
    "vector_fields",
    "show",
    "save",
    "leave_out_values",
    "receipt",
]

STYLES: dict[str, dict[str, Any]] = {
    "optimal": {"color": "black", "linestyle": "--", "label": "π* (exact)"},
    "reference": {"color": "#CC79A7", "linestyle": ":", "label": "π_ref"},
    "dpo": {"color": "#0072B2", "linestyle": "-", "label": "DPO"},
    "ppo": {"color": "#D55E00", "linestyle": "-", "marker": "o", "label": "PPO"},
    "reinforce": {"color": "#E69F00", "linestyle": "-", "label": "REINFORCE"},
    "ipo": {"color": "#009E73", "linestyle": "-", "label": "IPO"},
    "sft": {"color": "#56B4E9", "linestyle": "-.", "label": "SFT"},
}
"""One colour (Okabe-Ito) and one line style a method, in every figure of the course."""

_VARIES = "varies"
_FONT: Any = {  # rcParams: how their names are typed depends on matplotlib's version
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def style(method: str, **changes: object) -> dict[str, Any]:
    """Keyword arguments for `Axes.plot` that draw `method` as everywhere else in the course.

    Args:
      method: a key of `STYLES`, such as `"dpo"`.
      **changes: what is drawn otherwise here, such as `label="DPO, beta 0.1"`.
    Returns:
      Colour, line style, label and, of some, a marker.
    Raises:
      ValueError: `method` has no style; `STYLES` has those that do.
    """
    if method not in STYLES:
        raise ValueError(f"`method` must be one of {sorted(STYLES)}, got {method!r}")
    return {**STYLES[method], **changes}


def axes(
    title: str, x_label: str, y_label: str, *, width: float = 6.4, height: float = 3.6
) -> tuple[Figure, Axes]:
    """One set of axes whose title is the finding and whose labels carry units.

    Args:
      title: the finding.
      x_label, y_label: what is drawn, and its unit.
      width, height: of the figure, inches.
    Returns:
      `(figure, axes)`.
    """
    fig, (ax,) = panels([title], [x_label], [y_label], width=width, height=height)
    return fig, ax


def panels(
    titles: Sequence[str],
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    *,
    rows: int = 1,
    width: float = 9.6,
    height: float = 3.6,
) -> tuple[Figure, list[Axes]]:
    """Axes side by side, or in several rows, each with its own title and labels.

    Args:
      titles, x_labels, y_labels: one per panel, from left to right, the upper row first.
      rows: how many rows; they are equally long.
      width, height: of the whole figure, inches.
    Returns:
      `(figure, axes)`, as many axes as titles.
    Raises:
      ValueError: titles and labels differ in number, or the rows cannot be equally long.
    """
    check_count("rows", rows)
    if not len(titles) == len(x_labels) == len(y_labels):
        got = f"{len(titles)}, {len(x_labels)} and {len(y_labels)}"
        raise ValueError(f"`titles`, `x_labels` and `y_labels` must be equally many, got {got}")
    if len(titles) % rows:
        raise ValueError(f"`rows` must divide the {len(titles)} titles, got {rows}")
    with matplotlib.rc_context(_FONT):
        fig = Figure(figsize=(width, height), dpi=100, layout="constrained")
        FigureCanvasAgg(fig)
        axs = list(fig.subplots(rows, len(titles) // rows, squeeze=False).flat)
        for ax, title, x_label, y_label in zip(axs, titles, x_labels, y_labels, strict=True):
            ax.set(title=title, xlabel=x_label, ylabel=y_label)
    return fig, axs


def grouped_bars(ax: Axes, names: Sequence[str], groups: Mapping[str, Sequence[float]]) -> None:
    """Bars side by side over `names`, one group a policy; method names take their colour.

    Args:
      ax: where to draw.
      names: Y labels along the x axis.
      groups: a method of `STYLES`, or any other name, to its Y heights.
    Raises:
      ValueError: no groups, or heights that are not numbers.
    """
    _check_is("ax", ax, Axes)
    _check_is("groups", groups, Mapping)
    if not groups:
        raise ValueError("`groups` must have at least one name, got none")
    step = 0.8 / len(groups)
    hatches = {"optimal": "///", "reference": "..."}
    for i, (method, heights) in enumerate(groups.items()):
        look = STYLES.get(method, {"color": f"C{i}", "label": method})
        offsets = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * step
        face = "white" if method in hatches else look["color"]
        ax.bar(
            offsets, _numbers("groups", heights), 0.9 * step, label=look["label"],
            facecolor=face, edgecolor=look["color"], hatch=hatches.get(method),
        )  # fmt: skip
    ax.set_xticks(np.arange(len(names)), names)
    ax.legend(frameon=False)


def curves(ax: Axes, x: Sequence[float], named: Mapping[str, Sequence[float]]) -> None:
    """One line a name over `x`, each with a colour and line style of its own, and a legend.

    Args:
      ax: where to draw.
      x: n places.
      named: at most 6 names to n heights; the first, the exact answer as a rule, is black, dashed.
    Raises:
      ValueError: no names, or more than 6.
    """
    _check_is("ax", ax, Axes)
    _check_is("named", named, Mapping)
    looks = (("black", "--"), ("#D55E00", "-"), ("#0072B2", "-."), ("#009E73", (0, (5, 1))),
             ("#CC79A7", ":"), ("#E69F00", (0, (3, 1, 1, 1))))  # fmt: skip
    if not 1 <= len(named) <= len(looks):
        raise ValueError(f"`named` must have 1 to {len(looks)} names, got {len(named)}")
    for (name, y), (color, dash) in zip(named.items(), looks, strict=False):
        ax.plot(_numbers("x", x), _numbers("named", y), color=color, linestyle=dash, label=name)
    ax.legend(frameon=False, fontsize=8)


def label_lines(ax: Axes, *, gap: float = 0.06) -> None:
    """Write each line's label at its right end, in its colour, moved apart where they would meet.

    Args:
      ax: axes whose lines carry labels (names that begin with an underscore are left out).
      gap: least distance between two labels, as a share of the axis height.
    Raises:
      ValueError: `gap` is no share.
    """
    _check_is("ax", ax, Axes)
    check_fraction("gap", gap)
    lines = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    ax.autoscale_view()
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = []
    for line in lines:
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        seen = np.isfinite(x) & np.isfinite(y)
        at = np.flatnonzero(seen)[np.argmax(x[seen])]
        ends.append([*to_axes.transform((x[at], y[at])), line])
    ends.sort(key=lambda end: end[1])
    heights = np.array([end[1] for end in ends])
    for _ in range(200):  # push neighbours apart until all keep their distance
        close = np.maximum(0.0, gap - np.diff(heights)) / 2
        if not (close > 1e-9).any():
            break
        heights[:-1] -= close
        heights[1:] += close
    for (x, _, line), height in zip(ends, heights, strict=True):
        ax.annotate(
            str(line.get_label()), (x, height), xycoords="axes fraction", xytext=(6, 0),
            textcoords="offset points", va="center", color=line.get_color(), annotation_clip=False,
        )  # fmt: skip


def named_points(ax: Axes, groups: Mapping[str, Mapping[str, float]]) -> None:
    """One row a name, from top to bottom in the order given: a point, and beside it name and value.

    Args:
      ax: where to draw; loses its y ticks.
      groups: a label, shown in the legend with a colour and marker of its own, to its names and
        their finite values; at most 6 labels.
    Raises:
      ValueError: no names, more than 6 labels, or a value that is not finite.
    """
    _check_is("ax", ax, Axes)
    _check_is("groups", groups, Mapping)
    for group in groups.values():
        _check_is("groups", group, Mapping)
    looks = list(
        zip(("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "black"), "os^vDP", strict=True)
    )
    values = _numbers("groups", [value for group in groups.values() for value in group.values()])
    if not values.size:
        raise ValueError("`groups` must have at least one name, got none")
    if len(groups) > len(looks):
        raise ValueError(f"`groups` must have at most {len(looks)} labels, got {len(groups)}")
    if not np.isfinite(values).all():
        bad = values[~np.isfinite(values)][0]
        raise ValueError(f"`groups` must have finite values, got {bad}")
    row = 0
    for (label, group), (color, marker) in zip(groups.items(), looks, strict=False):
        rows, own = row + np.arange(len(group)), values[row : row + len(group)]
        ax.plot(own, rows, marker, color=color, label=label)
        for place, name, value in zip(rows, group, own, strict=True):
            ax.annotate(
                f"{name}  {_number(value)}", (value, place), xytext=(8, 0),
                textcoords="offset points", va="center", color=color, fontsize=9,
            )  # fmt: skip
        row += len(group)
    ax.set(yticks=[], ylim=(row - 0.4, -0.6))
    low, high = values.min(), values.max()
    span = (high - low) or 1.0
    ax.set_xlim(low - 0.05 * span, high + 0.5 * span)  # room for the names beside the points
    ax.legend(frameon=False, loc="upper right")


def decision_chart(ax: Axes, questions: Mapping[str, str], *, otherwise: str) -> None:
    """Questions down the left, each with an arrow to what to do on yes, and on no to the next.

    Args:
      ax: where to draw; loses its ticks and spines.
      questions: from first to last, a question to its answer; a text may have several lines.
      otherwise: what to do where every answer is no, below the last question.
    Raises:
      ValueError: no questions, or a text that is empty.
    """
    _check_is("ax", ax, Axes)
    _check_is("questions", questions, Mapping)
    texts = [*questions, *questions.values(), otherwise]
    for text in texts:
        _check_is("questions, otherwise", text, str)
    if not questions or not all(text.strip() for text in texts):
        got = f"{len(questions)} questions and the texts {texts!r}"
        raise ValueError(
            f"`questions` must be at least one, and neither they nor `otherwise` empty, got {got}"
        )
    last = len(questions)
    ax.set(xlim=(0, 1), ylim=(last + 0.5, -0.5), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
    outline = {"boxstyle": "round,pad=0.4", "facecolor": "white"}
    asked, done = outline | {"edgecolor": "black"}, outline | {"edgecolor": "#0072B2"}
    left = [
        ax.text(0.25, row, text, bbox=done if row == last else asked, **words)
        for row, text in enumerate([*questions, otherwise])
    ]
    right = [
        ax.text(0.75, row, text, bbox=done, **words) for row, text in enumerate(texts[last:-1])
    ]
    for row, question in enumerate(left[:-1]):
        for word, to, shift in (("yes", right[row], (0, 7)), ("no", left[row + 1], (10, 0))):
            boxes = {"patchA": question.get_bbox_patch(), "patchB": to.get_bbox_patch()}
            ends = to.get_position(), question.get_position()
            ax.annotate("", *ends, arrowprops={"arrowstyle": "->", "shrinkA": 0, **boxes})
            middle = np.mean(ends, axis=0)
            ax.annotate(word, middle, shift, textcoords="offset points", **words)


def pipeline(title: str, boxes: Sequence[str], arrows: Sequence[str], shortcut: str) -> Figure:
    """Boxes from top to bottom, an arrow from each to the next, and a shortcut in DPO's look.

    Args:
      title: the finding.
      boxes: n >= 4 texts.
      arrows: n - 1 texts, what leads from each box to the next.
      shortcut: what leads from the third box to the last one.
    Returns:
      The figure.
    Raises:
      ValueError: boxes and arrows do not fit.
    """
    if len(boxes) < 4 or len(arrows) != len(boxes) - 1:
        got = f"{len(boxes)} and {len(arrows)}"
        raise ValueError(f"`boxes` must be >= 4 and `arrows` one fewer, got {got}")
    fig, ax = axes(title, "", "", width=6.4, height=0.85 * len(boxes) + 0.3)
    ax.set(xlim=(-1.5, 2.2), ylim=(0.5 - len(boxes), 0.5))
    ax.set_axis_off()
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 12}
    frame = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": "black"}
    drawn = [ax.text(0, -row, text, bbox=frame, **look) for row, text in enumerate(boxes)]
    head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0}
    for row, text in enumerate(arrows):
        ends = {"patchA": drawn[row].get_bbox_patch(), "patchB": drawn[row + 1].get_bbox_patch()}
        ax.annotate("", (0, -row - 1), (0, -row), arrowprops={**head, "color": "black", **ends})
        ax.text(0.08, -row - 0.5, text, ha="left", va="center", fontsize=11)
    last, beside, blue = 1 - len(boxes), -0.85, STYLES["dpo"]["color"]
    way = {"color": blue, "linewidth": 2.5}
    ax.plot([0, beside, beside], [-2, -2, last], **way, zorder=0, label="_shortcut")
    ends = {"patchB": drawn[-1].get_bbox_patch()}
    ax.annotate("", (0, last), (beside, last), arrowprops={**head, **way, **ends})
    ax.text(
        beside - 0.06, (last - 2) / 2, shortcut, color=blue, fontsize=12, ha="right", va="center"
    )
    return fig


def ternary(ax: Axes, corners: Sequence[str]) -> None:
    """Turn axes into a triangle whose points are the distributions over three actions.

    A corner is an action taken for certain, an edge a mixture of two, the centre all alike.

    Args:
      ax: where to draw; keeps its title and x label, loses ticks and spines.
      corners: three names: left, right, top.
    Raises:
      ValueError: the names are not three.
    """
    _check_is("ax", ax, Axes)
    if len(corners) != 3:
        raise ValueError(f"`corners` must be 3 names, got {len(corners)}")
    x, y = ternary_xy(np.eye(3)[[0, 1, 2, 0]])
    ax.plot(x, y, color="black", linewidth=0.8, label="_frame")
    for i, (name, shift) in enumerate(zip(corners, [(-8, -4), (8, -4), (0, 8)], strict=True)):
        ax.annotate(
            name, (x[i], y[i]), xytext=shift, textcoords="offset points", ha="center", va="center",
            annotation_clip=False,
        )  # fmt: skip
    ax.set(aspect="equal", xticks=[], yticks=[], ylim=(-0.06, 1.02))
    ax.spines[:].set_visible(False)


def ternary_xy(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where distributions over three actions lie in `ternary` axes (barycentric coordinates).

    Args:
      probs: `[n, 3]` or `[3]`, each row summing to 1; a tensor will do.
    Returns:
      x and y, `[n]` or `[]` each; the sides are 1 long, the left corner is at (0, 0).
    Raises:
      ValueError: the last dimension is not 3, or a row does not sum to 1.
    """
    table = _numbers("probs", probs)
    if table.ndim == 0 or table.shape[-1] != 3:
        raise ValueError(f"`probs` must have shape [n, 3] or [3], got {list(table.shape)}")
    totals = table.sum(-1)
    if not np.allclose(totals, 1.0, atol=1e-6):
        worst = totals.flat[np.abs(totals - 1).argmax()]
        raise ValueError(f"`probs` must have rows that sum to 1, got one that sums to {worst:.4g}")
    return table[..., 1] + 0.5 * table[..., 2], np.sqrt(0.75) * table[..., 2]


def ternary_grid(n_steps: int) -> np.ndarray:
    """Every distribution over three actions in steps of 1/n: `[(n + 1)(n + 2) / 2, 3]`.

    Raises:
      ValueError: `n_steps`, n, is below 1.
    """
    check_count("n_steps", n_steps)
    a, b = np.meshgrid(np.arange(n_steps + 1), np.arange(n_steps + 1), indexing="ij")
    inside = a + b <= n_steps
    a, b = a[inside], b[inside]
    return np.column_stack([a, b, n_steps - a - b]) / n_steps


def ternary_contours(
    ax: Axes, probs: np.ndarray, heights: np.ndarray, levels: Sequence[float]
) -> None:
    """Shade a function over the triangle, darker is higher, with a contour at each of `levels`.

    Args:
      ax: axes that `ternary` has prepared.
      probs: `[n, 3]`, such as `ternary_grid(60)`.
      heights: `[n]`, finite, the function's value at each row.
      levels: increasing.
    Raises:
      ValueError: a row of `probs` does not sum to 1, or `heights` is not finite or not `[n]`.
    """
    _check_is("ax", ax, Axes)
    x, y = ternary_xy(probs)
    heights = _numbers("heights", heights)
    if heights.shape != x.shape or not np.isfinite(heights).all():
        got = f"shape {list(heights.shape)}, finite: {bool(np.isfinite(heights).all())}"
        raise ValueError(f"`heights` must be finite, one per row of `probs`, got {got}")
    low, high = heights.min(), heights.max()
    inside = [level for level in _numbers("levels", levels) if low < level < high]
    darkest = high + 0.6 * (high - low)  # pale enough for what is drawn on top
    ax.tricontourf(x, y, heights, levels=[low, *inside, high], cmap="Blues", vmax=darkest)
    ax.tricontour(x, y, heights, levels=inside, colors="white", linewidths=0.8, linestyles="solid")


def ternary_cloud(
    ax: Axes, probs: np.ndarray, chances: np.ndarray, marks: Mapping[str, np.ndarray]
) -> None:
    """Every place where a step may lead as a dot in the triangle, its area its probability.

    Args:
      ax: axes that `ternary` has prepared.
      probs: `[n, 3]`, the places; equal ones become one dot.
      chances: `[n]`, not negative: how likely each is.
      marks: at most 3 names to places `[3]`; they are drawn as a diamond, a square and a cross.
    Raises:
      ValueError: a place does not sum to 1, `chances` are not `[n]` and >= 0, or too many marks.
    """
    _check_is("ax", ax, Axes)
    _check_is("marks", marks, Mapping)
    places, weights = np.column_stack(ternary_xy(probs)), _numbers("chances", chances)
    if weights.shape != (len(places),) or not (weights >= 0).all():
        got = f"shape {list(weights.shape)}, smallest {weights.min():.4g}"
        raise ValueError(f"`chances` must be >= 0, one per row of `probs`, got {got}")
    looks = (
        ("D", "black", "white", 7),
        ("s", "none", "black", 12),
        ("x", "#D55E00", "#D55E00", 6),
    )
    if len(marks) > len(looks):
        raise ValueError(f"`marks` must have at most {len(looks)} names, got {len(marks)}")
    dots, at = np.unique(places.round(6), axis=0, return_inverse=True)
    areas = 900 * np.bincount(at.ravel(), weights)
    ax.scatter(
        dots[:, 0], dots[:, 1], s=areas, color="#56B4E9A0", edgecolor="#0072B2", label="batches"
    )
    for (name, place), (marker, face, edge, size) in zip(marks.items(), looks, strict=False):
        x, y = ternary_xy(place)
        ax.plot(
            x, y, marker, color=face, markeredgecolor=edge, markersize=size, label=name,
            markeredgewidth=1.8 if marker == "x" else 1.2,
        )  # fmt: skip


def vector_fields(
    named: Mapping[str, tuple[np.ndarray, np.ndarray]],
    places: Sequence[float],
    x_label: str,
    y_label: str,
    *,
    title: str = "",
    length_label: str = "length",
    columns: int = 5,
    width: float = 11.0,
    height: float = 7.0,
) -> Figure:
    """Small multiples of vector fields over one square: arrows for direction, shade for length.

    All panels share one scale: shades are a third of a decade of the length and lengths outside
    0.01..10 take the outermost shade; where the length is 0 there is neither arrow nor shade.

    Args:
      named: a panel's title to the components along x and y, `[n, n]` each, finite; row k, column m
        is at y = places[k], x = places[m].
      places: n increasing ticks of both axes; an arrow stands at every second of them.
      x_label, y_label: of the outer panels.
      title: of the whole, the finding.
      length_label: of the colour bar.
      columns: most panels in a row.
      width, height: of the figure, inches.
    Returns:
      The figure.
    Raises:
      ValueError: no panels, `columns < 1`, or a component that is not `[n, n]` or not finite.
    """
    _check_is("named", named, Mapping)
    check_count("columns", columns)
    if not named:
        raise ValueError("`named` must have at least one panel, got none")
    at = _numbers("places", places)
    columns = min(columns, len(named))
    n_rows = -(-len(named) // columns)
    norm = BoundaryNorm(np.linspace(-2.0, 1.0, 10), 256, extend="both")
    with matplotlib.rc_context(_FONT):
        fig = Figure(figsize=(width, height), dpi=100, layout="constrained")
        FigureCanvasAgg(fig)
        grid = fig.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False)
        shades = []
        for k, (name, parts) in enumerate(named.items()):
            ax, (u, v) = grid.flat[k], (_numbers("named", part) for part in parts)
            for part in (u, v):
                if part.shape != (len(at), len(at)) or not np.isfinite(part).all():
                    got = f"shape {list(part.shape)}, finite: {bool(np.isfinite(part).all())}"
                    raise ValueError(f"`named[{name!r}]` must be finite [n, n], got {got}")
            length = np.ma.masked_equal(np.hypot(u, v), 0.0)
            shades += [ax.pcolormesh(at, at, np.ma.log10(length), cmap="Blues", norm=norm)]
            few = (slice(None, None, 2), slice(None, None, 2))
            directions = [np.ma.filled(part[few] / length[few], np.nan) for part in (u, v)]
            ax.quiver(
                at[::2], at[::2], *directions, scale=13, width=0.009, headwidth=4.5, pivot="mid"
            )
            ax.set(title=name, aspect="equal")
            ax.label_outer()
        for ax in grid.flat[len(named) :]:
            fig.delaxes(ax)
        for ax in grid[-1]:
            ax.set_xlabel(x_label)
        for ax in grid[:, 0]:
            ax.set_ylabel(y_label)
        bar = fig.colorbar(
            shades[-1], ax=grid, shrink=0.6, ticks=[-2, -1, 0, 1], label=length_label
        )
        bar.ax.set_yticklabels(["0.01", "0.1", "1", "10"])
        fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return fig


def show(fig: Figure, *, alt: str) -> None:
    """Show a figure in a notebook as a picture with alt text and, in text form, its receipt.

    Outside a notebook it prints `alt` and, where matplotlib's backend opens windows, shows the
    picture in one, as `pyplot.show` does; a backend such as Agg opens none.

    Args:
      fig: what to show.
      alt: one or two sentences for someone who cannot see it: what is drawn and what it says.
    Raises:
      ValueError: `alt` is empty.
    """
    _show(fig, alt)


def save(
    fig: Figure, name: str, *, alt: str | None = None, folder: str | Path | None = None
) -> None:
    """Show a headline figure and write it to `folder/name.png`, whole or not at all.

    Nothing is written where `folder` does not exist. Left out, it is what the environment variable
    `DPO_MINI_FIGURES` names, and nothing is written without it: only `tools/run_chapters.py` sets
    it, so that reading or testing a chapter leaves no file behind.

    Args:
      fig: what to show.
      name: the file's name without its ending.
      alt: as in `show`; the titles of the axes when left out.
      folder: where figures live.
    """
    _check_is("fig", fig, Figure)
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in fig.axes]
    shown = _show(fig, "; ".join(titles) if alt is None else alt)
    folder = folder or os.environ.get("DPO_MINI_FIGURES")
    if folder and Path(folder).is_dir():
        write_whole(Path(folder) / f"{name}.png", shown)


def leave_out_values(*artists: Artist) -> None:
    """Mark `artists`, lines or texts, whose numbers differ between machines.

    A receipt then names the lines and leaves out the texts and all numbers.

    For what comes of training on a model's own samples: there rounding grows until one draw falls
    otherwise, and from there on the run is another one.
    """
    for artist in artists:
        _check_is("artists", artist, Artist)
        artist.set_gid(_VARIES)


def receipt(fig: Figure) -> str:
    """What was drawn in `fig`, as text: of every series its label, number of points and ranges."""
    _check_is("fig", fig, Figure)
    rows = [f"[{fig.get_suptitle()}]"] if fig.get_suptitle() else []
    for ax in fig.axes:
        if ax.get_label() == "<colorbar>":
            continue
        title = ax.get_title(loc="left") or ax.get_title()
        rows.append(f"[{title}] x: {ax.get_xlabel()} | y: {ax.get_ylabel()}")
        bars = [c for c in ax.containers if isinstance(c, BarContainer)]
        for line in ax.lines:
            points = np.column_stack([line.get_xdata(), line.get_ydata()])
            varies = line.get_gid() == _VARIES
            ranges = f"{len(points)} points, which vary" if varies else _ranges(points)
            rows.append(f"  line {_name(line)}: {ranges}")
        for bar in bars:
            heights = " ".join(_number(patch.get_height()) for patch in bar.patches)
            rows.append(f"  bars {_name(bar)}: {heights}")
        for drawn in ax.collections:
            places: np.ndarray = np.ma.asarray(drawn.get_offsets())
            field = drawn.get_array()
            if isinstance(drawn, PathCollection) and len(places):
                rows.append(f"  points {_name(drawn)}: {_ranges(places)}")
            elif isinstance(drawn, Quiver):
                parts = np.stack([np.asarray(drawn.U), np.asarray(drawn.V)])
                arrows = ~np.broadcast_to(drawn.Umask, parts[0].shape)
                means = [_number(part[arrows].sum() / max(1, arrows.sum())) for part in parts]
                rows.append(f"  arrows: {arrows.sum()}, mean {' '.join(means)}")
            elif field is not None:
                rows.append(f"  field {_name(drawn)}: {_span(field)}")
        for image in ax.images:
            pixels: np.ndarray = np.ma.asarray(image.get_array())
            shape = "x".join(str(n) for n in pixels.shape)
            rows.append(f"  image {shape}: {_span(pixels)}")
        kept = [text.get_text().strip() for text in ax.texts if text.get_gid() != _VARIES]
        texts = [text for text in kept if text]
        if texts:
            rows.append("  text: " + " | ".join(texts))
    return "\n".join(rows)


def _check_is(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        got, want = type(value).__name__, kind.__name__
        raise TypeError(f"`{name}` must be of type {want}, got {got}")


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    """Numbers as a float array; tensors will do, on whatever device."""
    try:
        array = np.asarray(_on_cpu(values))
        if not np.iscomplexobj(array):
            return np.asarray(array, dtype=float)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be real numbers, got others: {error}") from error
    raise ValueError(f"`{name}` must be real numbers, got {array.dtype}")


def _on_cpu(values: Any) -> Any:
    """`values` with the tensors in them on the CPU, where numpy can read them."""
    if isinstance(values, list | tuple):
        return [_on_cpu(value) for value in values]
    return values.cpu() if isinstance(values, Tensor) else values


def _show(fig: Figure, alt: str) -> bytes:
    """`show`, and the picture: drawn again it may differ, as each time the layout is adjusted."""
    _check_is("fig", fig, Figure)
    _check_is("alt", alt, str)
    if not alt.strip():
        raise ValueError("`alt` must be a description of the figure, got an empty text")
    png = _png(fig)
    if in_notebook():
        from IPython.display import display  # heavy, and only notebooks have it

        data = {"image/png": png, "text/plain": f"{alt}\n{receipt(fig)}"}
        display(data, raw=True, metadata={"image/png": {"alt": alt}})
    else:
        print(alt)
        _show_window(fig, png)
    return png


def _show_window(fig: Figure, png: bytes) -> None:
    from matplotlib import pyplot  # chooses a backend, so only where one is needed

    window = pyplot.figure(figsize=fig.get_size_inches(), dpi=fig.dpi)
    if type(window.canvas.manager) is FigureManagerBase:  # a backend without windows
        pyplot.close(window)
    else:
        ax = window.add_axes((0, 0, 1, 1))
        ax.imshow(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
        ax.set_axis_off()
        pyplot.show()


def _png(fig: Figure) -> bytes:
    drawn, packed = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png")
    # A palette of 256 makes the file a third of the size. It also drops matplotlib's version, so
    # that the file changes only when the picture does.
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def _name(artist: Artist | Container) -> str:
    label = str(artist.get_label())
    return "(no label)" if label.startswith("_") else repr(label)


def _ranges(points: np.ndarray) -> str:
    points = np.ma.filled(np.ma.asarray(points, dtype=float), np.nan)
    return f"{len(points)} points, x {_span(points[:, 0])}, y {_span(points[:, 1])}"


def _span(values: np.ndarray) -> str:
    values = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "nothing finite"
    return f"{_number(finite.min())}..{_number(finite.max())}"


def _number(value: float) -> str:
    """At most 4 decimals and 4 digits, never -0: the same on every machine."""
    return f"{round(float(value), 4) + 0.0:.4g}"


def __dir__() -> list[str]:
    return __all__
