"""`subquad compare kernels` without a GPU: its cases, its peers' signatures, table, files, refusals and tuning."""

import csv
import inspect
import json
from importlib import import_module

import pytest
import torch
from rich.console import Console

from subquad import cli
from subquad.compare import kernels
from subquad.compare.kernel_cases import CASES, Peer, Sizes
from subquad.compare.kernel_timing import Figures, floor, trainable
from subquad.compare.kernel_tune import Run, tune
from subquad.compare.results import begin
from subquad.errors import UserError
from subquad.kernels.examples import differences, load_ops
from subquad.kernels.triton import configs

TINY = Sizes(1, 40, 2, 8)
BY_NAME = {case.name: case for case in CASES}
COMMAND = ["compare", "kernels"]


@pytest.fixture
def all_ops(monkeypatch):
    """As if every op had a Triton form."""
    forms = {op: (*dict.fromkeys((*forms, "triton")),) for op, forms in load_ops().items()}
    monkeypatch.setattr(kernels, "load_ops", lambda: forms)


def made_up(shape=kernels.SHAPES[0], **changed):
    """Rows as `compare` makes them: of each case ours, its peers and the torch form."""
    rows = []
    for case in CASES:
        for i, library in enumerate(("ours", *case.peers, "torch")):
            row = {"case": case.name, "op": case.op, "shape": shape, "dtype": "bfloat16", "library": library}
            row |= dict.fromkeys(kernels.COLUMNS, 12.3456 * (i + 1)) | {"peak MiB": 12345.6, "note": ""}
            row |= {"forward / ours": None, "train / ours": None, "difference": None} if library == "ours" else {}
            rows.append(row | changed)
    return rows


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_valid_calls(case):
    example = case.example(TINY, torch.bfloat16, "cpu")
    assert all(x.dtype == torch.float32 for name, x in example.inputs.items() if name in ("decay", "f", "i"))
    assert all(x.dtype == torch.bfloat16 for name, x in example.inputs.items() if name in ("q", "k", "v", "x"))
    errors = differences(example.to(torch.float64), "torch")
    assert max(errors.values()) < 1e-10
    assert set(case.constants) <= set(example.inputs)


@pytest.mark.parametrize("case", [case for case in CASES if "fla" in case.peers], ids=lambda case: case.name)
def test_calls_of_fla_fit_its_signatures(case, monkeypatch):
    peer, seen = case.peers["fla"], []

    class Recording:
        def __init__(self, module):
            self.module = import_module(module)

        def __getattr__(self, name):
            signature = inspect.signature(getattr(self.module, name))

            def stand_in(*args, **kwargs):
                seen.append(signature.bind(*args, **kwargs).arguments)
                return seen[0]["v"], None

            return stand_in

    inputs = case.example(TINY, torch.bfloat16, "cpu").inputs
    monkeypatch.setattr("subquad.compare.kernel_cases.import_module", Recording)
    peer.call(peer.prepare(inputs))
    ours = {"r": "q", "w": "decay", "g": "decay", "u": "bonus"}
    assert seen[0].pop("scale") == 1.0
    for argument, value in seen[0].items():
        if isinstance(value, torch.Tensor):
            assert value.numel() == inputs[ours.get(argument, argument)].numel(), argument
            assert torch.equal(value.flatten(), inputs[ours.get(argument, argument)].flatten()), argument
    given = {ours.get(argument, argument) for argument in seen[0]}
    assert set(inputs) - set(case.constants) <= given, "a tensor of ours that the peer never gets"


def test_mamba_gets_the_same_quantities():
    case = BY_NAME["scalar decay"]
    inputs = case.example(TINY, torch.float32, "cpu").inputs
    theirs = case.peers["mamba_ssm"].prepare(inputs)
    torch.testing.assert_close(theirs["dt"] * theirs["A"], inputs["decay"])
    torch.testing.assert_close(theirs["x"] * theirs["dt"][..., None], inputs["v"])


def test_floor_counts_bytes_once():
    x, w, out = torch.zeros(10), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(10, dtype=torch.bfloat16)
    tensors = trainable({"x": x, "w": w}, constants=("w",))
    least = floor(tensors, out, rate=1000.0)
    assert least.forward_ms == pytest.approx(40 + 6 + 20)
    assert least.train_ms == pytest.approx(2 * (40 + 6 + 20) + 40)  # only x has a gradient


def test_rows_of_a_case(monkeypatch):
    """Ours first, ratios to it, and a peer that fails is a row that says so."""
    times = iter((2.0, 5.0, 8.0))

    def measure(call, tensors):
        out = call(tensors).detach()
        return Figures(next(times), 4.0, 1.0, 0.5), out

    monkeypatch.setattr(kernels, "measure", measure)
    form = kernels._form
    monkeypatch.setattr(kernels, "_form", lambda example, name: form(example, "naive" if name == "triton" else name))

    def fails(tensors):
        raise RuntimeError("out of\nluck")

    def half(tensors):
        return tensors["v"] / 2

    case = BY_NAME["no decay"]._replace(peers={"fla": Peer(fails), "mamba_ssm": Peer(half)})
    example = case.example(TINY, torch.float32, "cpu")
    peers = ["causal_conv1d", "fla", "mamba_ssm", "torch"]
    rows = kernels.compare(case, example, str(TINY), 1e6, peers)
    assert [row["library"] for row in rows] == ["ours", "fla", "mamba_ssm", "torch"]
    assert [row["forward / ours"] for row in rows] == [None, None, 2.5, 4.0]
    assert [row["note"] for row in rows] == ["", "RuntimeError: out of luck", "", ""]
    assert rows[0]["forward / floor"] == pytest.approx(2.0 / rows[0]["forward floor ms"])
    assert rows[3]["difference"] < 1e-5 < rows[2]["difference"]
    assert len({frozenset(row) for row in rows}) == 1, "all rows have the same columns"


def test_table_csv_and_picture(all_ops, tmp_path, capsys, monkeypatch):
    rows = [row for shape in kernels.SHAPES for row in made_up(shape)]
    monkeypatch.setattr(kernels, "_require_gpu", lambda: None)
    monkeypatch.setattr(kernels, "_triton", lambda: "triton 3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(kernels, "_measure_all", lambda *arguments: (rows, 4.27e12))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        kernels, "begin", lambda command, device, settings: begin(command, torch.device("cpu"), settings)
    )
    table, picture, document = tmp_path / "k.csv", tmp_path / "k.png", tmp_path / "k.json"
    words = ["--peer", "fla", "--csv", str(table), "--picture", str(picture), "--json", str(document)]
    assert cli.main([*COMMAND, *words]) == 0
    shown = capsys.readouterr().out
    assert "copies at 4.27 TB/s" in " ".join(shown.split())
    assert all(name in shown for name in BY_NAME)
    assert [row["library"] for row in csv.DictReader(table.open())] == [row["library"] for row in rows]
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(document.read_text())
    assert written["rows"] == rows
    assert written["settings"]["copy_tb_s"] == 4.27
    assert written["command"].startswith("subquad compare kernels --peer fla")
    assert "fla-core 0." in written["versions"]["fla"]


def test_the_table_fits_a_terminal():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(kernels.table(made_up(), "H200"))
    assert "…" not in capture.get()
    assert "causal_conv1d" in capture.get()


def test_a_failure_of_ours_is_told_and_fails(all_ops, capsys, monkeypatch):
    failed = dict.fromkeys(kernels.COLUMNS) | {"note": "OutOfResources: shared memory"}
    rows = made_up() + made_up(kernels.SHAPES[1], **failed)
    monkeypatch.setattr(kernels, "_require_gpu", lambda: None)
    monkeypatch.setattr(kernels, "_triton", lambda: "triton 3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(kernels, "_measure_all", lambda *arguments: (rows, 4.27e12))
    assert cli.main(COMMAND) == 1
    assert "no decay, ours, B1T32768H16D128: OutOfResources: shared memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "delta_rul"], "--ops: there is no 'delta_rul' to measure; did you mean 'delta_rule'?"),
        (["--peer", "flah"], "--peer: there is no peer 'flah'; did you mean 'fla'?"),
        (["--peer", "mamba_ssm"], "--peer mamba_ssm: the package mamba_ssm is not installed here"),
        (["--shapes", "B8T2048"], "--shapes: 'B8T2048' is no shape; write one like B8T2048H16D128"),
        (["--shapes", "B0T1H1D1"], "--shapes: 'B0T1H1D1' is no shape"),
        (["--dtype", "bfloat61"], "there is no dtype 'bfloat61' here; did you mean 'bfloat16'?"),
        (["--output", "table.json"], "--output is where --tune writes"),
        (["--tune", "--csv", "k.csv"], "--tune finds launch values and ends"),
        ([], "subquad compare kernels needs an NVIDIA GPU, and torch sees none here"),
        (["--tune"], "subquad compare kernels needs an NVIDIA GPU, and torch sees none here"),
    ],
)
def test_bad_input(all_ops, arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_spec = kernels.find_spec
    monkeypatch.setattr(kernels, "find_spec", lambda name: None if name == "mamba_ssm" else find_spec(name))
    assert cli.main([*COMMAND, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_op_without_a_triton_form_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "load_ops", lambda: {op: ("naive", "torch") for op in load_ops()})
    with pytest.raises(UserError, match="short_conv has no Triton form yet; it has: naive, torch"):
        cli._dispatch([*COMMAND, "--ops", "short_conv"])
    with pytest.raises(UserError, match="no op has a Triton form yet"):
        cli._dispatch(COMMAND)


def test_the_empty_compile_cache_is_put_away(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    with kernels._empty_compile_cache():
        assert kernels.os.environ["TRITON_CACHE_DIR"] != "/mine"
        assert not kernels.os.listdir(kernels.os.environ["TRITON_CACHE_DIR"])
    assert kernels.os.environ["TRITON_CACHE_DIR"] == "/mine"


@pytest.fixture
def a_kernel(tmp_path, monkeypatch):
    """A kernel: blocks of 8 do not compile, of 16 are right, of 32 twice as fast, of 64 faster still but wrong."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel = configs.Kernel({"BLOCK": 16}, {"BLOCK": (8, 16, 32, 64)})
    monkeypatch.setattr(configs, "SHIPPED", {"some": kernel})
    monkeypatch.setattr(configs, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H200")
    monkeypatch.setattr(kernels, "_require_gpu", lambda: None)
    monkeypatch.setattr(Run, "is_right", lambda run: configs.config("some", K=run.sizes.D)["BLOCK"] <= 32)

    def ms(run):
        block = configs.config("some", device=run.device, K=run.sizes.D)["BLOCK"]
        if block == 8:
            raise RuntimeError("PassManager::run failed")
        return run.sizes.T / block

    monkeypatch.setattr(Run, "ms", ms)
    configs.forget()
    yield
    monkeypatch.undo()
    configs.forget()


def test_tuning_takes_the_fastest_that_is_right(a_kernel):
    cases = [BY_NAME["no decay"], BY_NAME["delta"]]
    with kernels.progress_bar() as progress:
        shapes = [TINY, TINY._replace(D=64)]
        found = tune(cases, shapes, torch.bfloat16, torch.device("cuda", 0), progress)
    assert [(best.kernel, best.widths, best.values) for best in found] == [
        ("some", {"K": 8}, {"BLOCK": 32}),
        ("some", {"K": 64}, {"BLOCK": 32}),
    ]
    assert all(best.gain == pytest.approx(2.0) and best.before == {"BLOCK": 16} for best in found)


def test_tuning_writes_the_users_table_and_keeps_what_it_did_not_tune(all_ops, a_kernel, capsys):
    kept = configs.Entry((8, 0), {"K": 32}, {"BLOCK": 64})
    configs.path().parent.mkdir(parents=True)
    configs.path().write_text(configs.text({"some": [kept], "another": [kept]}))
    assert cli.main([*COMMAND, "--tune", "--ops", "delta_rule", "--shapes", "B1T64H2D128"]) == 0
    assert "kernels.json" in capsys.readouterr().out
    mine = configs.Entry((9, 0), {"K": 128}, {"BLOCK": 32})
    assert configs.read(configs.path()) == {"some": [kept, mine], "another": [kept]}
    assert configs.config("some", device=torch.device("cuda", 0), K=128) == {"BLOCK": 32}


def test_tuning_writes_where_it_is_told(all_ops, a_kernel, tmp_path):
    target = tmp_path / "table.json"
    assert cli.main([*COMMAND, "--tune", "--shapes", "B1T64H2D128", "--output", str(target)]) == 0
    assert configs.read(target) == {"some": [configs.Entry((9, 0), {"K": 128}, {"BLOCK": 32})]}
    assert not configs.path().exists()
