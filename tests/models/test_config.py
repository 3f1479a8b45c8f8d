"""Configurations: every mistake is one sentence that names the key, the value and what would do."""

import json

import pytest
import yaml
from torch import nn

from subquad.errors import UserError
from subquad.layers.build import build_layer
from subquad.models.config import LMConfig
from subquad.models.lm import LM

pytestmark = pytest.mark.unchecked  # values of the wrong type must reach the checks that are tested here


def config(**changes):
    return {"d_model": 32, "blocks": [{"pattern": [{"mixer": "Mamba2", "ffn": "SwiGLU"}]}]} | changes


def with_mixer(mixer):
    return config(blocks=[{"pattern": [{"mixer": mixer}]}])


def with_stage(**stage):
    return config(blocks=[stage])


HERE = "blocks[0].pattern[0].mixer"
MISTAKES = {
    "misspelt key": (config(d_modl=3), ["'d_modl'", "did you mean 'd_model'?"]),
    "no width": ({"blocks": config()["blocks"]}, ["no d_model"]),
    "width of the wrong type": (config(d_model="32"), ["d_model is '32' (str)", "must be int"]),
    "width that is a truth value": (config(d_model=True), ["d_model is True (bool)", "must be int"]),
    "heads that are a truth value": (with_mixer({"name": "Attention", "n_heads": True}), [f"{HERE}.n_heads is True"]),
    "no width at all": (config(d_model=0), ["d_model is 0", "at least 1"]),
    "no vocabulary": (config(vocab_size=0), ["vocab_size is 0", "at least 1"]),
    "tying by number": (config(tie_embeddings=1), ["tie_embeddings is 1 (int)", "must be bool"]),
    "norm_eps": (config(norm_eps=-1e-5), ["norm_eps is -1e-05", "above 0"]),
    "not a number": (config(norm_eps=float("nan")), ["norm_eps is nan", "finite"]),
    "init_std": (config(init_std=0.0), ["init_std is 0.0", "above 0"]),
    "no blocks": (config(blocks=[]), ["blocks is empty", "at least one stage"]),
    "blocks that are no list": (config(blocks={}), ["blocks is {} (dict)", "must be list"]),
    "stage that is no mapping": (config(blocks=[{"pattern": ["x"]}]), ["blocks[0].pattern[0] is 'x'", "mapping"]),
    "stage key": (with_stage(repaet=2, pattern=[{"mixer": "MLP"}]), ["blocks[0]", "'repaet'", "'repeat'"]),
    "repeat": (with_stage(repeat=0, pattern=[{"mixer": "MLP"}]), ["blocks[0].repeat is 0", "at least 1"]),
    "repeat of the wrong type": (with_stage(repeat="2", pattern=[{"mixer": "MLP"}]), ["repeat is '2' (str)", "int"]),
    "no pattern": (with_stage(repeat=2), ["blocks[0].pattern is None", "list of blocks"]),
    "empty block": (with_stage(pattern=[{}]), ["blocks[0].pattern[0] is {}", "at least one"]),
    "block key": (with_stage(pattern=[{"mixr": "MLP"}]), ["blocks[0].pattern[0]", "'mixr'", "'mixer'"]),
    "part that is no layer": (with_mixer(3), [f"{HERE} is 3", "layer's name"]),
    "no name": (with_mixer({"n_heads": 2}), [HERE, "needs a name", "n_heads"]),
    "unknown layer": (with_mixer("Manba2"), [HERE, "no layer 'Manba2'", "did you mean 'Mamba2'?"]),
    "unknown argument": (with_mixer({"name": "Attention", "n_haeds": 2}), [HERE, "'n_haeds'", "'n_heads'"]),
    "the width given twice": (with_mixer({"name": "Attention", "d_model": 2}), [HERE, "unknown key 'd_model'"]),
    "argument of the wrong type": (
        with_mixer({"name": "Attention", "n_heads": "2"}),
        [f"{HERE}.n_heads is '2' (str)", "int"],
    ),
    "heads that do not divide": (with_mixer({"name": "LinearAttention", "n_heads": 5}), [HERE, "n_heads 5", "32"]),
    "no heads": (with_mixer({"name": "Attention", "n_heads": 0}), [f"{HERE}.n_heads is 0", "at least 1"]),
    "negative width": (with_mixer({"name": "Mamba", "d_conv": -1}), [f"{HERE}.d_conv is -1", "at least 1"]),
    "negative sinks": (with_mixer({"name": "Attention", "n_sinks": -1}), [f"{HERE}.n_sinks is -1", "at least 0"]),
    "impossible shape": (with_mixer({"name": "Mamba", "expand": -1.0}), [HERE, "Mamba", "expand -1.0", "below 1"]),
    "name out of a list": (
        with_mixer({"name": "LinearAttention", "feature_map": "gelu"}),
        [f"{HERE}.feature_map is 'gelu'", "one of", "elu", "taylor"],
    ),
    "module that is not there": (with_mixer("no.such.Layer"), [HERE, "cannot import", "'no.such.Layer'"]),
    "class that is not there": (with_mixer("torch.nn.Linaer"), [HERE, "cannot import", "'torch.nn.Linaer'"]),
    "no module class": (with_mixer("math.pi"), [HERE, "'math.pi' is no torch module class"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    values, said = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        LM.from_config(values)
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


def test_truth_values_where_they_belong():
    LM.from_config(with_mixer({"name": "LinearAttention", "normalizer": False}))


def test_zero_is_a_count_where_it_means_none():
    LM.from_config(with_mixer({"name": "Attention", "n_sinks": 0}))


def test_a_whole_number_may_stand_for_a_fraction():
    ffn = build_layer("here", {"name": "SwiGLU", "expand": 2}, d_model=32, layer_idx=0, n_layers=1)
    assert ffn.up_proj.out_features == 64


def test_patterns_repeat_in_order():
    two = [{"mixer": "Mamba2"}, {"ffn": "MLP"}]
    flat = LMConfig.from_dict(
        config(blocks=[{"repeat": 2, "pattern": two}, {"pattern": [{"mixer": "Mamba"}]}])
    ).flat_blocks()
    assert [block for _, block in flat] == [*two, *two, {"mixer": "Mamba"}]
    assert [where for where, _ in flat][1] == "blocks[0].pattern[1]"
    assert flat[-1][0] == "blocks[1].pattern[0]"


class Doubling(nn.Module):
    """Someone's own layer."""

    def __init__(self, d_model: int, *, times: float = 2.0, layer_idx: int = -1, n_layers: int = -1):
        super().__init__()
        self.place = (layer_idx, n_layers)
        self.times = times

    def forward(self, x, state=None, cu_seqlens=None):
        return self.times * x, state


def test_anyones_class_by_its_dotted_path(monkeypatch):
    import sys
    from types import ModuleType

    module = ModuleType("someones")
    module.Doubling = Doubling
    monkeypatch.setitem(sys.modules, "someones", module)
    spec = {"name": "someones.Doubling", "times": -3}
    model = LM.from_config(config(blocks=[{"repeat": 3, "pattern": [{"mixer": spec}]}]))
    assert [block.mixer.place for block in model.blocks] == [(0, 3), (1, 3), (2, 3)]
    assert model.blocks[0].mixer.times == -3


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.yaml", "d_model: [", "is no valid YAML"),
        ("a.json", "{", "is no valid JSON"),
        ("a.yaml", "- 1", "holds a list; a configuration is a mapping"),
        ("a.yaml", b"\xff\xfe", "cannot read the configuration"),
    ],
)
def test_files_that_hold_no_configuration(tmp_path, file, text, said):
    path = tmp_path / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        LMConfig.from_file(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        LMConfig.from_file(tmp_path / "none.yaml")


def test_yaml_json_and_training_files_mean_the_same(tmp_path):
    whole = tmp_path / "train.yaml"
    whole.write_text(yaml.safe_dump({"model": {"lm": config()}, "trainer": {"max_steps": 3}}))
    plain = tmp_path / "lm.json"
    plain.write_text(json.dumps(config()))
    assert LMConfig.from_file(whole) == LMConfig.from_file(plain) == LMConfig.from_dict(config())


def test_to_dict_inverts_from_dict():
    made = LMConfig.from_dict(config(vocab_size=17, tie_embeddings=False))
    assert LMConfig.from_dict(made.to_dict()) == made
