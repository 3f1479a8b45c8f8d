"""The shipped measurements, the README's tables made from them, and the command that writes them anew."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from subquad import cli
from subquad.compare import claims, cost_curves, kernels, refresh, results, shipped
from subquad.compare.cpu import pairs
from subquad.compare.kernel_cases import CASES
from subquad.compare.models import find_config
from subquad.compare.output import typed, without_outputs
from subquad.compare.readme_tables import TABLES, kernel_rows, survey_rows
from subquad.errors import UserError

README = Path(__file__).parents[2] / "README.md"
PAGE = "# Page\n\n<!-- measured: one -->\n\nold\n\n<!-- end -->\n\ntext\n\n<!-- measured: two -->\n<!-- end -->\n"
PAGE_OF_FIGURES = f"<!-- measured: {min(TABLES)} -->\n<!-- end -->\n\n![state](figures/cpu/state.svg)\n"
MADE = {"one": lambda: ["| 1 |"], "two": lambda: ["| 2 |", "| 3 |"]}


def test_the_readme_is_in_step_with_the_shipped_files(capsys):
    assert cli.main(["compare", "refresh", str(README), "--check"]) == 0, capsys.readouterr().out
    marked = {name for name, _ in refresh.BLOCK.findall(README.read_text(encoding="utf-8"))}
    wanted = {"layers", "survey cpu", "transformers cpu", "kernels h200", "decode cpu"}
    wanted |= {"recall"} if (shipped.folder() / "recall.jsonl").exists() else set()
    assert wanted <= marked <= set(TABLES)


def test_figures_are_drawn_again_from_what_is_shipped(tmp_path, capsys):
    page = tmp_path / "PAGE.md"
    page.write_text(PAGE_OF_FIGURES)
    assert cli.main(["compare", "refresh", str(page), "--check"]) == 1
    assert "the figure figures/cpu/state.svg is out of step with the shipped measurements" in capsys.readouterr().out
    assert cli.main(["compare", "refresh", str(page)]) == 0
    assert "figures/cpu/state.svg changed" in capsys.readouterr().out
    assert cli.main(["compare", "refresh", str(page), "--check"]) == 0
    drawn = tmp_path / "figures" / "cpu" / "state.svg"
    other = cost_curves.fingerprint(replace(shipped.costs("cpu"), created="2020-01-01"))
    drawn.write_text(drawn.read_text().replace(cost_curves.fingerprint(shipped.costs("cpu")), other))
    assert cli.main(["compare", "refresh", str(page), "--check"]) == 1


def test_the_readme_shows_the_costs():
    shown = {path for path, _ in refresh.FIGURE.findall(README.read_text(encoding="utf-8"))}
    assert {f"figures/cpu/{name}.svg" for name in ("training", "prefill", "decode", "state")} <= shown


def test_every_file_says_where_it_comes_from():
    for name in shipped.names():
        document = shipped.document(name)
        assert document["machine"]["name"], name
        assert document["versions"].keys() >= {"torch", "triton"}, name
        assert "command" in document and "created" in document, name
        assert ("rows" in document) != ("points" in document), name
        if "points" in document:
            results.load(shipped.path(name))
        assert document["command"].split() == without_outputs(document["command"].split()), "no paths in shipped files"


def test_files_have_what_their_commands_measure():
    rows = shipped.document("transformers_cpu")["rows"]
    assert [row["model"] for row in rows] == list(pairs(64, 2))
    for row in rows:
        for phase in ("prefill", "decode"):
            ours, theirs = (row[f"{phase} tokens/s, {library}"] for library in ("ours", "transformers"))
            assert row[f"{phase} ratio"] == pytest.approx(ours / theirs, abs=0.02)
    cases = {(case.name, case.op): case for case in CASES}
    for name in ("kernels_h200", "kernels_h200_peers"):
        for row in shipped.document(name)["rows"]:
            libraries = {"ours", "torch", *cases[row["case"], row["op"]].peers}
            assert row["library"] in libraries
            assert set(kernels.COLUMNS) <= set(row)
    for point in results.load(shipped.path("decode_cpu")).points:
        find_config(point.subject)


def test_rows_of_kernels():
    def row(library, forward, train, case="delta", shape="B8T2048H16D128"):
        found = {"case": case, "op": "delta_rule", "shape": shape, "library": library, "forward floor ms": 0.1}
        return found | {"forward ms": forward, "train ms": train, "forward / floor": forward and forward / 0.1}

    rows = [row("ours", 0.2, 0.5), row("fla", 0.4, None), row("torch", 9.0, 9.0), row("mamba_ssm", None, None)]
    rows += [row("ours", 1.0, 2.0, shape="B1T32768H16D128"), row("ours", None, None, case="KDA")]
    assert kernel_rows(rows) == [
        ["`delta_rule`, delta", "8 x 2,048", "0.200", "0.100", "2.0", "0.500", "fla 0.400 (2.0x)"],
        ["", "1 x 32,768", "1.000", "0.100", "10.0", "2.000", ""],
    ]


def test_rows_of_the_survey(made_up):
    found = [row for row in claims.rows(made_up(["Attention", "Mamba"])) if row["table"] == "survey"]
    rows = survey_rows(found)
    assert len(rows) == 24
    assert rows[0][:3] == ["Transformer (parallel)", "training compute", "O(T^2 D)"]
    assert rows[2][3] == f"{16384**2 * 256 / 1e9:.1f} G at 16,384"
    assert rows[2][4:] == ["2", "2.00 (2.00 to 2.00)", "agrees"]
    mamba = [row[0] for row in rows].index("Mamba (parallel scan)")
    assert rows[mamba + 3][1:] == ["decode a token", "O(N D)", rows[mamba + 3][3], "0", "0.00 (0.00 to 0.00)", "agrees"]
    assert rows[-1] == ["", "decode a token", "O(D)", "", "0", "", "not measured"]


def test_tables_are_rewritten_between_their_marks_and_nothing_else():
    new = refresh.rewrite(PAGE, "page", MADE)
    assert new == PAGE.replace("old", "| 1 |").replace("two -->\n", "two -->\n\n| 2 |\n| 3 |\n\n")
    assert refresh.rewrite(new, "page", MADE) == new


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("text", "page has no line <!-- measured: NAME -->"),
        (PAGE.replace("two", "tow"), "page: there is no table 'tow'; did you mean 'two'?"),
        (PAGE.replace("<!-- end -->\n\ntext", "text"), "has no <!-- end --> before the next one"),
    ],
)
def test_a_page_with_wrong_marks(page, said):
    with pytest.raises(UserError, match=said):
        refresh.rewrite(page, "page", MADE)


def test_refresh_writes_what_is_out_of_step(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: transformers cpu -->\nold\n<!-- end -->\n")
    assert cli.main(["compare", "refresh", str(page), "--check"]) == 1
    assert "'transformers cpu' is out of step" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert cli.main(["compare", "refresh", str(page)]) == 0
    assert "| mamba2 |" in page.read_text()
    assert cli.main(["compare", "refresh", str(page), "--check"]) == 0
    assert cli.main(["compare", "refresh", str(tmp_path / "none.md")]) == 2
    assert "run this in the checkout" in capsys.readouterr().err
    assert cli.main(["compare", "refresh", str(page), "--check", "--measure", "decode_cpu"]) == 2
    assert cli.main(["compare", "refresh", str(page), "--measure", "kernels_h200_peers"]) == 2
    assert "it was not measured by subquad compare" in capsys.readouterr().err
    assert cli.main(["compare", "refresh", str(page), "--measure", "decod_cpu"]) == 2
    assert "did you mean 'decode_cpu'?" in capsys.readouterr().err


def test_measuring_again_runs_the_command_of_the_file(tmp_path, capsys, monkeypatch):
    about = results.begin(
        "subquad compare decode attention --contexts 8 --new-tokens 2 --csv x.csv", torch.device("cpu"), {}
    )
    about.save(tmp_path / "small.json")
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    monkeypatch.setitem(TABLES, "layers", lambda: ["new"])
    small = shlex.split(f"--json {tmp_path / 'small.json'} --overwrite")
    assert shlex.join(refresh.command("small")[:-3]) == "subquad compare decode attention --contexts 8 --new-tokens 2"
    assert refresh.command("small")[-3:] == small
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: layers -->\n<!-- end -->\n")
    assert cli.main(["compare", "refresh", str(page), "--measure", "small"]) == 0
    assert "$ subquad compare decode attention --contexts 8 --new-tokens 2" in capsys.readouterr().out
    measured = results.load(tmp_path / "small.json")
    assert measured.command == "subquad compare decode attention --contexts 8 --new-tokens 2"
    assert [(p.subject, p.tokens) for p in measured.points] == [("attention", 8)]


def test_commands_are_kept_without_what_they_write():
    words = ["a", "--contexts", "1", "2", "--json", "x.json", "--png=x.png", "--batch", "1", "--overwrite", "b"]
    assert typed("compare decode", words) == "subquad compare decode a --contexts 1 2 --batch 1 b"
    assert typed("compare cpu", None) == "subquad compare cpu"


def test_a_device_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    (tmp_path / "costs_cpu.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="no shipped measurements of 'tpu', only of cpu; give a file of"):
        shipped.costs("tpu")
