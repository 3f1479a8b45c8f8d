"""What must be kept is kept, whatever happens to what is shown: `infer` in children with odd streams and signals."""

import errno
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from subquad import cli
from subquad.infer.generate import Context, generate
from subquad.models.checkpoint import load, save

STEPS = 12
KEEP = ["--save-state", "s", "--stats", "stats.json"]


@pytest.fixture(autouse=True)
def at_work(small, tmp_path, monkeypatch):
    save(small("linear", seed=1), tmp_path / "m")
    monkeypatch.chdir(tmp_path)


def child(*arguments, stdout=None, stdin=None, encoding="utf-8", at_step=None, act=lambda: None):
    """Exit code of `infer` in a fork whose fd 1 is `stdout` (closed if None) and which acts at a step of decoding."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(Path("err").read_text() if Path("err").exists() else "no stderr")
        return code
    try:
        os.dup2(os.open("err", os.O_CREAT | os.O_WRONLY), 2)
        for number, target in ((0, stdin), (1, stdout)):
            os.close(number)
            if target is not None:
                os.dup2(target, number)
        sys.stdin = None if stdin is None else io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")
        sys.stdout = sys.__stdout__ = (
            None if stdout is None else io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding)
        )
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", line_buffering=True)
        step, calls = Context.step, []

        def acting(self):
            calls.append(1)
            if len(calls) == at_step:
                act()
            return step(self)

        Context.step = acting
        code = cli.infer(["--model", "m", "--device", "cpu", "--max-new-tokens", str(STEPS), *arguments])
        os._exit(code)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(99)


def goes_on(prompt, tokens):
    """Whether state and statistics of a run that stopped after `tokens` tokens were kept, and lead to the same text."""
    stats = json.loads(Path("stats.json").read_text())
    assert stats["decode_tokens"] == tokens
    context = Context.load("s", load("m"), max_new_tokens=STEPS)
    assert context.lengths == [len(prompt) + tokens - 1]
    whole = generate(load("m"), prompt, max_new_tokens=STEPS)
    assert whole.startswith(stats["texts"][0].rstrip("\ufffd"))


def test_the_reader_has_gone():
    """`infer ... | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    assert child("--prompt", "abc", *KEEP, stdout=writing) == 141
    tokens = json.loads(Path("stats.json").read_text())["decode_tokens"]
    assert tokens < STEPS  # nobody reads on
    goes_on(b"abc", tokens)


def test_the_device_is_full():
    full = os.open("/dev/full", os.O_WRONLY)
    assert child("--prompt", "abc", *KEEP, stdout=full) == 2
    goes_on(b"abc", json.loads(Path("stats.json").read_text())["decode_tokens"])
    assert f"cannot write to stdout: {os.strerror(errno.ENOSPC)}" in Path("err").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_encoding_lacks(encoding):
    out = os.open("out", os.O_CREAT | os.O_WRONLY)
    assert child("--prompt", "北京 \udcff", *KEEP, stdout=out, encoding=encoding) == 0
    goes_on("北京 \udcff".encode(errors="surrogateescape"), STEPS)
    assert Path("out").read_bytes().decode(encoding)


def test_closed_streams():
    assert child("--prompt", "abc", *KEEP) == 0
    goes_on(b"abc", STEPS)
    assert child("--save-state", "t") == 2
    assert "the prompt is empty" in Path("err").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_between_two_steps(number, code):
    out = os.open("out", os.O_CREAT | os.O_WRONLY)
    assert child("--prompt", "abc", *KEEP, stdout=out, at_step=4, act=lambda: signal.raise_signal(number)) == code
    goes_on(b"abc", 4)


def test_a_signal_while_the_state_is_saved(monkeypatch):
    write = Context.save

    def interrupted(self, *arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        write(self, *arguments, **options)

    monkeypatch.setattr(Context, "save", interrupted)
    assert child("--prompt", "abc", *KEEP, stdout=os.open(os.devnull, os.O_WRONLY)) == 143
    goes_on(b"abc", STEPS)


def test_an_ignored_signal_stays_ignored():
    def hang_up():
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        assert child("--prompt", "abc", *KEEP, stdout=null, at_step=4, act=hang_up) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    goes_on(b"abc", STEPS)


def test_statistics_tell_the_text():
    assert cli.infer(["--model", "m", "--prompt", "abc", "--max-new-tokens", "5", *KEEP]) == 0
    with torch.no_grad():
        text = generate(load("m"), "abc", max_new_tokens=5)
    assert json.loads(Path("stats.json").read_text())["texts"] == [text]
