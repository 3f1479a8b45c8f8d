"""Tokenizers: streamed text, end tokens, special tokens, odd vocabularies."""

import random

import pytest
from hf_kinds import KINDS, TEXTS, tokenizer

from subquad.errors import UserError
from subquad.models.tokenizer import CONTEXT, ByteTokenizer, load_tokenizer
from subquad.train.data import TextData

SEQUENCES = [60, pytest.param(1500, marks=pytest.mark.slow)]


def stream(tok, tokens, before=()):
    push = tok.decoder(list(before)[-CONTEXT:])
    return [*(push(t) for t in tokens), push(None)]


def ids(tok, rng, n):
    """Random ids, or those of real text, cut anywhere, or a mixture; some of them unknown."""
    text = tok.encode("".join(rng.sample(TEXTS, 2))[rng.randrange(30) :])
    noise = [rng.randrange(tok.vocab_size + 3) for _ in range(n)]
    return rng.choice([noise, text[-n:], [rng.choice(pair) for pair in zip(noise, text, strict=False)]])


@pytest.mark.parametrize("n", SEQUENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_text_of_the_whole(kind, n):
    tok, rng = tokenizer(kind), random.Random(0)
    for _ in range(n):
        tokens = ids(tok, rng, rng.randrange(1, 40))
        whole = tok.decode_bytes(tokens).decode()
        assert "".join(stream(tok, tokens)) == whole, tokens


@pytest.mark.parametrize("n", SEQUENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_text_goes_on_from_any_token(kind, n):
    """The prompt's whole characters and what is streamed after it are the text of both."""
    tok, rng = tokenizer(kind), random.Random(1)
    for _ in range(n // 3):
        tokens = tok.encode("".join(rng.sample(TEXTS, 1)) + "北京 I like 😀")
        at = rng.randrange(1, len(tokens))
        whole = tok.decode_bytes(tokens).decode()
        starts = [tok.decode_bytes(tokens[: max(at - i, 0)]).decode() for i in range(4)]  # some end within a character
        shown = max((s[:k] for s in starts for k in range(len(s) + 1) if whole.startswith(s[:k])), key=len)
        assert "".join(stream(tok, tokens[at:], tokens[:at])) == whole[len(shown) :], at


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_the_prompt_begins_comes_whole(kind):
    tok = tokenizer(kind)
    for text in ("I like 😀", "北京"):
        tokens = tok.encode(text)
        for cut in (1, 2):
            assert "".join(stream(tok, tokens[-cut:], tokens[:-cut])) == text[-1]
    assert "".join(stream(tok, tok.encode("\ufffd"))).strip() == "\ufffd"  # one that was written


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_takes_linear_time(kind, monkeypatch):
    tok, decoded = tokenizer(kind), []
    plain, spelling = tok.decode, tok.spelling
    monkeypatch.setattr(tok, "decode", lambda tokens: decoded.append(len(tokens)) or plain(tokens))
    invalid = [t for t in range(tok.vocab_size) if spelling(t) in ("<0xFF>", "<0xE4>", "ÿ", "ä")] or [0]
    for tokens in (invalid, list(range(tok.vocab_size))):
        counts = []
        for n in (500, 2000):
            decoded.clear()
            stream(tok, (tokens * n)[:n])
            counts.append(sum(decoded))
        assert counts[1] <= 6 * counts[0]  # 16 times were it quadratic


def test_only_a_whole_character_is_pushed():
    pieces = stream(tokenizer("byte_level"), tokenizer("byte_level").encode("a漢ꙮ"))
    assert "".join(pieces) == "a漢ꙮ" and all("\ufffd" not in piece for piece in pieces)


def test_the_byte_tokenizer_goes_on_within_a_character():
    data = "北京".encode()
    for at in range(1, 6):
        assert "".join(stream(ByteTokenizer(), data[at:], data[:at])) == "北京"[at // 3 :]
    assert "".join(stream(ByteTokenizer(), b"a\xffb\xe6\xbc")) == "a\ufffdb\ufffd"


def test_vocab_size_is_above_every_id():
    tok = tokenizer("gaps")
    assert tok.vocab_size == max(tok.backend.get_vocab().values()) + 1 == 91
    assert tok.decode_bytes([7, 8, 10**12, -1, 50]) == b"one two"


@pytest.mark.parametrize("kind, end", [("byte_level", "<|endoftext|>"), ("metaspace", "</s>"), ("word_piece", None)])
def test_a_bare_file_has_the_end_token_that_is_well_known(kind, end, tmp_path):
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path / "tokenizer.json", tmp_path):
        tok = load_tokenizer(spec)
        assert tok.eos_id == (None if end is None else tok.backend.token_to_id(end))
    tok.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.eos_id, again.vocab_size, again.kind) == (tok.eos_id, tok.vocab_size, tok.kind)


def test_the_end_token_that_files_beside_it_or_the_caller_name(tmp_path):
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "tokenizer.json"
    think = load_tokenizer(path).backend.token_to_id("<think>")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{think}, 1]}}')
    assert load_tokenizer(path).eos_id == think
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    assert load_tokenizer(path).eos_id == load_tokenizer(path).backend.token_to_id("a")
    assert load_tokenizer(path, eos="<|endoftext|>").eos_id == think - 2
    with pytest.raises(UserError, match="no token '<none>' to end a text with"):
        load_tokenizer(path, eos="<none>")
    with pytest.raises(UserError, match="no token 'a' to end a text with"):
        load_tokenizer("bytes", eos="a")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_spelled_special_token_is_text_unless_asked(kind):
    plain, parsed = tokenizer(kind), tokenizer(kind, True)
    for token in plain.backend.get_added_tokens_decoder().values():
        if token.special:
            text, i = f"a {token.content} b", plain.backend.token_to_id(token.content)
            assert i in parsed.encode(text) and i not in plain.encode(text)
            assert plain.decode_bytes(plain.encode(text)).decode() == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "\x00", "a\r\nb", "\ufeffa", "x" * 2000, " ", "\ufffd", "ä" * 300])
def test_odd_text(kind, text):
    tok = tokenizer(kind)
    tokens = tok.encode(text)
    assert "".join(stream(tok, tokens)) == tok.decode_bytes(tokens).decode()
    if kind == "byte_level":
        assert tok.decode_bytes(tokens).decode() == text


@pytest.mark.parametrize("tok", [tokenizer("byte_level"), ByteTokenizer()], ids=["hf", "bytes"])
def test_half_a_surrogate_pair_is_no_text(tok):
    with pytest.raises(UserError, match=r"half a surrogate pair \(character 1\)"):
        tok.encode("a\ud800")


def test_a_length_in_the_file_cuts_nothing(tmp_path):
    rust = KINDS["byte_level"]()
    rust.enable_truncation(3)
    rust.enable_padding(length=50)
    rust.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path / "tokenizer.json")
    assert tok.decode_bytes(tok.encode("a longer text")) == b"a longer text"


def test_a_broken_file_is_one_sentence(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no tokenizer that loads"):
            load_tokenizer(path)


@pytest.mark.parametrize("kind, said", [("word_piece", 1), ("byte_level", 0)])
def test_training_says_once_that_nothing_separates_documents(kind, said, tmp_path, capsys):
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    data = TextData(tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.tokenizer is data.tokenizer
    assert capsys.readouterr().err.count("documents are not separated") == said
    assert TextData(tokenizer=str(tmp_path / "tokenizer.json"), eos="a").tokenizer.eos_id is not None
