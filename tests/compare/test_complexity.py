"""`subquad compare complexity`: what is measured, what is not, resuming, files and refusals."""

import csv
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from subquad import cli
from subquad.compare import complexity, measuring
from subquad.compare.costs import mixing
from subquad.compare.measuring import Limit, Setting, _Bench, in_turns, measure, predict, timed
from subquad.compare.meters import peak_bytes
from subquad.compare.results import PHASES, Point, load
from subquad.compare.subjects import Subject, label, layer_subject, long_enough, mixers, model_subject, specification
from subquad.kernels.backend import recorded_calls
from subquad.layers import Attention, LinearAttention, Parallel, available

CPU = torch.device("cpu")
SMALL = ["--lengths", "8", "16", "32", "--d-model", "16", "--repeat", "2", "--new-tokens", "2"]
COMMAND = ["compare", "complexity", *SMALL]


def subject(spec, d_model=16):
    return layer_subject(label(spec), spec, d_model, CPU, torch.float32)


def measured(spec, lengths=(8, 16), phases=PHASES, batch=1, repeat=2):
    setting = Setting(batch, 2, repeat, CPU)
    found = list(measure(subject(spec), lengths, phases, setting, Limit(CPU, None, 1)))
    return {(p.kind, p.phase, p.tokens): p for p in found}


def test_layers_of_every_op_and_their_ops_are_measured():
    layers = {available()[name].card.op: name for name in mixers()}.values()
    assert len(layers) > 15
    missing = {}
    for name in layers:
        points = measured(name, lengths=(8,), repeat=1)
        assert len(points) == 2 * 3, name
        missing[name] = {phase for (_, phase, _), p in points.items() if p.note}
        for p in points.values():
            assert (p.ms is None) == bool(p.note), p
            assert p.note or 0 < p.low_ms <= p.ms <= p.high_ms, p
            assert p.note or p.bytes > 0, p
            assert p.note or p.phase == "decode" or p.peak_bytes > 0, p
    assert {name: phases for name, phases in missing.items() if phases} == {"NystromAttention": {"decode"}}


@pytest.mark.parametrize("spec", ["Attention", "Mamba2", {"name": "Attention", "window": 4}])
def test_the_energy_of_a_token_is_that_of_a_few_after_one_context(spec, monkeypatch):
    """Which are read as often as the counter needs: caches have no room for so many more."""

    def joules(run, device):
        for _ in range(50):
            run()
        return 6.0

    monkeypatch.setattr(measuring, "joules", joules)
    points = measured(spec, phases=("decode",))
    assert [points["layer", "decode", n].energy_j for n in (8, 16)] == [3.0, 3.0]  # of two tokens 6
    assert points["op", "decode", 8].energy_j is None


def test_states_and_what_cannot_decode():
    points = measured("Attention", batch=3)
    caches = [points["layer", "decode", n].state_bytes for n in (8, 16)]
    assert caches == [points["layer", "prefill", n].state_bytes for n in (8, 16)]
    assert caches[1] - caches[0] == 3 * 2 * 16 * 4 * 8
    assert len({measured("Mamba2")["layer", "decode", n].state_bytes for n in (8, 16)}) == 1
    both_ways = measured({"name": "LinearAttention", "causal": False})
    assert both_ways["layer", "prefill", 8].ms > 0
    assert both_ways["layer", "prefill", 8].state_bytes is None
    for kind in ("layer", "op"):
        assert both_ways[kind, "decode", 8].note == "cannot decode: reads whole sequences"


def test_a_layer_without_an_op_has_no_points_of_one():
    assert {kind for kind, _, _ in measured("SwiGLU")} == {"layer"}


def test_lengths_that_a_layer_does_not_serve_have_a_note():
    points = measured({"name": "Hyena", "max_len": 40}, lengths=(16, 40, 64))
    assert points["layer", "train", 40].ms > 0
    assert points["layer", "prefill", 40].ms > 0  # without room for more
    for kind in ("layer", "op"):
        assert "up to 40 tokens; 41 do not fit" in points[kind, "decode", 40].note
        assert "up to 40 tokens; 64 do not fit" in points[kind, "train", 64].note
        assert "up to 40 tokens; 64 do not fit" in points[kind, "prefill", 64].note
    assert long_enough("Hyena", 5000) == {"name": "Hyena", "max_len": 5000}
    assert long_enough("Hyena", 100) == "Hyena"
    assert long_enough("LinformerAttention", 5000) == "LinformerAttention"


def test_whole_models():
    one = model_subject("demo", CPU, torch.float32)
    found = list(measure(one, [8, 16], PHASES, Setting(1, 2, 1, CPU), Limit(CPU, None, 1)))
    assert [(p.kind, p.phase, p.tokens) for p in found] == [
        ("model", phase, n) for n in (8, 16) for phase in ("prefill", "train")
    ] + [("model", "decode", n) for n in (8, 16)]
    assert all(p.ms > 0 and p.flops > 0 and p.peak_bytes > 0 for p in found)


def test_the_op_alone_computes_what_the_layer_asked_of_it():
    """From an empty state at every run."""
    layer = subject("DeltaNet")
    bench = _Bench(layer, Setting(1, 2, 1, CPU), Limit(CPU, None, 1))
    x = layer.inputs(1, 8)
    outs = []
    call_again = measuring.call_again
    trial = bench.op_reading(x)
    (calls,) = trial.run.args
    for _ in range(2):
        trial.prepare()
        outs.append(calls[0].form(*calls[0].args, **calls[0].kwargs)[0])
    assert torch.equal(outs[0], outs[1])
    assert trial.run.func is call_again
    with torch.no_grad(), recorded_calls() as fresh:
        bench.module(x)
    (call,) = mixing(bench.module, fresh)
    torch.testing.assert_close(outs[0], call.form(*call.args, **call.kwargs)[0])


def test_the_ops_backward_pass_ends_at_the_op():
    layer = subject("LinearAttention")
    bench = _Bench(layer, Setting(1, 2, 1, CPU), Limit(CPU, None, 1))
    bench.op_training(layer.inputs(1, 8)).run()
    assert all(p.grad is None for p in bench.module.parameters())


def test_a_composition_is_all_of_its_mixers():
    with recorded_calls() as calls:
        layer = Parallel(16)
        layer(torch.randn(1, 8, 16))
    assert [call.op for call in mixing(layer, calls)] == ["attention", "linear_attention"]
    with recorded_calls() as calls:
        layer = available()["MLSTM"](16)
        layer(torch.randn(1, 8, 16))
    assert [call.op for call in mixing(layer, calls)] == ["running_max", "linear_attention"]


def test_the_state_that_decoding_starts_from_is_that_of_the_whole_sequence(monkeypatch):
    monkeypatch.setattr(measuring, "PIECE", 3)
    layer = subject("LinearAttention")
    bench = _Bench(layer, Setting(1, 2, 1, CPU), Limit(CPU, None, 1))
    x = layer.inputs(1, 8)
    with torch.no_grad():
        expected, _ = bench.module(torch.cat([x, x[:, :1]], 1))
        for state, note in (bench.read_in_pieces(x), (bench.reading(x).run(), "")):
            y, _ = bench.module(x[:, :1], state)
            torch.testing.assert_close(y, expected[:, -1:])
            assert note == ""


def test_peak_memory_is_what_was_allocated_at_once(capfd):
    def run():
        a = torch.empty(1 << 20)
        del a
        b, c = torch.empty(1 << 19), torch.empty(1 << 18)
        return b if c is None else 7

    assert peak_bytes(run, CPU) == (7, 4 << 20)
    x = torch.randn(1000, 256, requires_grad=True)
    result, peak = peak_bytes(lambda: F.relu(x).sum().backward(), CPU)
    assert result is None
    assert peak >= 2 * x.nbytes
    assert capfd.readouterr().err == ""  # where torch tells of its profiler


def test_long_runs_are_made_once_and_short_ones_repeated(monkeypatch):
    runs = []
    trial = measuring.Trial(partial(runs.append, 1))
    point = Point("x", "layer", "train", 8)
    timed(point, trial, Setting(1, 2, 4, CPU), warm_up=True)
    assert len(runs) == 1 + 1 + 4
    runs.clear()
    monkeypatch.setattr(measuring, "ENOUGH", 0.0)
    timed(point, trial, Setting(1, 2, 4, CPU), warm_up=False)
    assert len(runs) == 1 + 1  # the first may have touched new memory
    runs.clear()
    monkeypatch.setattr(measuring, "LONG", 0.0)
    found, _ = timed(point, trial, Setting(1, 2, 4, CPU), warm_up=False)
    assert len(runs) == 1
    assert found.low_ms == found.ms == found.high_ms


def test_contexts_take_turns():
    order = []
    found = in_turns([partial(order.append, "a"), partial(order.append, "b")], 3, CPU)
    assert [len(ms) for ms in found] == [3, 3]
    assert "".join(order[:4]) == "baab"


def test_what_costs_are_expected_to_be():
    def known(*figures):
        return [Point("x", "layer", "train", n, ms, peak_bytes=10 * n, flops=n**2) for n, ms in figures]

    longer = Point("x", "layer", "train", 400, flops=400**2)
    assert predict(known((100, 1.0), (200, 3.0)), longer, "ms") == pytest.approx(9)
    assert predict(known((100, 1.0), (200, 0.5)), longer, "ms") == pytest.approx(1)  # no less than linear
    assert predict(known((100, 1.0)), longer, "ms") == pytest.approx(16)  # as the FLOPs
    assert predict(known((100, 1.0)), longer, "peak_bytes") == 4000


def test_what_does_not_fit_the_memory_or_the_time_is_said(monkeypatch):
    earlier = [Point("x", "layer", "train", n, 1e3 * n, peak_bytes=n * 10**9) for n in (1, 2)]
    longer = Point("x", "layer", "train", 4)
    limit = Limit(CPU, 100, 2)
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 5 * 10**9)
    assert limit.refusal(earlier, longer) == ""
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 4 * 10**9)
    assert limit.refusal(earlier, longer) == "does not fit: needs about 4 GB"
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 10**12)
    assert limit.refusal(earlier, Point("x", "layer", "train", 30)).startswith("left out: would take about 30 s, more")
    assert Limit(CPU, None, 2).refusal(earlier, Point("x", "layer", "train", 30)) == ""
    failed = Point("x", "layer", "train", 4, note="does not fit")
    assert limit.refusal([failed], Point("x", "layer", "train", 8)) == "does not fit"
    assert limit.refusal([*earlier, failed], Point("x", "layer", "train", 8)) == "does not fit: needs about 8 GB"


def test_a_spent_budget_leaves_the_rest_to_another_run(tmp_path, capsys):
    path = tmp_path / "costs.json"
    words = [*COMMAND, "--layers", "MinGRU", "Mamba2", "Attention", "--phases", "prefill", "--json", str(path)]
    words += ["--budget", "0.001"]
    for number, left in enumerate(("Mamba2, Attention", "Attention", ""), 1):
        assert cli.main([*words, *(["--resume"] if number > 1 else [])]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert len(load(path).subjects()) == number
        assert (f"the 0.001 s of --budget are spent: {left} the same" in said) == (left != "")


class Hungry(nn.Module):
    """It has no room for 16 tokens."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, state=None):
        if x.shape[1] >= 16:
            torch.empty(1 << 60, dtype=torch.uint8)
        return x * self.scale, state

    def init_state(self, batch_size, max_len, dtype=None):
        return ()


def test_running_out_of_memory_is_a_note_and_not_the_end():
    hungry = Subject("Hungry", "layer", Hungry, lambda batch, tokens: torch.randn(batch, tokens, 4), 4)
    found = list(measure(hungry, [4, 8, 16, 32], PHASES, Setting(1, 2, 1, CPU), Limit(CPU, None, 1)))
    notes = {(p.phase, p.tokens): p.note for p in found if p.kind == "layer"}
    for phase in PHASES:
        assert notes[phase, 8] == ""
        assert all(notes[phase, n].startswith("does not fit") for n in (16, 32)), phase


def test_the_table_and_the_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    files = {name: tmp_path / f"cost.{name}" for name in ("csv", "json", "png", "svg", "html")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    layers = ["--layers", "Attention", "{name: Attention, window: 4}", "Mamba2"]
    assert cli.main([*COMMAND, *layers, *words]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert all(word in shown for word in ("Mamba2", "train", "prefill", "decode", "±", "ms at", "below"))
    found = load(files["json"])
    names = ["Attention", "Attention, window 4", "Mamba2"]
    assert found.subjects() == names
    assert found.command == f"subquad compare complexity {' '.join(SMALL)} --layers Attention " + (
        "'{name: Attention, window: 4}' Mamba2"
    )
    assert found.settings["layers"]["Mamba2"] == "Mamba2"
    assert len(found.points) == 3 * 2 * 3 * 3
    assert len(list(csv.DictReader(files["csv"].open()))) == len(found.points)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files["svg"].read_text()
    assert "Mamba2" in files["html"].read_text()


def test_only_some_phases(tmp_path):
    path = tmp_path / "cost.json"
    assert cli.main([*COMMAND, "--layers", "Mamba2", "--phases", "decode", "--json", str(path)]) == 0
    points = load(path).points
    assert {p.phase for p in points} == {"decode"}
    assert all(p.ms > 0 for p in points)


def test_an_interrupted_run_goes_on(tmp_path, capsys, monkeypatch):
    path = tmp_path / "cost.json"
    layers = ["--layers", "MinGRU", "Mamba2", "Attention"]
    words = [*COMMAND, *layers, "--phases", "prefill", "--json", str(path)]

    def interrupted(subject, *arguments):
        for i, point in enumerate(measure(subject, *arguments)):
            if subject.name == "Mamba2" and i == 3:
                raise KeyboardInterrupt
            yield point

    monkeypatch.setattr(complexity, "measure", interrupted)
    assert cli.main(words) == 130
    assert "--resume goes on" in " ".join(capsys.readouterr().err.split())
    before = load(path).points
    assert [p.subject for p in before] == ["MinGRU"] * 6 + ["Mamba2"] * 3

    asked = []
    monkeypatch.setattr(complexity, "measure", lambda s, *rest: asked.append(s.name) or measure(s, *rest))
    assert cli.main([*words, "--resume"]) == 0
    after = load(path)
    assert asked == ["Mamba2", "Attention"]
    assert after.points[:6] == before[:6]
    assert len(after.points) == 18
    assert cli.main([*words, "--resume"]) == 0
    assert asked == ["Mamba2", "Attention"]

    capsys.readouterr()
    assert cli.main([*words, "--resume", "--batch", "2"]) == 2
    assert "was measured with batch 1, which is 2 now" in capsys.readouterr().err
    found = json.loads(path.read_text())
    found["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(found))
    assert cli.main([*words, "--resume"]) == 2
    assert "was measured with torch '1.0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "Atention"], "there is no layer 'Atention'; did you mean 'Attention'?"),
        (["--layers", "{name: Attention, windw: 4}"], "unknown key 'windw'; did you mean 'window'?"),
        (["--layers", "{name: "], "is no valid YAML"),
        (["--layers", "7"], "'7' is neither a name nor a mapping"),
        (["--configs", "mambo2"], "'mambo2' is no shipped configuration, file or folder; did you mean 'mamba2'?"),
        (["--lengths", "0"], "--lengths has 0; a length is at least 1"),
        (["--phases", "trian"], "--phases: there is no phase 'trian'; did you mean 'train'?"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--budget", "0"], "--budget is 0.0; it must be above 0 seconds"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--dtype", "float12"], "there is no dtype 'float12' here; did you mean 'float"),
        (["--length", "8"], "subquad compare complexity has no option --length; did you mean '--lengths'?"),
        (["--resume"], "--resume goes on with the measurements of a --json file, so it needs one and no --overwrite"),
        (["--json", "there.json"], "there.json exists; pass overwrite (--overwrite) to replace it"),
        (["--resume", "--json", "there.json"], "there.json holds no measurements of subquad compare"),
        (["--html", "there.json"], "there.json exists; pass overwrite (--overwrite) to replace it"),
        (["--png", "cost.jpg"], "cost.jpg: pictures are drawn as .png or .svg, by the name's ending"),
    ],
)
def test_bad_input(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("mine")
    monkeypatch.setattr(complexity, "measure", lambda *arguments: pytest.fail("it measured first"))
    assert cli.main([*COMMAND, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "there.json").read_text() == "mine"


def test_labels():
    assert label("Mamba2") == "Mamba2"
    assert label(specification("--layers", "{name: Attention, window: 4}")) == "Attention, window 4"


def test_measuring_leaves_no_gradients():
    made = []
    layer = subject("Attention")
    kept = Subject(layer.name, "layer", lambda: made.append(layer.build()) or made[-1], layer.inputs, 16)
    list(measure(kept, [8], PHASES, Setting(1, 2, 1, CPU), Limit(CPU, None, 1)))
    (module,) = made
    assert isinstance(module, Attention)
    assert all(p.grad is None for p in module.parameters())
    assert not any(isinstance(m, LinearAttention) for m in module.modules())
