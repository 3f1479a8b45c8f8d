"""One reader for YAML and JSON: what it takes, what it refuses in one sentence, and that it takes no time."""

import json
import os
import time
from math import inf

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.errors import UserError
from subquad.reading import MOST_BYTES, dump_yaml, parse_json, parse_yaml, read_mapping

VALUES = {
    "1e-5": 1e-5,
    "-1E5": -1e5,
    "1.": 1.0,
    ".5": 0.5,
    "+3": 3,
    "017": 17,
    "0o17": 15,
    "0x1f": 31,
    ".inf": inf,
    "-.INF": -inf,
    "true": True,
    "~": None,
    **{word: word for word in ("yes", "no", "on", "off", "y", "2026-01-31", "12:30:00", "1_000", "1e", ".", "-", "=")},
}


@pytest.mark.parametrize("text", [t for t in VALUES if t != "-"])
def test_scalars_of_the_core_schema(text):
    assert parse_yaml(f"a: {text}", "here") == {"a": VALUES[text]}
    assert parse_yaml(f"a: '{text}'", "here") == {"a": text}


def laughs(levels):
    """Some hundred bytes that stand for 9^levels words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


REFUSED_YAML = {
    "aliases of aliases": (laughs(9), "more than 100,000 values"),
    "merges of merges": ("a: &a {x: 1}\n" + "".join(f"b{i}: &a {{<<: [*a], y{i}: *a}}\n" for i in range(30)), "values"),
    "an alias to itself": ("a: &a [*a]", "before its anchor is complete"),
    "brackets": ("[" * 100_000, "deeper than 50 levels"),
    "lists of lists": ("- " * 1000, "deeper than 50 levels"),
    "digits": ("a: " + "9" * 5000, "a number of 5,000 digits"),
    "64 bits": (f"a: {2**63}", "beyond 64 bits"),
    "a fraction that overflows": ("a: 1e999", "1e999 is beyond"),
    "a key twice": ("a:\n  b: 1\n  c: 2\n  b: 3", "line 4: the key 'b' stands twice"),
    "a list as a key": ("? [a]\n: 1", "a key must be a word"),
    "a tag": ("a: !!python/name:os.system x", "line 1: the tag"),
    "two documents": ("a: 1\n---\na: 2", "a second document"),
    "a control character": ("a: \x01", "control characters"),
    "NUL": ('a: "\\0"', "the character NUL"),
    "a lone surrogate": ("a: \udcff", "not UTF-8"),
}
REFUSED_JSON = {
    "brackets": ("[" * 100_000, "deeper than 50 levels"),
    "closed brackets": ("[" * 60 + "]" * 60, "deeper than 50 levels"),
    "digits": ("[" + "9" * 5000 + "]", "a number of 5,000 digits"),
    "64 bits": (f"[{-(2**63) - 1}]", "beyond 64 bits"),
    "a fraction that overflows": ("[1e999]", "1e999 is beyond"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
    "a lone surrogate": ('"\\udcff"', "not UTF-8"),
    "NUL": ('"\\u0000"', "the character NUL"),
    "half a text": ('{"a"', "is no valid JSON"),
}


@pytest.mark.parametrize("name", REFUSED_YAML)
def test_yaml_refused(name):
    refused(parse_yaml, *REFUSED_YAML[name])


@pytest.mark.parametrize("name", REFUSED_JSON)
def test_json_refused(name):
    refused(parse_json, *REFUSED_JSON[name])


def refused(parse, text, said):
    begin = time.process_time()
    with pytest.raises(UserError) as caught:
        parse(text, "here")
    assert time.process_time() - begin < 1
    message = str(caught.value)
    assert message.startswith("here ") and said in message and len(message) < 500 and message.isprintable()


def test_aliases_and_merges_are_read():
    assert parse_yaml("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: [*x, *x]", "here") == {
        "a": {"p": 1, "q": 2},
        "b": {"q": 3, "p": 1},
        "c": [{"p": 1, "q": 2}] * 2,
    }


def test_aliases_are_copies():
    value = parse_yaml("a: &x [1]\nb: *x", "here")
    value["a"].append(2)
    assert value["b"] == [1]


def files(folder):
    (folder / "utf16.yaml").write_text("a: 1", encoding="utf-16")
    (folder / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    (folder / "long.yaml").write_text("#" * MOST_BYTES + "\na: 1")
    os.mkfifo(folder / "pipe.yaml")
    (folder / "link.yaml").symlink_to(folder / "none")
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    return {
        folder / "utf16.yaml": "it is UTF-16; write it in UTF-8",
        folder / "latin.yaml": "byte 3 is not UTF-8",
        folder / "long.yaml": "longer than 1,048,576 bytes",
        folder / "pipe.yaml": "no regular file",
        folder / "link.yaml": "No such file",
        folder / "loop.yaml": "symbolic links",
        folder: "directory",
        "/dev/zero": "no regular file",
        folder / ("n" * 5000): "name too long",
        "a\0b.yaml": "null byte",
        "a\ud800.yaml": "surrogates not allowed",
        "": "No such file",
    }


def test_files_that_are_not_read(tmp_path):
    for path, said in files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            read_mapping(path)
        message = str(caught.value)
        assert said.lower() in message.lower() and message.startswith("cannot read the configuration")
        assert message.isprintable() and len(message) < 500


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_byte_order_mark_is_no_character(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_mapping(path) == {"a": 1}


WORDS = st.sampled_from(
    [*VALUES, "<<", "!x", "*a", "&a", "null", "089", "0b1", "1e5", "a: b", "", " ", "\n"]
) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_what_is_written_is_read_back(value):
    assert parse_yaml(dump_yaml(value), "here") == value
    assert yaml.safe_load(dump_yaml(value)) == value, "readers of YAML 1.1 see the same"
    assert parse_json(json.dumps(value), "here") == value


def test_every_command_reads_the_same_number(tmp_path, capsys):
    """train's parser, a model's configuration, compare's files and its words; to YAML 1.1, 1e-5 is a word."""
    from subquad.compare.models import find_config
    from subquad.compare.subjects import specification
    from subquad.models.config import LMConfig
    from subquad.train.cli import main

    path, mixer = tmp_path / "a.yaml", "{name: Mamba2, dt_min: 1e-5}"
    blocks = f"[{{pattern: [{{mixer: {mixer}}}]}}]"
    path.write_text(f"model: {{lm: {{d_model: 16, norm_eps: 1e-5, blocks: {blocks}}}}}")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--model.lm.blocks", blocks, "--print_config"])
    printed = parse_yaml(capsys.readouterr().out, "printed")
    for config in (LMConfig.from_file(path), find_config(str(path)), LMConfig.from_dict(printed)):
        (_, block), *_ = config.flat_blocks()
        assert config.norm_eps == block["mixer"]["dt_min"] == 1e-5
    assert specification("--layers", mixer)["dt_min"] == 1e-5
