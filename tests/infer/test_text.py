"""Tokens to text as they come."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.errors import UserError
from subquad.infer.text import TextStream, stop_strings
from subquad.models.tokenizer import ByteTokenizer, load_tokenizer

TEXT = "plain, ä, 漢字, 👩‍👩‍👧 and \x00"


def pieces(data, stop=(), tokenizer=None):
    stream = TextStream(tokenizer or ByteTokenizer(), stop)
    found = []
    for token in data:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream.stopped


def test_every_piece_is_whole_characters():
    found, _ = pieces(TEXT.encode())
    assert "".join(found) == TEXT
    assert all(len(piece) <= 1 for piece in found)  # nothing waits for more than its own bytes


def test_what_is_no_utf8_is_shown_as_such():
    data = b"a\xffb\xe6\xbc"  # the last two begin a character that never ends
    assert "".join(pieces(data)[0]) == data.decode(errors="replace") == "a\ufffdb\ufffd"


@pytest.mark.parametrize(
    "text, stop, wanted",
    [
        ("one END two", ["END"], "one "),
        ("one ENEND two", ["END"], "one EN"),
        ("one EN", ["END"], "one EN"),
        ("aaab", ["aab"], "a"),
        ("abcd", ["bcx", "cd"], "ab"),
        ("abcd", ["abc", "b"], "a"),
        ("x 漢字 y", ["字"], "x 漢"),
        ("stop", ["stop"], ""),
        ("no", ["yes"], "no"),
    ],
)
def test_stop_strings(text, stop, wanted):
    found, stopped = pieces(text.encode(), stop)
    assert "".join(found) == wanted
    assert stopped == (wanted != text)


def test_only_what_may_be_a_stop_string_waits():
    assert pieces(b"a EN b", ["END"])[0] == ["a", " ", "", "", "EN ", "b", ""]


def test_stop_strings_are_a_tuple():
    assert stop_strings(None) == () and stop_strings("ab") == ("ab",) and stop_strings(["a", "b"]) == ("a", "b")
    with pytest.raises(UserError, match="empty"):
        stop_strings("")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A Hugging Face tokenizer whose tokens are single bytes, so that characters span several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(folder)
    return load_tokenizer(folder)


def test_a_hugging_face_tokenizer_streams_the_same_text(byte_level):
    tokens = byte_level.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    found, _ = pieces(tokens, tokenizer=byte_level)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)


def test_a_hugging_face_tokenizer_gives_the_rest_of_a_broken_character(byte_level):
    found, _ = pieces(byte_level.encode("a漢")[:-1], tokenizer=byte_level)
    assert "".join(found) == "a\ufffd"


def test_a_word_keeps_its_space_after_the_prompt(tmp_path):
    """A tokenizer that strips the first word's space must not do so where the text goes on."""
    words = {"▁one": 0, "▁two": 1, "<unk>": 2}
    rust = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("one two") == [0, 1]
    stream = TextStream(tokenizer, before=[0])
    assert stream.push(1) + stream.finish() == " two"
