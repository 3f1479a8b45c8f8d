"""Pictures of measured costs: what is on them, told from the texts in an SVG."""

import re
from collections import Counter
from dataclasses import replace
from html import unescape
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from subquad.compare.cost_curves import draw, figures
from subquad.compare.curves import apart, name_ends
from subquad.compare.families import FAMILIES, REPRESENTATIVE, by_family, family
from subquad.errors import UserError
from subquad.layers import available

FEW = ["Mamba2", "Attention", "Attention, window 512", "Hyena"]
MANY = ["LatentAttention", "RWKV5", "RWKV6", "Retention", "Mamba2", "GatedLinearAttention", "DeltaNet", "RWKV7", "S4"]
MANY += ["Mamba", "HGRN", "MinGRU", "Attention", "my.own.Layer"]


def texts(path):
    """Each text drawn, with how often; matplotlib leaves them as comments beside their outlines."""
    return Counter(unescape(text).strip() for text in re.findall(r"<!-- (.*?) -->", path.read_text(), re.S))


def test_families_come_from_the_ops():
    assert family("Attention, window 512") == "attention and sparse"
    assert family("MLSTM") == family("Mamba2") == "linear attention"
    assert family("RWKV7") == "delta rules"
    assert family("Mamba") == family("S4") == "scans and SSMs"
    assert family("Hyena") == "convolutions"
    assert family("SwiGLU") == family("my.own.Layer") == "others"
    mixers = [name for name, layer in available().items() if layer.kind == "mixer" and name != "Parallel"]
    assert "others" not in by_family(mixers)
    assert set(by_family(REPRESENTATIVE)) == set(FAMILIES) - {"others"}


def test_few_subjects_share_a_panel_a_measure(made_up, tmp_path):
    path = tmp_path / "cost.svg"
    draw(made_up(FEW), path)
    drawn = texts(path)
    assert [drawn[name] for name in FEW] == [5] * 4
    titles = "training: forward and backward (ms)", "prefill (ms)", "decoding one token (ms)", "state (bytes)"
    assert all(drawn[title] == 1 for title in (*titles, "peak memory of training (bytes)"))
    assert drawn["16,384"] == 5
    assert any(
        "No time: Attention (train) from 16,384 tokens: does not fit: needs about 38 GB" in text for text in drawn
    )
    assert any("Example & Sons" in text and "batch 1" in text and "2026-01-31" in text for text in drawn)


def test_many_subjects_are_divided_into_families_with_the_reference_in_each(made_up, tmp_path):
    path = tmp_path / "cost.svg"
    found = made_up(MANY, (1024, 4096))
    draw(replace(found, points=[p for p in found.points if p.phase == "prefill"]), path)
    drawn = texts(path)
    families = by_family(MANY)
    assert list(families) == [name for name in FAMILIES if name != "convolutions"]
    assert all(drawn[name] == 1 for name in families)
    assert drawn["prefill (ms)"] == drawn["state (bytes)"] == drawn["Attention"] / 2 == len(families)
    assert all(drawn[name] == 2 for name in MANY if name != "Attention")


def test_one_text_for_one_picture(made_up, tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    found = made_up(["Attention", "Mamba2"], (64, 128))
    found = replace(found, points=[p for p in found.points if p.phase == "train"])
    draw(found, first)
    draw(found, second)
    assert first.read_bytes() == second.read_bytes()


def test_names_do_not_cover_each_other():
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(1, 10), ylim=(1, 100))
    name_ends(axes, [(f"layer {i}", 10, y, "0.2") for i, y in enumerate((90, 99, 95, 3, 3.1, 1))])
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert [text.get_text() for text in sorted(axes.texts, key=lambda text: text.get_position()[1])] == [
        f"layer {i}" for i in (5, 3, 4, 0, 2, 1)
    ]


def test_places_stay_near_those_wanted():
    assert apart([0.2, 0.5], 0.1) == [0.2, 0.5]
    assert apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert apart([0.1, 0.99, 1.0], 0.1) == pytest.approx([0.1, 0.9, 1.0])
    assert apart([0.0, 0.02, 0.5], 0.1) == pytest.approx([0.0, 0.1, 0.5])
    assert apart([0.5] * 4, 0.5) == [0.0, 0.5, 1.0, 1.5]  # no room
    assert apart([], 0.1) == []


def test_a_layer_without_a_state_has_no_line_for_it(made_up, tmp_path):
    found = made_up(["Attention", "SwiGLU"])
    points = [replace(p, state_bytes=0) if p.subject == "SwiGLU" and p.phase == "decode" else p for p in found.points]
    path = tmp_path / "cost.svg"
    draw(replace(found, points=[p for p in points if p.phase == "decode"]), path)
    assert texts(path)["SwiGLU"] == 1
    assert texts(path)["Attention"] == 2


def test_figures_of_a_few(made_up, tmp_path):
    written = figures(made_up(MANY), tmp_path)
    assert [path.name for path in written] == ["training.png", "prefill.png", "decode.png", "state.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000 for path in written)
    (svg,) = figures(
        replace(made_up(MANY), points=[p for p in made_up(MANY).points if p.phase == "train"]), tmp_path, suffix=".svg"
    )
    drawn = texts(svg)
    assert {name for name in MANY if drawn[name]} == set(REPRESENTATIVE) & set(MANY)
    assert any("No time: Attention (train) from 16,384 tokens: does not fit" in text for text in drawn)


def test_refusals(made_up, tmp_path):
    found = made_up(["Mamba2"], (64,))
    with pytest.raises(UserError, match=r"cost.gif: pictures are drawn as .png or .svg, by the name's ending"):
        draw(found, tmp_path / "cost.gif")
    with pytest.raises(UserError, match="there is nothing to draw in"):
        draw(replace(found, points=[]), tmp_path / "cost.png")
    with pytest.raises(UserError, match=r"none of Attention, Retention, .* was measured"):
        figures(made_up(["SwiGLU"], (64,)), tmp_path)
    (tmp_path / "cost.png").write_text("mine")
    with pytest.raises(UserError, match=r"exists; pass overwrite"):
        draw(found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_text() == "mine"
