"""The picture, read back: its pixels are the cosines' colours, in the right places."""

import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from safemerge_callback.errors import ConfigError
from safemerge_callback.reports import Cell, History, draw_heat_map, write_heat_map

SEVEN = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def history(layers=30, types=("self_attn.q_proj", "self_attn.v_proj"), steps=range(0, 61, 5), limit=0.35, **changed):
    made = History("run", gate="threshold", knob=limit, **changed)
    for i in range(layers):
        for j, kind in enumerate(types):
            for step in steps:
                cosine = 0.45 + 0.2 * math.sin(i + j) - step / 1000
                made.cells[f"layers.{i}.{kind}", step] = Cell(cosine, 0.7, "measured", limit=limit)
                if cosine < 0.3 and step:
                    made.merges[f"layers.{i}.{kind}", step] = 0.8
    return made


def shown(axes):
    return np.asarray(axes.images[0].get_array())


@pytest.mark.parametrize(
    ("layers", "types", "steps"),
    [(30, SEVEN[0:3:2], range(0, 61, 5)), (32, SEVEN, range(0, 2001, 50)), (32, SEVEN, [0])],
)
def test_the_file_is_a_picture_of_every_module(tmp_path, layers, types, steps):
    made = history(layers, types, steps)
    picture = imread(write_heat_map(made, tmp_path / "a" / "drift.png"))
    height, width = picture.shape[:2]
    assert 1000 < width < 2400
    assert 700 < height < 1300
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50
    ink = (picture[..., :3] < 0.99).any(axis=-1)
    assert 0.25 < ink.mean() < 0.95
    # Nothing touches the border, so nothing was cut off.
    assert not ink[:5].any()
    assert not ink[-5:].any()
    assert not ink[:, :5].any()
    assert not ink[:, -5:].any()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["drift.png"]


def test_every_cell_has_its_cosines_colour(tmp_path):
    made = history(layers=12)
    made.cells["layers.3.self_attn.q_proj", 20] = Cell(math.nan, 0.7, "broken")
    made.cells["layers.4.self_attn.q_proj", 25] = Cell(1.0, 0.7, "still")
    del made.cells["layers.5.self_attn.v_proj", 30]
    figure = draw_heat_map(made)
    top = 0.65
    assert max(cell.cosine for cell in made.cells.values() if cell.state == "measured") == pytest.approx(0.65, abs=0.05)
    scale = figure.axes[-1]
    assert scale.get_ylim() == pytest.approx((0.0, top))
    for axes, kind in zip(figure.axes[:2], ("q_proj", "v_proj"), strict=True):
        assert axes.get_title(loc="left") == kind
        shades = shown(axes)
        assert shades.shape == (12, 13, 4)
        for (name, step), cell in made.cells.items():
            if name.endswith(kind) and cell.state == "measured":
                expected = colormaps["viridis"](cell.cosine / top)
                assert shades[int(name.split(".")[1]), step // 5] == pytest.approx(expected, abs=1e-6)
    assert shown(figure.axes[0])[3, 4, :3] == pytest.approx((0.84, 0.12, 0.16))
    assert shown(figure.axes[0])[4, 5, :3] == pytest.approx((0.87, 0.87, 0.87))
    assert shown(figure.axes[1])[5, 6, 3] == 0.0
    # The middle of a cell in the file is that cell's colour too.
    figure.savefig(tmp_path / "x.png", dpi=100)
    picture = imread(tmp_path / "x.png")
    x, y = figure.axes[0].transData.transform((2, 7))
    pixel = picture[round(picture.shape[0] - y), round(x), :3]
    assert pixel == pytest.approx(shown(figure.axes[0])[7, 2, :3], abs=0.01)


def test_merged_cells_carry_a_dot(tmp_path):
    made = history(layers=12)
    figure = draw_heat_map(made)
    dots = {
        (f"layers.{round(y)}.self_attn.{axes.get_title(loc='left')}", 5 * round(x))
        for axes in figure.axes[:2]
        for spots in axes.collections
        for x, y in spots.get_offsets()
    }
    assert dots == set(made.merges)
    assert len(dots) > 5
    figure.savefig(tmp_path / "x.png", dpi=100)
    picture = imread(tmp_path / "x.png")
    name, step = next(iter(dots))
    axes = figure.axes[0 if name.endswith("q_proj") else 1]
    x, y = axes.transData.transform((step // 5, int(name.split(".")[1])))
    assert picture[round(picture.shape[0] - y), round(x), :3] == pytest.approx((1, 1, 1), abs=0.02)


def test_a_merge_taken_back_has_another_dot():
    made = history(layers=12)
    key = next(iter(made.merges))
    made.undone[key] = 1.0
    figure = draw_heat_map(made)
    faces = [tuple(face) for axes in figure.axes[:2] for spots in axes.collections for face in spots.get_facecolors()]
    assert faces.count((*to_rgb("#ffb000"), 1.0)) == 1
    assert len(faces) == len(made.merges)
    assert "taken back" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_title_scale_and_legend_say_the_rule():
    figure = draw_heat_map(history())
    words = " ".join(text.get_text() for text in figure.texts)
    assert "60 modules, 13 checks, gate threshold 0.35" in words
    assert "merges in" in words
    scale = figure.axes[-1]
    assert [line.get_ydata()[0] for line in scale.lines] == [0.35, 0.35]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["merged", "threshold"]
    watched = history(layers=2, limit=math.nan)
    watched.gate, watched.merges = "watch", {}
    figure = draw_heat_map(watched)
    assert not figure.axes[-1].lines
    assert "nothing merged" in " ".join(text.get_text() for text in figure.texts)
    assert not figure.legends


def test_a_threshold_above_all_cosines_is_on_the_scale():
    made = history(layers=2, steps=[0], limit=0.9)
    assert draw_heat_map(made).axes[-1].get_ylim()[1] >= 0.9


def test_odd_modules_and_names_are_drawn(tmp_path):
    made = History("$run_{", gate="num_layers", knob=3)
    for name in ("embed_tokens", "layers.0.$x^", "layers.1.$x^", "vision.0.mlp.fc", "lm_head"):
        made.cells[name, 0] = Cell(math.nan, 0.5, "broken")
    picture = imread(write_heat_map(made, tmp_path / "drift.png"))
    red = np.isclose(picture[..., :3], (0.84, 0.12, 0.16), atol=0.02).all(axis=-1)
    assert red.mean() > 0.02
    for ending in (".svg", ".pdf"):
        assert write_heat_map(made, tmp_path / f"drift{ending}").stat().st_size > 2000


def test_the_dots_edge_and_background_differ_from_every_colour_of_the_scale():
    colours = colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]
    for other in ("white", (0.87, 0.87, 0.87), (0.84, 0.12, 0.16)):
        assert np.abs(colours - to_rgb(other)).max(axis=1).min() > 0.1


def test_outputs_that_cannot_be(tmp_path):
    made = history(layers=2, steps=[0])
    with pytest.raises(ConfigError, match=r"end in one of \.png, \.pdf, \.svg"):
        write_heat_map(made, tmp_path / "drift.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_heat_map(made, tmp_path / "file" / "drift.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_without_matplotlib_the_table_works_and_the_picture_names_the_extra():
    code = """
import sys
sys.modules["matplotlib"] = None
from safemerge_callback.errors import ConfigError
from safemerge_callback.reports import Cell, History, draw_heat_map, summary
made = History("run", {("layers.0.a", 0): Cell(0.5, 0.5, "measured")}, gate="all")
assert "layers.0.a at 0" in summary(made)
try:
    draw_heat_map(made)
except ConfigError as error:
    assert "safemerge-callback[report]" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
