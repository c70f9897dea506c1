"""Figures: the styles of the methods, and receipts that tell what was drawn."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from dpo_mini import plotting
from dpo_mini.plotting import (
    STYLES,
    axes,
    grouped_bars,
    label_lines,
    leave_out_values,
    panels,
    receipt,
    style,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def notebook(monkeypatch):
    """What a notebook was given to show: `(data, options)` of each figure."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kw: shown.append((data, kw)))
    monkeypatch.setattr(plotting, "in_notebook", lambda: True)
    return shown


def test_methods_differ_in_colour_and_drawn_lines_do_not_share_both():
    looks = [(s["color"], s["linestyle"], s.get("marker")) for s in STYLES.values()]
    assert len(set(looks)) == len(looks)
    assert len({s["color"] for s in STYLES.values()}) == len(STYLES)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"`method` must be one of \['dpo'.*, got 'a2c'"):
        style("a2c")


def test_the_receipt_tells_swapped_data():
    texts = []
    for heights in ([1.0, 2.0], [2.0, 1.0]):
        fig, ax = axes("a finding", "steps", "nats")
        ax.plot([0, 1], [0.0, heights[0]], **style("dpo"))
        ax.plot([0, 1], [0.0, heights[1]], **style("ipo"))
        texts.append(receipt(fig))
    assert texts[0] != texts[1]
    assert "[a finding] x: steps | y: nats" in texts[0]
    assert "line 'DPO': 2 points, x 0..1, y 0..1" in texts[0]


def test_the_receipt_reads_bars_points_images_and_texts():
    fig, (left, right) = panels(["bars", "rest"], ["x", "x"], ["y", "y"])
    grouped_bars(left, ["a", "b"], {"optimal": [0.25, 0.75], "mine": [0.5, -1e-17]})
    right.scatter([1, 2], [3, 4], label="seen")
    right.imshow(np.array([[0.0, 0.5]]))
    right.text(0, 0, "a remark")
    text = receipt(fig)
    assert "bars 'π* (exact)': 0.25 0.75" in text
    assert "bars 'mine': 0.5 0" in text
    assert "points 'seen': 2 points, x 1..2, y 3..4" in text
    assert "image 1x2: 0..0.5" in text
    assert "text: a remark" in text


def test_the_receipt_leaves_out_what_is_not_finite():
    fig, ax = axes("t", "x", "y")
    ax.plot([0, 1, 2], [np.nan, np.inf, -1e-18])
    assert "line (no label): 3 points, x 0..2, y 0..0" in receipt(fig)


def test_labels_at_line_ends_keep_their_distance():
    _, ax = axes("t", "x", "y")
    for i in range(4):
        ax.plot([0, 1], [0, 1 + 1e-3 * i], label=f"line {i}")
    ax.plot([0, 1], [0, 0], label="_left out")
    label_lines(ax, gap=0.06)
    heights = sorted(note.xy[1] for note in ax.texts)
    assert len(heights) == 4
    assert min(np.diff(heights)) > 0.0599


def test_show_gives_a_picture_alt_text_and_a_receipt(notebook):
    fig, ax = axes("t", "x", "y")
    ax.plot([0, 1], [0, 1], **style("dpo"))
    plotting.show(fig, alt="a rising line")
    ((data, options),) = notebook
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == "a rising line\n" + receipt(fig)
    assert options["metadata"] == {"image/png": {"alt": "a rising line"}}
    with pytest.raises(
        ValueError, match="`alt` must be a description of the figure, got an empty text"
    ):
        plotting.show(fig, alt=" ")


def test_save_writes_whole_files_and_only_where_the_folder_is(tmp_path):
    fig, ax = axes("t", "x", "y")
    ax.plot([0, 1], [0, 1])
    plotting.save(fig, "line", alt="a line", folder=tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
    plotting.save(fig, "line", alt="a line", folder=tmp_path)
    first = (tmp_path / "line.png").read_bytes()
    plotting.save(fig, "line", alt="a line", folder=tmp_path)
    assert (tmp_path / "line.png").read_bytes() == first  # the same picture, the same bytes


def test_save_without_a_folder_writes_where_it_is_asked_to_alone(monkeypatch, tmp_path):
    """Reading or testing a chapter leaves no file behind; making the course's figures does."""
    fig, _ = axes("t", "x", "y")
    for name in ("notebooks", "figures", "asked"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("DPO_MINI_FIGURES", raising=False)
    plotting.save(fig, "line", alt="a line")
    assert not list(tmp_path.rglob("*.png"))
    monkeypatch.setenv("DPO_MINI_FIGURES", str(tmp_path / "asked"))
    plotting.save(fig, "line", alt="a line")
    assert [path.parent.name for path in tmp_path.rglob("*.png")] == ["asked"]


def test_save_describes_a_figure_by_its_titles(notebook, tmp_path):
    fig, _ = panels(["one finding", "another"], ["x", "x"], ["y", "y"])
    plotting.save(fig, "two", folder=tmp_path)
    assert [options["metadata"] for _, options in notebook] == [
        {"image/png": {"alt": "one finding; another"}}
    ]


def run(script, folder, **env):
    """The stdout of a script in a process of its own, whose warnings are errors."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **env}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=folder, env=env, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_chapter_as_a_script_prints_its_lines_and_its_alt_texts(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    chapter = nbformat.read(ROOT / "notebooks" / "00_take_the_tour.ipynb", 4)
    cells = [cell for cell in chapter.cells if cell.cell_type == "code"]
    said = []
    for output in (output for cell in cells for output in cell.outputs):
        if output.output_type == "stream":
            said.append(output.text)
        else:
            said.append(output.metadata["image/png"]["alt"] + "\n")
    script = "\n".join(cell.source for cell in cells)
    got = run(script, tmp_path, MPLBACKEND="Agg")
    assert got == "".join(said)
    assert "DPO   = 0.7411" in got
    assert len(got) < 6000


BACKEND = """
import numpy as np
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

class Window(FigureManagerBase):
    def show(self):
        from dpo_mini.plotting import receipt
        self.canvas.draw()
        print(receipt(self.canvas.figure))
        pixels = np.asarray(self.canvas.buffer_rgba())[..., :3].reshape(-1, 3)
        print(len(np.unique(pixels, axis=0)) > 9)  # the line, its edges, text

class FigureCanvas(FigureCanvasAgg):
    manager_class = Window
"""


def test_a_script_opens_a_window_where_there_are_windows(tmp_path):
    (tmp_path / "windows.py").write_text(BACKEND)
    script = """
from dpo_mini import plotting
fig, ax = plotting.axes("a rising line", "x", "y", width=3.0, height=2.0)
ax.plot([0, 1], [0, 1])
before = plotting.receipt(fig)
plotting.save(fig, "line", alt="rises", folder=".")
assert plotting.receipt(fig) == before
"""
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    got = run(script, tmp_path, MPLBACKEND="module://windows", PYTHONPATH=path)
    alt, _, image, drawn = got.splitlines()
    assert alt == "rises"
    assert image.startswith("  image 200x300x3: ")
    assert drawn == "True"
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    assert run(script, tmp_path, MPLBACKEND="Agg") == "rises\n"


def test_panels_need_one_label_each():
    with pytest.raises(ValueError, match="`y_labels` must be equally many, got 2, 1 and 2"):
        panels(["a", "b"], ["x"], ["y", "y"])


def test_importing_plotting_leaves_the_settings_alone():
    assert matplotlib.rcParams["axes.spines.top"] == matplotlib.rcParamsDefault["axes.spines.top"]


def test_a_triangle_puts_each_action_in_its_corner_and_mixtures_between():
    corners = np.column_stack(plotting.ternary_xy(np.eye(3)))
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
    np.testing.assert_allclose(sides, 1.0, atol=1e-12)  # equilateral
    probs = np.random.default_rng(0).dirichlet([1, 1, 1], size=50)
    x, y = plotting.ternary_xy(probs)
    np.testing.assert_allclose(np.column_stack([x, y]), probs @ corners, atol=1e-12)
    assert np.allclose(plotting.ternary_xy([1 / 3, 1 / 3, 1 / 3]), corners.mean(0))


def test_the_grid_of_a_triangle_has_every_distribution_once():
    grid = plotting.ternary_grid(4)
    assert grid.shape == (15, 3)
    assert len({tuple(row) for row in grid.tolist()}) == 15
    np.testing.assert_array_equal(grid.sum(1), 1.0)
    assert (grid >= 0).all()


def test_a_triangle_draws_its_frame_its_corners_and_the_heights():
    fig, ax = axes("a hill", "", "")
    plotting.ternary(ax, ["left", "right", "top"])
    grid = plotting.ternary_grid(10)
    plotting.ternary_contours(ax, grid, 2.0 * grid[:, 2] - 1.0, [-0.5, 0.0, 0.5])
    text = receipt(fig)
    assert "text: left | right | top" in text
    assert "4 points, x 0..1, y 0..0.866" in text
    assert "field (no label): -0.75..0.75" in text  # the middles of the outer bands
    assert [note.xy for note in ax.texts] == [(0, 0), (1, 0), (0.5, np.sqrt(0.75))]


def cloud(**changes):
    given = {
        "probs": torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.5, 0.3, 0.2]]),
        "chances": torch.tensor([0.5, 0.25, 0.25]),
        "marks": {"now": [1.0, 0.0, 0.0], "exact": [0.0, 1.0, 0.0], "mean": [0.0, 0.0, 1.0]},
    }
    fig, ax = axes("a cloud", "", "")
    plotting.ternary_cloud(ax, **{**given, **changes})
    return fig, ax


def test_a_cloud_has_one_dot_per_place_with_its_probability_as_area():
    fig, ax = cloud()
    (dots,) = ax.collections
    by_place = {
        tuple(xy.round(2)): area
        for xy, area in zip(dots.get_offsets(), dots.get_sizes(), strict=True)
    }
    assert by_place == {(0.4, 0.17): 675.0, (0.55, 0.43): 225.0}
    text = receipt(fig)
    assert "points (no label): 2 points, x 0.4..0.55" in text
    assert "line 'now': 1 points, x 0..0, y 0..0" in text
    assert "line 'exact': 1 points, x 1..1, y 0..0" in text
    assert "line 'mean': 1 points, x 0.5..0.5, y 0.866..0.866" in text
    assert [line.get_marker() for line in ax.lines] == ["o", "s", "x"]


def test_panels_may_stand_in_rows():
    fig, axs = panels(list("abcd"), [""] * 4, [""] * 4, rows=2, height=6)
    fig.canvas.draw()
    (a, b, c, d) = (ax.get_position() for ax in axs)
    assert a.y0 == b.y0 > c.y0 == d.y0
    assert a.x0 == c.x0 < b.x0 == d.x0
    with pytest.raises(ValueError, match="`rows` must divide the 4 titles, got 3"):
        panels(list("abcd"), [""] * 4, [""] * 4, rows=3)
    with pytest.raises(ValueError, match="`rows` must be a whole number >= 1, got 0"):
        panels(list("abcd"), [""] * 4, [""] * 4, rows=0)


def test_what_is_no_triangle_is_refused():
    _, ax = axes("t", "", "")
    with pytest.raises(ValueError, match="`corners` must be 3 names, got 2"):
        plotting.ternary(ax, ["a", "b"])
    with pytest.raises(ValueError, match=r"`probs` must have shape \[n, 3\] or \[3\], got \[2\]"):
        plotting.ternary_xy([0.5, 0.5])
    with pytest.raises(
        ValueError, match="`probs` must have rows that sum to 1, got one that sums to 0.9"
    ):
        plotting.ternary_xy([[0.5, 0.3, 0.2], [0.5, 0.3, 0.1]])
    with pytest.raises(ValueError, match="`n_steps` must be a whole number >= 1, got 0"):
        plotting.ternary_grid(0)


def test_named_points_say_each_name_and_value_once():
    fig, ax = axes("bias", "TV", "")
    plotting.named_points(ax, {"right": {"pairs": 0.0}, "wrong": {"best": 0.25, "next": 1e-9}})
    text = receipt(fig)
    assert "text: pairs  0 | best  0.25 | next  0" in text
    assert "line 'wrong': 2 points, x 0..0.25, y 1..2" in text
    assert [line.get_color() for line in ax.lines] == ["#0072B2", "#009E73"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["right", "wrong"]


def test_a_decision_chart_leads_from_question_to_question():
    fig, ax = axes("which one?", "", "")
    chart = {"pairs?": "DPO", "scores?": "REBEL\nor DRO"}
    plotting.decision_chart(ax, chart, otherwise="collect pairs")
    said = [text.get_text() for text in ax.texts]
    assert [text for text in said if text not in ("", "yes", "no")] == [
        "pairs?", "scores?", "collect pairs", "DPO", "REBEL\nor DRO",
    ]  # fmt: skip
    assert (said.count("yes"), said.count("no"), said.count("")) == (2, 2, 4)
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert places["pairs?"][0] == places["scores?"][0] == places["collect pairs"][0]
    assert places["DPO"] == (0.75, 0)
    assert places["collect pairs"] == (0.25, 2)
    arrows = [text for text in ax.texts if text.get_text() == ""]
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [
        ((0.25, 0), (0.75, 0)), ((0.25, 0), (0.25, 1)),
        ((0.25, 1), (0.75, 1)), ((0.25, 1), (0.25, 2)),
    ]  # fmt: skip
    assert "text: pairs? | scores? | collect pairs | DPO | REBEL\nor DRO | yes | no" in receipt(fig)


def test_a_decision_chart_refuses_empty_texts():
    _, ax = axes("t", "x", "y")
    with pytest.raises(ValueError, match="`questions` must be at least one, .*, got 0 questions"):
        plotting.decision_chart(ax, {}, otherwise="stop")
    for chart, otherwise in (({"a?": " "}, "stop"), ({"": "b"}, "stop"), ({"a?": "b"}, "")):
        with pytest.raises(ValueError, match="neither they nor `otherwise` empty, got 1 questions"):
            plotting.decision_chart(ax, chart, otherwise=otherwise)


def test_named_points_refuse_what_they_cannot_draw():
    _, ax = axes("t", "", "")
    with pytest.raises(ValueError, match="`groups` must have at least one name, got none"):
        plotting.named_points(ax, {"empty": {}})
    with pytest.raises(ValueError, match="`groups` must have finite values, got nan"):
        plotting.named_points(ax, {"g": {"a": float("nan")}})
    with pytest.raises(ValueError, match="`groups` must have at most 6 labels, got 7"):
        plotting.named_points(ax, {str(i): {"a": 0.0} for i in range(7)})


def test_curves_have_looks_of_their_own():
    _, ax = plotting.axes("t", "x", "y")
    plotting.curves(ax, [0, 1], {name: [i, i + 1] for i, name in enumerate("abcdef")})
    assert [line.get_label() for line in ax.lines] == list("abcdef")
    assert [line.get_ydata()[0] for line in ax.lines] == list(range(6))
    assert len({line.get_color() for line in ax.lines}) == 6
    assert (ax.lines[0].get_color(), ax.lines[0].get_linestyle()) == ("black", "--")
    assert ax.get_legend() is not None
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"`named` must have 1 to 6 names, got {count}"):
            plotting.curves(ax, [0], {str(i): [0] for i in range(count)})


def test_what_varies_is_named_in_the_receipt_without_its_values():
    fig, ax = axes("finding", "x", "y")
    ax.plot([0, 1, 2], [3.25, 4.5, 5.75], label="kept")
    (line,) = ax.plot([0, 1], [6.25, 7.5], label="chaotic")
    text = ax.text(0, 0, "8.125")
    ax.text(0, 1, "said")
    leave_out_values(line, text)
    got = receipt(fig)
    assert "line 'kept': 3 points, x 0..2, y 3.25..5.75" in got
    assert "line 'chaotic': 2 points, which vary" in got
    assert got.endswith("text: said")
    assert not any(number in got for number in ("6.25", "7.5", "8.125"))


def test_vector_fields_draw_arrows_where_there_is_a_length():
    places = np.linspace(-2, 2, 5)
    x, y = np.meshgrid(places, places)
    still = np.where(x > 0, 0.0, 2.0)  # nothing in the right half
    fields = {"out": (x, y), "left": (-still, 0 * x)}
    fig = plotting.vector_fields(fields, places, "a (nats)", "b (nats)", title="two", columns=3)
    assert len([ax for ax in fig.axes if ax.get_label() != "<colorbar>"]) == 2
    text = receipt(fig)
    assert text.startswith("[two]\n[out] x: a (nats) | y: b (nats)\n")
    # every second tick: nine arrows less the one at the origin, which cancel out
    assert "arrows: 8, mean 0 0\n[left] x: a (nats) | y: " in text
    assert text.endswith("field (no label): 0.301..0.301\n  arrows: 6, mean -1 0")
    assert "field (no label): 0..0.4515" in text  # the corners' length is 8 ** 0.5
    bar = next(ax for ax in fig.axes if ax.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "length"
    swapped = plotting.vector_fields(
        {"out": (-x, y + 1)}, places, "a", "b", length_label="slope", columns=1
    )
    assert swapped.axes[-1].get_ylabel() == "slope"
    assert f"arrows: 9, mean 0 {(1 + 6 / 13**0.5) / 9:.4g}" in receipt(swapped)


def test_a_field_without_any_arrow_has_a_receipt():
    nothing = np.zeros((3, 3))
    fig = plotting.vector_fields({"still": (nothing, nothing)}, [0, 1, 2], "a", "b")
    assert receipt(fig).endswith("field (no label): nothing finite\n  arrows: 0, mean 0 0")


def test_vector_fields_refuse_what_they_cannot_draw():
    one = np.ones((3, 3))
    with pytest.raises(ValueError, match="`named` must have at least one panel"):
        plotting.vector_fields({}, [0, 1, 2], "a", "b")
    with pytest.raises(ValueError, match="`columns` must be a whole number >= 1, got 0"):
        plotting.vector_fields({"f": (one, one)}, [0, 1, 2], "a", "b", columns=0)
    with pytest.raises(
        ValueError,
        match=r"`named\['f'\]` must be finite \[n, n\], got shape \[3, 3\], finite: True",
    ):
        plotting.vector_fields({"f": (one, one)}, [0, 1], "a", "b")
    with pytest.raises(
        ValueError, match=r"must be finite \[n, n\], got shape \[3, 3\], finite: False"
    ):
        plotting.vector_fields({"f": (one, one * np.inf)}, [0, 1, 2], "a", "b")


def ax_of_its_own():
    return axes("t", "x", "y")[1]


def hill(**changes):
    given = {"probs": plotting.ternary_grid(2), "heights": np.arange(6.0), "levels": [2.5]}
    plotting.ternary_contours(ax_of_its_own(), **{**given, **changes})


GRAD = torch.zeros(2, requires_grad=True)
REFUSED = [
    (lambda: grouped_bars(None, ["a"], {"dpo": [1.0]}), "`ax` must be of type Axes, got NoneType"),
    (lambda: plotting.curves("ax", [0], {"a": [0]}), "`ax` must be of type Axes, got str"),
    (lambda: label_lines(3), "`ax` must be of type Axes, got int"),
    (lambda: plotting.named_points([], {"g": {"a": 0}}), "`ax` must be of type Axes, got list"),
    (lambda: plotting.decision_chart(0, {"a": "b"}, otherwise="c"), "`ax` must be of type Axes"),
    (lambda: plotting.ternary(None, "abc"), "`ax` must be of type Axes"),
    (lambda: grouped_bars(ax_of_its_own(), ["a"], {}), "`groups` must have at least one name"),
    (lambda: grouped_bars(ax_of_its_own(), ["a"], [1.0]), "`groups` must be of type Mapping"),
    (
        lambda: grouped_bars(ax_of_its_own(), ["a", "b"], {"dpo": GRAD}),
        "`groups` must be real numbers, got others: .*detach",
    ),
    (
        lambda: grouped_bars(ax_of_its_own(), ["a"], {"dpo": [1j]}),
        "`groups` must be real numbers, got complex128",
    ),
    (lambda: plotting.curves(ax_of_its_own(), [0], [0]), "`named` must be of type Mapping"),
    (
        lambda: plotting.curves(ax_of_its_own(), [10**400], {"a": [0]}),
        "`x` must be real numbers, got others",
    ),
    (
        lambda: plotting.curves(ax_of_its_own(), [0], {"a": torch.zeros(1).to_sparse()}),
        "`named` must be real numbers, got others",
    ),
    (lambda: label_lines(ax_of_its_own(), gap="wide"), "`gap` must be a number, got str"),
    (lambda: label_lines(ax_of_its_own(), gap=float("nan")), "`gap` must be a number in"),
    (lambda: plotting.named_points(ax_of_its_own(), {"g": 1.0}), "`groups` must be of type Map"),
    (
        lambda: plotting.named_points(ax_of_its_own(), {"g": {"a": None}}),
        "`groups` must have finite values, got nan",
    ),
    (
        lambda: plotting.decision_chart(ax_of_its_own(), ["a"], otherwise="c"),
        "`questions` must be of type Mapping, got list",
    ),
    (
        lambda: plotting.decision_chart(ax_of_its_own(), {"a": "b"}, otherwise=None),
        "`questions, otherwise` must be of type str, got NoneType",
    ),
    (lambda: plotting.ternary_xy(1j), "`probs` must be real numbers, got complex128"),
    (lambda: plotting.ternary_grid(1.0), "`n_steps` must be a whole number >= 1, got float"),
    (
        lambda: plotting.ternary_grid(torch.zeros(2)),
        "`n_steps` must be a whole number >= 1, got Tensor",
    ),
    (lambda: hill(heights=np.arange(5.0)), r"`heights` must be finite, one per row of `probs`"),
    (lambda: hill(heights=np.full(6, np.nan)), r"`heights` must .* got shape \[6\], finite: False"),
    (lambda: hill(levels=GRAD), "`levels` must be real numbers"),
    (lambda: cloud(chances=[0.5, 0.5]), r"`chances` must be >= 0, one per row .* got shape \[2\]"),
    (lambda: cloud(chances=[0.5, 0.6, -0.1]), "`chances` must be >= 0, .* smallest -0.1"),
    (lambda: cloud(chances=[0.5, 0.5, np.nan]), "`chances` must be >= 0"),
    (lambda: cloud(marks=[1]), "`marks` must be of type Mapping, got list"),
    (
        lambda: cloud(marks={name: [1.0, 0.0, 0.0] for name in "abcd"}),
        "`marks` must have at most 3 names, got 4",
    ),
    (lambda: plotting.vector_fields([1], [0], "a", "b"), "`named` must be of type Mapping"),
    (lambda: plotting.vector_fields({"f": (GRAD, GRAD)}, [0, 1], "a", "b"), "`named` must be real"),
    (lambda: plotting.vector_fields({"f": (0, 0)}, 1j, "a", "b"), "`places` must be real numbers"),
    (lambda: plotting.show("fig", alt="x"), "`fig` must be of type Figure, got str"),
    (
        lambda: plotting.show(axes("t", "x", "y")[0], alt=None),
        "`alt` must be of type str, got None",
    ),
    (lambda: plotting.save(None, "name"), "`fig` must be of type Figure, got NoneType"),
    (lambda: leave_out_values("line"), "`artists` must be of type Artist, got str"),
    (lambda: receipt(None), "`fig` must be of type Figure, got NoneType"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_drawn_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_more_columns_than_panels_are_as_many_as_panels():
    one = np.ones((3, 3))
    fig = plotting.vector_fields({"f": (one, one)}, [0, 1, 2], "a", "b", columns=2**62)
    assert len([ax for ax in fig.axes if ax.get_label() != "<colorbar>"]) == 1
