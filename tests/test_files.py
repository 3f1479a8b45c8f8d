"""Files and folders appear whole or not at all, whenever the process that writes them is killed."""

import os
import signal
import stat

import pytest

from subquad import files
from subquad.errors import UserError
from subquad.files import check_output, recover, write_atomically, write_folder

STEPS = ("open", "fsync", "replace", "rename", "link", "rmdir", "unlink", "chmod")


def killed(work, step):
    """Run `work` in a child that is killed at the call number `step` into the system; whether it was."""
    child = os.fork()
    if not child:
        count = 0

        def counting(function):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in STEPS:
            setattr(os, name, counting(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def fill(text):
    def write(folder):
        (folder / "one").write_text(text)
        (folder / "two").write_text(text)

    return write


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_old_or_new_whenever_its_writer_is_killed(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_swap", lambda *_: False)
    folder, step = tmp_path / "folder", 0
    write_folder(folder, fill("old"))
    while killed(lambda: write_folder(folder, fill("new"), replace=True), step):
        recover(folder)
        assert contents(folder) in ({"one": "old", "two": "old"}, {"one": "new", "two": "new"})
        write_folder(folder, fill("old"), replace=True)
        assert list(tmp_path.iterdir()) == [folder]  # what was left is gone
        step += 1
    assert contents(folder) == {"one": "new", "two": "new"}
    assert step >= 5


def test_a_file_is_old_or_new_whenever_its_writer_is_killed(tmp_path):
    path, step = tmp_path / "file", 0
    path.write_text("old")
    while killed(lambda: write_atomically(path, lambda p: p.write_text("new"), overwrite=True), step):
        assert path.read_text() in ("old", "new")
        write_atomically(path, lambda p: p.write_text("old"), overwrite=True)
        assert list(tmp_path.iterdir()) == [path]
        step += 1
    assert path.read_text() == "new"
    assert step >= 4


def test_what_a_live_process_writes_is_left_alone(tmp_path):
    theirs = tmp_path / f".file.{files._HOST}.{os.getppid()}.00000000.partial"
    theirs.write_text("half")
    write_atomically(tmp_path / "file", lambda p: p.write_text("mine"), overwrite=False)
    assert theirs.exists()


@pytest.mark.parametrize("write", [write_atomically, None])
def test_what_appears_meanwhile_is_left_alone(tmp_path, write):
    path = tmp_path / "there"

    def slow(partial):
        (partial if write else partial / "one").write_text("mine")
        if write:
            path.write_text("theirs")
        else:
            path.mkdir()
            (path / "one").write_text("theirs")

    with pytest.raises(UserError, match="exists; pass overwrite"):
        write_atomically(path, slow, overwrite=False) if write else write_folder(path, slow)
    assert (path if write else path / "one").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o026)
    try:
        write_atomically(tmp_path / "file", lambda p: (p.unlink(), p.touch(0o600)), overwrite=False)
        write_folder(tmp_path / "folder", fill("x"))
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "folder/one")]
    assert [oct(mode) for mode in modes] == ["0o640", "0o751", "0o640"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", lambda p: p.write_text("new"), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/dev/null", ".", "no/such"])
def test_what_cannot_be_written_is_told_before(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_output(name, overwrite=True)
    assert "\n" not in str(caught.value)
