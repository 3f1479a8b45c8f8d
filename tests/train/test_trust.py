"""Code runs only where the user asked for it: a file named with --config, or trust_code for what lies in a folder."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from lightning import Trainer

from subquad.cli import main
from subquad.compare.models import find_config
from subquad.errors import UserError
from subquad.models import checkpoint
from subquad.models.config import LMConfig
from subquad.models.lm import LM
from subquad.train.trust import HARMLESS, TAKE_CLASSES, check_run_config

HELPER = """
from pathlib import Path
from subquad.layers.mlp import MLP
Path(__file__).with_name("ran").touch()
class Mixer(MLP):
    pass
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with helper.py, from which commands are started; whether it ran."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text(HELPER)
    yield lambda: (tmp_path / "ran").exists()
    sys.modules.pop("helper", None)


def blocks(name):
    """Places in a model's configuration where a layer is named."""
    return {
        "mixer": [{"pattern": [{"mixer": name}]}],
        "ffn": [{"pattern": [{"mixer": "Mamba2"}, {"ffn": {"name": name}}]}],
        "inside a layer": [{"pattern": [{"mixer": {"name": "Parallel", "mixers": [{"name": name}]}}]}],
    }


@pytest.mark.parametrize("where", blocks(""))
def test_a_models_folder_runs_nothing(beside, where, capsys):
    checkpoint.save(LM.from_config({"d_model": 16, "blocks": [{"pattern": [{"mixer": "Mamba2"}]}]}), "m")
    about = json.loads(Path("m/config.json").read_text())
    about["lm"]["blocks"] = blocks("helper.Mixer")[where]
    Path("m/config.json").write_text(json.dumps(about))
    Path("text").write_text("text")
    commands = (["infer", "--model", "m", "--prompt", "a"], ["eval", "--model", "m", "--data", "text"])
    for command in (*commands, ["compare", "models", "m"], ["compare", "decode", "m"]):
        assert main([*command]) == 2
        err = capsys.readouterr().err
        assert "m/config.json names the class 'helper.Mixer', which would be imported and run" in err
        assert "--trust-code" in err and err.count("\n") == 1
    with pytest.raises(UserError, match="trust_code"):
        checkpoint.load("m")
    assert not beside()
    with pytest.raises(UserError, match="does not fit"):  # past the question of trust, to the weights
        checkpoint.load("m", trust_code=True)
    assert beside()
    find_config("m", trust_code=True)


def test_the_users_own_words_are_trusted(beside):
    values = {"d_model": 16, "blocks": [{"pattern": [{"mixer": "helper.Mixer"}]}]}
    model = LM.from_config(values)
    assert type(model.blocks[0].mixer).__name__ == "Mixer" and beside()
    checkpoint.save(model, "m")
    again = checkpoint.load("m", trust_code=True)
    assert torch.equal(
        again(torch.ones(1, 3, dtype=torch.long))[0], model.eval()(torch.ones(1, 3, dtype=torch.long))[0]
    )


def test_a_run_of_a_dotted_layer_is_gone_on_with(config, tmp_path, beside, capsys):
    values = yaml.safe_load(config.read_text())
    values["model"]["lm"]["blocks"] = [{"pattern": [{"mixer": "Mamba2", "ffn": "helper.Mixer"}]}]
    values["trainer"]["max_steps"] = 2
    config.write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    assert main(["train", "fit", "--config", str(config), "--run", str(run)]) == 0
    sys.modules.pop("helper")
    (tmp_path / "ran").unlink()
    capsys.readouterr()
    for command in (["fit", "--resume"], ["validate"], ["test"]):
        assert main(["train", *command, "--run", str(run)]) == 2
        err = capsys.readouterr().err
        assert "run/config.yaml names the class 'helper.Mixer'" in err and "to go on, add --trust_code" in err
    assert not beside()
    assert main(["train", "validate", "--run", str(run), "--trust_code"]) == 0
    assert beside()


IMPORTS = {
    "callback": {"trainer": {"callbacks": [{"class_path": "helper.Mixer"}]}},
    "one callback": {"trainer": {"callbacks": {"class_path": "helper.Mixer"}}},
    "callback as a word": {"trainer": {"callbacks": "LambdaCallback"}},
    "callback in a file": {"trainer": {"callbacks": "other.yaml"}},
    "callback with a function": {
        "trainer": {
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "os.abort"}}
            ]
        }
    },
    "class in an argument": {
        "trainer": {"callbacks": {"class_path": min(HARMLESS), "init_args": {"x": [{"class_path": "helper.Mixer"}]}}}
    },
    "arguments in a file": {"trainer": {"callbacks": {"class_path": min(HARMLESS), "init_args": "other.yaml"}}},
    "any arguments": {"trainer": {"callbacks": {"class_path": min(HARMLESS), "dict_kwargs": {}}}},
    "added": {"trainer": {"callbacks+": {"class_path": "helper.Mixer"}}},
    "logger": {"trainer": {"logger": {"class_path": "helper.Mixer"}}},
    "plugin": {"trainer": {"plugins": [{"class_path": "helper.Mixer"}]}},
    "profiler": {"trainer": {"profiler": "helper.Mixer"}},
    "strategy": {"trainer": {"strategy": "helper"}},
    "word that is a file": {"trainer": {"strategy": "ddp"}},
    "trainer in a file": {"trainer": "other.yaml"},
    "model in a file": {"model": "other.yaml"},
    "lm in a file": {"model": {"lm": "other.yaml"}},
    "data": {"data": {"class_path": "helper.Mixer"}},
    "dotted keys": {"trainer.callbacks": "helper.Mixer"},
    "dotted keys within": {"trainer": {"callbacks.class_path": "helper.Mixer"}},
    "another config": {"config": "other.yaml"},
    "its own word": {"trust_code": True, "trainer": {"logger": {"class_path": "helper.Mixer"}}},
    "layer": {"model": {"lm": {"blocks": [{"pattern": [{"mixer": "helper.Mixer"}]}]}}},
}


@pytest.mark.parametrize("name", IMPORTS)
def test_a_runs_own_configuration_runs_nothing(beside, name, capsys):
    run = Path("run")
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(IMPORTS[name]))
    (run / "ddp").write_text("class_path: helper.Mixer")
    assert main(["train", "validate", "--run", "run"]) == 2
    err = capsys.readouterr().err
    assert "run/config.yaml" in err and "would be imported and run; to go on, add --trust_code" in err
    assert err.count("\n") == 1 and not beside()


def test_what_runs_write_by_themselves_is_free(tmp_path):
    callbacks = [{"class_path": name, "init_args": {"monitor": "val/bpb", "patience": 3}} for name in HARMLESS]
    for trainer in (
        {"strategy": "ddp", "accelerator": "cpu", "logger": True, "plugins": None},
        {"callbacks": callbacks},
    ):
        check_run_config({"trainer": trainer, "model": {"lr": 0.1}, "seed_everything": 0}, tmp_path / "config.yaml")


def test_every_option_of_the_trainer_that_takes_a_class_is_known():
    plain = {int, str, bool, float, type(None), Path, timedelta}

    def takes_a_class(hint):
        if get_origin(hint) is Literal:
            return False
        return any(map(takes_a_class, get_args(hint))) if get_args(hint) else hint not in plain

    hints = get_type_hints(Trainer.__init__.__wrapped__)
    assert {name for name, hint in hints.items() if takes_a_class(hint)} == {*TAKE_CLASSES}


def test_a_file_of_the_user_may_name_classes(beside):
    Path("mine.yaml").write_text(yaml.safe_dump({"d_model": 16, "blocks": blocks("helper.Mixer")["mixer"]}))
    LM(LMConfig.from_file("mine.yaml"))
    assert beside()
