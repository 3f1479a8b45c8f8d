"""Files to documents to cached tokens."""

import dataclasses
import itertools
import json
import os
import random

import numpy as np
import pytest

from subquad.errors import UserError
from subquad.models.tokenizer import ByteTokenizer, load_tokenizer
from subquad.train import corpus
from subquad.train.corpus import Document, expand, read_files, split, standard_library, tokenize


def whole(files):
    return [Document(f, 0, f.size) for f in files]


def test_standard_library_split():
    files = read_files(standard_library())
    folders = {part for f in files for part in f.path.parts}
    assert not folders & {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings", "site-packages"}
    assert len({f.digest for f in files}) == len(files)
    train, val = split(files, 0.05)
    held_out, total = sum(d.stop for d in val), sum(f.size for f in files)
    assert 0.05 * total <= held_out <= 0.056 * total
    assert max(d.stop for d in val) <= 0.1 * held_out
    assert {d.file for d in train} | {d.file for d in val} == set(files)
    assert not {d.file for d in train} & {d.file for d in val}
    assert split(files[::-1], 0.05)[1] == val[::-1], "which files are validation does not depend on their order"


def test_few_files_are_split_at_a_line_near_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("é".encode() * 500)  # no line ends: cut between characters
    files = read_files(expand(str(tmp_path / "*.txt"), "files"))
    train, val = split(files, 0.1)
    for before, after in zip(train, val, strict=True):
        assert before.read() + after.read() == before.file.path.read_bytes()
        assert 0.09 <= len(after.read()) / before.file.size <= 0.12
        after.read().decode()
    assert train[0].read().endswith(b"\n")


def test_copies_and_empty_files_count_once_and_not(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", ""), ("d", "other")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [f.path.name for f in read_files(sorted(tmp_path.iterdir()))] == ["a", "d"]


def test_tokens_come_from_the_cache_the_second_time(tmp_path, texts, monkeypatch):
    documents = whole(read_files(expand(str(texts / "*.txt"), "files")))
    first = tokenize(documents, ByteTokenizer(), tmp_path)
    monkeypatch.setattr(corpus, "_encode", None)  # would fail if it were called
    second = tokenize(documents, ByteTokenizer(), tmp_path)
    assert bytes(second.tokens) == bytes(first.tokens) == b"".join(d.read() for d in documents)
    assert isinstance(second.tokens, np.memmap)
    assert second.starts.tolist() == np.cumsum([0, *(d.stop for d in documents)]).tolist()


def test_cache_key_is_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one text", encoding="utf-8")
    assert bytes(tokenize(whole(read_files([path])), ByteTokenizer(), tmp_path / "c").tokens) == b"one text"
    path.write_text("two text", encoding="utf-8")  # the same name and size
    assert bytes(tokenize(whole(read_files([path])), ByteTokenizer(), tmp_path / "c").tokens) == b"two text"


def test_an_interrupted_cache_leaves_nothing(tmp_path, texts, monkeypatch):
    documents = whole(read_files(expand(str(texts / "*.txt"), "files")))
    monkeypatch.setattr(corpus.np, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"cannot write .*tokens.*No space left"):
        tokenize(documents, ByteTokenizer(), tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_damaged_cache_is_named(tmp_path, texts):
    documents = whole(read_files(expand(str(texts / "*.txt"), "files")))
    tokenize(documents, ByteTokenizer(), tmp_path)
    (path,) = tmp_path.rglob("tokens.bin")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"damaged.*delete that folder"):
        tokenize(documents, ByteTokenizer(), tmp_path)


def test_hugging_face_tokens_end_with_eos(tmp_path, word_tokenizer):
    (tmp_path / "a").write_text("one two", encoding="utf-8")
    (tmp_path / "b").write_text("three", encoding="utf-8")
    files = read_files([tmp_path / "a", tmp_path / "b"])
    tokens = tokenize(whole(files), load_tokenizer(word_tokenizer), tmp_path / "c")
    assert tokens.tokens.tolist() == [2, 3, 1, 4, 1]
    assert tokens.starts.tolist() == [0, 3, 5]
    assert tokens.bytes_per_token == 12 / 5


def test_text_that_is_not_utf8(tmp_path, word_tokenizer):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    documents = whole(read_files([path]))
    assert bytes(tokenize(documents, ByteTokenizer(), tmp_path / "c").tokens) == b"caf\xe9"
    with pytest.raises(UserError, match=r"latin\.txt.*not UTF-8"):
        tokenize(documents, load_tokenizer(word_tokenizer), tmp_path / "c")


def random_files(folder, draw):
    """Files of one of many kinds of collection, by name and content."""
    words = [bytes(draw.choices(range(97, 123), k=draw.randint(1, 9))) for _ in range(40)]

    def text(size, line):
        found = b""
        while len(found) < size:
            found += b" ".join(draw.choices(words, k=max(1, line // 6))) + draw.choice([b"\n", b"\r\n", b"\n\n"])
        return found[:size]

    kind = draw.choice(
        ["similar", "mixed", "one huge", "tiny", "one line", "no line ends", "characters", "many copies"]
    )
    count = draw.choice([1, 2, 3, 7, 19, 20, 21, 40, 120, 199, 200, 201, 350])
    for i in range(count):
        size = draw.randint(400, 500)
        if kind == "mixed":
            size = int(10 ** draw.uniform(0, 4.3))
        elif kind == "tiny":
            size = draw.randint(1, 30)
        data = text(size, 60)
        if kind == "one huge" and not i:
            data = text(50_000, 60)
        elif kind == "one line":
            data = text(size, 6 * size).replace(b"\n", b" ").replace(b"\r", b" ") + b"\n"
        elif kind == "no line ends":
            data = data.replace(b"\n", b".").replace(b"\r", b".")
        elif kind == "characters":
            data = "".join(draw.choices("äß京🙂", k=size // 3)).encode()
        (folder / f"{i:03d}").write_bytes(data)
        if kind == "many copies":
            (folder / f"{i:03d}.copy").write_bytes(data)
    (folder / "empty").touch()
    return kind


@pytest.mark.parametrize("trial", range(30))
def test_a_split_has_its_part_of_every_kind_of_files(tmp_path, trial):
    draw = random.Random(random.randrange(2**32))
    kind = random_files(tmp_path, draw)
    fraction = draw.choice([0.01, 0.05, 0.05, 0.1, 0.3, 0.5, 0.9])
    files = read_files(sorted(tmp_path.iterdir()))
    train, val = split(files, fraction)
    total, held_out = sum(f.size for f in files), sum(d.stop - d.start for d in val)
    assert held_out + sum(d.stop - d.start for d in train) == total
    if fraction * total >= 30 and total * (1 - fraction) >= 30:
        assert train and val
        assert 0.5 <= held_out / (fraction * total) <= 2, (kind, len(files), fraction)
    found = {}
    for d in [*train, *val]:
        assert d.start < d.stop
        found.setdefault(d.file.digest, []).append((d.start, d.stop))
        if kind == "characters":
            d.read().decode()
    for file in files:  # every byte once: no text is in both
        parts = sorted(found[file.digest])
        assert parts[0][0] == 0 and parts[-1][1] == file.size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    # By content alone: not by names, places or order.
    moved = [dataclasses.replace(f, path=f.path.with_name(f"moved-{f.path.name}")) for f in files]
    for f, m in zip(files, moved, strict=True):
        f.path.rename(m.path)
    again = split(draw.sample(moved, len(moved)), fraction)
    for before, after in zip((train, val), again, strict=True):
        assert {(d.file.digest, d.start, d.stop) for d in before} == {(d.file.digest, d.start, d.stop) for d in after}


def test_links_that_form_a_loop_are_walked_once(tmp_path):
    data = tmp_path / "data"
    for folder in ("a/b", "c"):
        (data / folder).mkdir(parents=True)
        (data / folder / "text.txt").write_text(folder, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far", encoding="utf-8")
    for name in ("loop", "a/loop", "a/b/loop", "c/loop"):  # of glob alone 4**40 paths
        (data / name).symlink_to(data)
    (data / "far").symlink_to(tmp_path / "elsewhere")
    (data / "dangling.txt").symlink_to(data / "nothing")
    (data / ".hidden").mkdir()
    (data / ".hidden" / "no.txt").write_text("hidden", encoding="utf-8")
    found = expand(str(data / "**" / "*.txt"), "files")
    assert {path.name for path in found} == {"text.txt", "far.txt"}
    assert sorted(path.read_text() for path in found) == ["a/b", "c", "far"]


def test_patterns_from_here(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    for name in ("a.txt", "x/b.txt", "x/c.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in expand("**/*.txt", "files")] == ["a.txt", "x/b.txt"]
    assert [str(p) for p in expand(["x/**/*.md", "a.txt"], "files")] == ["a.txt", "x/c.md"]


def test_names_that_cannot_be_files():
    for pattern in ("x" * 5000, "a\0b", ""):
        with pytest.raises(UserError, match=r"data\.files"):
            expand(pattern, "data.files")


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 20, encoding="utf-8")
    (file,) = read_files([path])
    path.write_text("some more\n" * 20, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt changed"):
        tokenize(whole([file]), ByteTokenizer(), tmp_path / "cache")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: No such file"):
        tokenize(whole([file]), ByteTokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: No such file"):
        read_files([path])

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.exists", denied)
    with pytest.raises(UserError, match=r"data\.files: cannot read .*: Permission denied"):
        expand(str(path), "data.files")


@pytest.fixture
def cached(tmp_path, texts):
    """A function that reads a cache, and the cache's folder."""
    documents = whole(read_files(expand(str(texts / "*.txt"), "files")))
    tokenize(documents, ByteTokenizer(), tmp_path)
    (folder,) = (tmp_path / "tokens").iterdir()
    return lambda: tokenize(documents, ByteTokenizer(), tmp_path), folder


def test_a_cache_is_readable_as_the_umask_says(cached):
    _, folder = cached
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in folder.iterdir())


def test_every_flipped_bit_is_noticed(cached):
    read, folder = cached
    good = read()
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(60):
            at, bit = random.randrange(len(whole)), random.randrange(8)
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = read()
            except UserError as error:
                assert "damaged" in str(error)
            else:  # a space of the header or of meta.json
                assert path.name != "tokens.bin", (at, bit)
                assert bytes(found.tokens) == bytes(good.tokens) and found.n_bytes == good.n_bytes, (path, at, bit)
                assert found.starts.tolist() == good.starts.tolist()
        path.write_bytes(whole)
    assert read().digest == good.digest


META = ["", "[]", "{}", "null", '{"dtype": 5}', '{"dtype": "O", "n_bytes": 3}', '{"dtype": "|u1", "n_bytes": -1}', "\0"]
META += ['{"dtype": "|u1", "n_bytes": 1' + "0" * 5000 + "}", '{"dtype": "|u1", "n_bytes": "x"}', "[" * 100_000]
META += ['{"dtype": "|u1", "n_bytes": 2, "digest": []}', '{"dtype": "<u8", "n_bytes": 2}', '{"dtype": ["|u1"]}']


@pytest.mark.parametrize("name", ["meta.json", "starts.npy", "tokens.bin"])
def test_any_content_of_a_cache_is_one_sentence(cached, name):
    read, folder = cached
    contents = [b"", b"\0" * 100, random.randbytes(500), b"PK\x03\x04" + random.randbytes(100), b"\x80\x04."]
    good = (folder / name).read_bytes()
    contents += [good[: len(good) // 2], good + b"\0", *(text.encode() for text in META)]
    for start in ("(1000000000000,)", "(2, 3)", "(-1,)"):  # sizes that would be allocated before they are compared
        contents.append(good.replace(b"(31,)", start.encode()))
    for content in contents:
        if content != good:
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match="damaged"):
                read()


def test_a_cache_without_checksums_is_read(cached):
    read, folder = cached
    meta = json.loads((folder / "meta.json").read_text())
    del meta["digest"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert len(read().digest) == 24


@pytest.mark.parametrize("count", [20, 50, 199])
def test_small_files_that_cannot_fill_the_part_are_not_all_of_it(tmp_path, count):
    """Of similar files none is small; of small ones beside large ones all would be validation, and it would be tiny."""
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"file {i} of many words\n" * 20, encoding="utf-8")
    for large in (0, 3):
        for i in range(large):
            (tmp_path / f"large-{i}.txt").write_text(f"large {i} file of words\n" * 20_000, encoding="utf-8")
        files = read_files(expand(str(tmp_path / "*.txt"), "files"))
        for fraction in (0.02, 0.05, 0.1):
            part = sum(d.stop - d.start for d in split(files, fraction)[1]) / sum(f.size for f in files)
            assert 0.5 * fraction <= part <= 1.5 * fraction


def test_files_of_one_character_each_are_kept_whole(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(chr(0x4E00 + i), encoding="utf-8")
    train, val = split(read_files(sorted(tmp_path.iterdir())), 0.05)
    assert len(train) + len(val) == 100 and len(val) in (4, 5)
