"""Files to documents to cached tokens."""

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
    with pytest.raises(UserError, match=r"cannot write the token cache .*No space left"):
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
