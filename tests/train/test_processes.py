"""Runs of two processes on a CPU, launched by Lightning and by torchrun; two runs in one folder; damaged files."""

import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from subquad import cli
from subquad.train.folders import Lock
from subquad.train.progress import read_metrics

BIN = Path(sys.executable).parent


def lightning(*arguments, strategy="ddp"):
    options = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    return [BIN / "subquad", "train", "fit", *arguments, *options]


def torchrun(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    start = [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(port), "-m", "subquad"]
    return [*start, "train", "fit", *arguments, *options]


def run(command, code=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def edited(config, tmp_path, *, data=(), **trainer):
    values = yaml.safe_load(config.read_text())
    values["trainer"] |= trainer
    values["data"] |= dict(data)
    values.pop("run")
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


TRUNCATED = {"truncate": 24, "context": 96, "batch_tokens": 48}


@pytest.mark.parametrize("launch", [torchrun, pytest.param(lightning, marks=pytest.mark.slow)])
def test_two_processes_go_on_as_if_unbroken(config, tmp_path, launch):
    """With truncated backpropagation every process carries a state of its own."""
    config = edited(config, tmp_path, data=TRUNCATED, max_steps=6, val_check_interval=100)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(launch("--config", config, "--run_dir", whole, "--checkpoint_every", "3"))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "model")
    (broken / "checkpoints" / "step-00000006.ckpt").unlink()
    run(launch("--config", config, "--run_dir", broken, "--resume"))
    assert weights(broken) == weights(whole)
    assert len(read_metrics(broken)) == len(read_metrics(whole))


@pytest.mark.parametrize("launch", [lightning, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_make_one_folder(config, tmp_path, launch):
    config = edited(config, tmp_path, max_steps=2, val_check_interval=100)
    folder = tmp_path / "run"
    run(launch("--config", config, "--run_dir", folder))
    before = weights(folder)
    assert (
        "exists; use --resume" in run(launch("--config", config, "--run_dir", folder), launch is torchrun or 2).stderr
    )
    assert weights(folder) == before
    run(launch("--config", config, "--run_dir", folder, "--overwrite", "--model.lr", "0.02"))
    assert weights(folder) != before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_folder_in_use_is_left_alone(config, tmp_path, capsys):
    folder = tmp_path / "run"
    lock = Lock(folder)
    for more in ([], ["--overwrite"], ["--resume"]):
        pid = os.fork()  # a lock is one process's
        if not pid:
            os.close(lock.handle)
            code = cli.main(["train", "fit", "--config", str(config), "--run_dir", str(folder), *more])
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert not folder.exists()
    lock.release()
    assert (
        cli.main(["train", "fit", "--config", str(config), "--run_dir", str(folder), "--trainer.max_steps", "1"]) == 0
    )


def test_the_owner_is_named(tmp_path):
    lock = Lock(tmp_path / "run")
    with pytest.raises(Exception, match=rf"run is in use by process {os.getpid()} on {socket.gethostname()} since 2"):
        Lock(tmp_path / "run")
    lock.release()
    Lock(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_holds_nothing(tmp_path):
    pid = os.fork()
    if not pid:
        Lock(tmp_path / "run")
        (tmp_path / "held").touch()
        time.sleep(60)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    Lock(tmp_path / "run").release()


def fit(*arguments):
    return cli.main(["train", "fit", *map(str, arguments)])


def test_a_damaged_checkpoint_is_left_out(config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert fit("--config", config, "--run_dir", folder, "--checkpoint_every", 6) == 0
    whole = weights(folder)
    older, newest = sorted((folder / "checkpoints").iterdir())
    flip(newest)
    assert fit("--run_dir", folder, "--resume") == 0
    assert f"the checkpoint {newest} is damaged; the one before it is taken" in capsys.readouterr().err
    assert weights(folder) == whole
    flip(newest)
    flip(older)
    assert fit("--run_dir", folder, "--resume") == 2
    assert "there is no undamaged checkpoint" in capsys.readouterr().err


def flip(path):
    """Flip a bit of the largest tensor."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        part = max(file.infolist(), key=lambda info: info.file_size)
    at = part.header_offset
    name, extra = (int.from_bytes(data[at + n : at + n + 2], "little") for n in (26, 28))
    data[at + 30 + name + extra + part.file_size // 2] ^= 4
    path.write_bytes(data)


def test_metrics_stay_until_there_are_more(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert fit("--config", config, "--run_dir", folder) == 0
    before = (folder / "metrics" / "metrics.csv").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subquad.files._to_disk", full)
    assert fit("--run_dir", folder, "--resume", "--trainer.max_steps", 14) == 2
    assert (folder / "metrics" / "metrics.csv").read_bytes() == before
    monkeypatch.undo()
    assert fit("--run_dir", folder, "--resume", "--trainer.max_steps", 14) == 0
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 15))
    assert torch.isfinite(torch.tensor([row["train/loss"] for row in rows if "train/loss" in row])).all()
