"""The `infer` command, in this process and in new ones."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad import cli
from subquad.infer import progress
from subquad.infer.device import PeakMemory
from subquad.infer.generate import Context, generate
from subquad.models.checkpoint import load, save
from subquad.models.tokenizer import load_tokenizer

INFER = Path(sys.executable).with_name("infer")


@pytest.fixture(scope="session")
def folder(small, tmp_path_factory):
    """Two saved models, `m` and `other`, to be run from their folder."""
    folder = tmp_path_factory.mktemp("models")
    save(small("hybrid"), folder / "m")
    save(small("linear", seed=1), folder / "other")
    return folder


@pytest.fixture(autouse=True)
def at_work(folder, tmp_path, monkeypatch):
    for name in ("m", "other"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def infer(capsys):
    """Runs `infer --model m ...` in this process: (exit code, stdout, stderr)."""

    def run(*arguments, model="m", dtype="float64"):
        code = cli.main(["infer", "--model", model, "--dtype", dtype, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def process(*arguments, **kwargs):
    return subprocess.run([INFER, *map(str, arguments)], capture_output=True, timeout=600, **kwargs)


def text_of(prompt, n, **settings):
    return generate(load("m", dtype=torch.float64), prompt, max_new_tokens=n, **settings)


def test_help_starts_at_once_without_torch():
    script = "import sys; from subquad.cli import infer; infer(['--help'])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-P", "-X", "importtime", "-c", script], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # 0.06 s; a torch import takes 2 s
    assert "--save-state" in done.stdout
    assert not {"torch", "lightning", "transformers"} & {
        line.split("|")[-1].strip() for line in done.stderr.split("\n")
    }


def test_stdout_is_the_text_and_nothing_else(infer):
    assert infer("--prompt", "abc", "--max-new-tokens", 20) == (0, text_of("abc", 20), "")


def test_a_prompt_from_a_file_or_stdin_may_be_any_bytes(infer, monkeypatch):
    prompt = b"\xff\x00 no text"
    Path("p").write_bytes(prompt)
    wanted = text_of(prompt, 8)
    assert infer("--prompt-file", "p", "--max-new-tokens", 8)[1] == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    assert infer("--max-new-tokens", 8)[1] == wanted


def test_sampling_options_reach_the_loop(infer):
    settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 4}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    wanted = text_of("abc", 30, **settings)
    assert infer("--prompt", "abc", "--max-new-tokens", 30, *options)[1] == wanted
    stop = wanted[11:13]
    stopped = infer("--prompt", "abc", "--max-new-tokens", 30, *options, "--stop", "no such", "--stop", stop)[1]
    assert stopped == wanted[: wanted.find(stop)]


def test_samples_come_one_after_the_other(infer):
    texts = text_of("abc", 9, temperature=1.0, seed=4, num_samples=3)
    _, out, _ = infer("--prompt", "abc", "--max-new-tokens", 9, "--temperature", 1, "--seed", 4, "--num-samples", 3)
    assert out == "".join(f"==> {i} <==\n{text}\n" for i, text in enumerate(texts, 1))


def test_a_state_goes_on_in_a_new_process(infer):
    whole = text_of("some prompt", 25, temperature=1.0, seed=6)
    begin = ["--prompt", "some prompt", "--max-new-tokens", 10, "--temperature", 1, "--seed", 6]
    code, first, err = infer(*begin, "--save-state", "s", "--prefill-chunk", 4)
    assert (code, err) == (0, "the state is in s\n")
    script = (
        "import sys; from subquad.cli import infer; code = infer(sys.argv[1:]);"
        "print(sorted({'transformers', 'lightning', 'matplotlib', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    going_on = ["--model", "m", "--dtype", "float64", "--load-state", "s", "--max-new-tokens", 15, "--temperature", 1]
    command = [sys.executable, "-P", "-c", script, *going_on, "--stats", "stats.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.stderr == "[]\n"  # without filters, nothing slow is imported
    stats = json.loads(Path("stats.json").read_text())
    assert stats["decode_tokens"] == 15 and stats["prefill_tokens"] == 0
    # A character may lie across the break, where each part shows as replacement characters.
    assert (first + done.stdout).replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert len(done.stdout) > 10


def test_a_loaded_state_takes_more_prompt_and_another_seed(infer):
    infer("--prompt", "some ", "--max-new-tokens", 0, "--save-state", "s")
    end = ["--max-new-tokens", 12, "--temperature", 1, "--seed", 9]
    assert infer("--load-state", "s", "--prompt", "prompt", *end)[1] == text_of(
        "some prompt", 12, temperature=1.0, seed=9
    )
    _, samples, _ = infer("--load-state", "s", "--prompt", "prompt", *end, "--num-samples", 2)
    assert samples.startswith(f"==> 1 <==\n{text_of('some prompt', 12, temperature=1.0, seed=9)}\n==> 2 <==\n")


def test_stats(infer):
    infer("--prompt", "x" * 50, "--max-new-tokens", 7, "--prefill-chunk", 16, "--stats", "stats.json")
    stats = json.loads(Path("stats.json").read_text())
    assert stats["prefill_tokens"] == 49 and stats["decode_tokens"] == 7
    assert stats["prefill_tokens_per_second"] == pytest.approx(49 / stats["prefill_seconds"], rel=0.05)
    assert stats["decode_tokens_per_second"] == pytest.approx(7 / stats["decode_seconds"], rel=0.05)
    assert stats["backend"] == "torch" and stats["device"] == "cpu" and stats["dtype"] == "float64"
    assert stats["state_bytes"] > 57 * 2 * 2 * 4 * 8  # the cache alone: keys and values of 57 tokens, 2 heads of 4
    assert stats["peak_memory_bytes"] >= 0 and stats["interrupted"] is False


def test_ctrl_c_keeps_the_text_and_the_state(infer):
    sampled = ["--temperature", 1, "--seed", 2]
    options = ["--prompt", "endless", "--max-new-tokens", 10**9, "--save-state", "s", "--stats", "stats.json", *sampled]
    command = [INFER, "--model", "other", "--dtype", "float64", *map(str, options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        start = child.stdout.read(30)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=600)
    finally:
        child.kill()
    text, err = (start + out).decode(), err.decode()
    n = json.loads(Path("stats.json").read_text())["decode_tokens"]
    assert child.returncode == 130
    assert err == f"the state is in s\ninterrupted after {7 + n - 1} tokens read and {n} generated\n"
    model = load("other", dtype=torch.float64)
    assert text == generate(model, "endless", max_new_tokens=n, temperature=1.0, seed=2)
    _, rest, _ = infer("--load-state", "s", "--max-new-tokens", 8, "--temperature", 1, model="other")
    whole = generate(model, "endless", max_new_tokens=n + 8, temperature=1.0, seed=2)
    assert (text + rest).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_ctrl_c_within_a_long_prompt_keeps_what_was_read(infer, monkeypatch):
    prompt = "a prompt of some length"
    wanted = text_of(prompt, 8)
    forward, calls = Context._forward, []

    def stopped_in_the_third_call(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments)

    monkeypatch.setattr(Context, "_forward", stopped_in_the_third_call)
    begin = ["--prompt", prompt, "--prefill-chunk", 4, "--save-state", "s"]
    message = "the state is in s\ninterrupted after 12 tokens read and 0 generated\n"
    assert infer(*begin) == (130, "", message)
    assert infer("--load-state", "s", "--max-new-tokens", 8)[:2] == (0, wanted)


def test_a_second_ctrl_c_ends_at_once(infer, monkeypatch):
    monkeypatch.setattr(Context, "_forward", lambda *arguments: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    assert infer("--prompt", "abc", "--save-state", "s")[:2] == (130, "")
    assert not Path("s").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


BAD = [
    ([], "there is no prompt; give --prompt TEXT, --prompt-file F, or text on stdin"),
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "a", "--prompt-file", "p"], "--prompt and --prompt-file were both given"),
    (["--prompt-file", "none"], "cannot read the prompt file none: No such file"),
    (["--promt", "a"], "infer has no option --promt; did you mean '--prompt'?"),
    (["--prompt", "a", "--temperature", "warm"], "infer: argument --temperature: invalid float value: 'warm'"),
    (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
    (["--prompt", "a", "--top-p", "0.5"], "top_p 0.5 has no effect at temperature 0"),
    (["--prompt", "a", "--num-samples", "3"], "num_samples 3 at temperature 0"),
    (["--prompt", "a", "--prefill-chunk", "0"], "prefill_chunk is 0; it must be at least 1"),
    (["--prompt", "a", "--dtype", "bf16"], "there is no dtype 'bf16' here; did you mean 'bfloat16'?"),
    (["--prompt", "a", "--device", "cudda"], "there is no device 'cudda'; this machine has: cpu"),
    (["--prompt", "a", "--model", "nowhere"], "there is no model folder nowhere"),
    (["--prompt", "a", "--model", "broken"], "broken/model.safetensors is damaged or no safetensors file"),
    (["--prompt", "a", "--load-state", "nowhere"], "there is no state file nowhere"),
    (["--prompt", "a", "--load-state", "p"], "p is damaged or no state file"),
    (["--load-state", "foreign"], "foreign belongs to another model"),
    (["--prompt", "a", "--save-state", "p"], "p exists; pass overwrite (--overwrite) to replace it"),
    (["--prompt", "a", "--stats", "p"], "p exists; pass overwrite (--overwrite) to replace it"),
    (["--prompt", "a", "--save-state", "m"], "m is a folder; give a file to write"),
    (["--prompt", "a", "--save-state", "no/s"], "cannot write no/s: there is no folder no"),
    (["--prompt", "é", "--model", "narrow"], "token 195 at position 0 is outside the model's vocabulary of 128"),
    (
        ["--prompt-file", "p", "--model", "words"],
        "the text is not UTF-8 (byte 4); only the byte tokenizer takes any bytes",
    ),
]


@pytest.mark.parametrize("arguments, sentence", BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input(infer, small, arguments, sentence, monkeypatch):
    Path("p").write_bytes(b"text\xff")
    if "broken" in arguments:
        save(small("linear"), "broken")
        os.truncate("broken/model.safetensors", 1000)
    if "narrow" in arguments:
        save(small("linear", vocab_size=128), "narrow")
    if "words" in arguments:
        save(small("linear"), "words", tokenizer=word_tokenizer())
    if "foreign" in arguments:
        infer("--prompt", "a", "--max-new-tokens", 1, "--save-state", "foreign", model="other")
    monkeypatch.setattr(sys, "stdin", Terminal())
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    code, out, err = infer(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


class Terminal(io.StringIO):
    def isatty(self):
        return True


def word_tokenizer():
    rust = Tokenizer(models.WordLevel({"<unk>": 0, "text": 1}, unk_token="<unk>"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>").save_pretrained("tokenizer")
    return load_tokenizer("tokenizer")


def test_overwrite_replaces(infer):
    for name in ("s", "stats.json"):
        Path(name).write_text("old")
    assert (
        infer("--prompt", "a", "--max-new-tokens", 1, "--save-state", "s", "--stats", "stats.json", "--overwrite")[0]
        == 0
    )
    assert json.loads(Path("stats.json").read_text())["decode_tokens"] == 1
    assert infer("--load-state", "s", "--max-new-tokens", 1)[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(infer):
    Path("locked").mkdir(mode=0o500)
    assert infer("--prompt", "a", "--save-state", "locked/s") == (
        2,
        "",
        "error: cannot write locked/s: Permission denied\n",
    )


def test_memory_does_not_grow_with_the_prompt():
    """All that reading 30,000 tokens takes, in calls of 1,024, is less than their scores alone would: 31 MB."""
    Path("p").write_bytes(bytes(i * i % 251 for i in range(30_000)))
    options = ["--prefill-chunk", 1024, "--max-new-tokens", 2, "--stats", "stats.json"]
    assert process("--model", "other", "--prompt-file", "p", *options).returncode == 0
    stats = json.loads(Path("stats.json").read_text())
    assert stats["prefill_tokens"] == 29_999 and stats["peak_memory_source"] == "VmHWM"
    assert stats["peak_memory_bytes"] < 16 * 2**20


def test_peak_memory_sees_what_is_freed_again():
    memory = PeakMemory(torch.device("cpu"))
    torch.ones(2**23)
    assert 28 * 2**20 < memory.above() < 48 * 2**20


def test_the_bar_shows_only_for_long_jobs(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
    for seconds, shown in ((0.5, False), (1.5, True)):
        with progress.Progress("reading", 40) as bar:
            for _ in range(3):
                now[0] += seconds
                bar.advance(10)
            assert (bar.bar is not None) == shown
    assert capsys.readouterr().out == ""
