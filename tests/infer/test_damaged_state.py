"""A state file whose contents no generation wrote is refused with one sentence, checksums or not."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from subquad.errors import UserError
from subquad.infer.generate import Context
from subquad.infer.sampling import generator
from subquad.models.checkpoint import fingerprint_of_0_1

TEXT = torch.tensor([5, 6, 7, 8], dtype=torch.int32)


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    context = Context.start(models["hybrid"], [TEXT, TEXT[:3]], [1, 2], 4)
    for _ in context.read(3):
        pass
    path = tmp_path_factory.mktemp("state") / "s"
    context.save(path)
    return path


def words(**changed):
    """A generator's state with other numbers in its head."""
    state = generator(0).get_state()
    for at, value in changed.items():
        state[int(at[1:]) : int(at[1:]) + 4] = torch.tensor([value], dtype=torch.int32).view(torch.uint8)
    return torch.stack([state, state])


BAD = {
    "unread above the vocabulary": ("unread", lambda t: t + 256),
    "unread below 0": ("unread", lambda t: t - 256),
    "unread of floats": ("unread", lambda t: t.float()),
    "unread in two dimensions": ("unread", lambda t: t[None]),
    "one unread more": ("unread", lambda t: torch.cat([t, t[:1]])),
    "before above the vocabulary": ("before", lambda t: t + 256),
    "before of floats": ("before", lambda t: t.float()),
    "nothing unread": ("unread_lengths", lambda t: torch.tensor([0, 2])),
    "negative counts": ("unread_lengths", lambda t: torch.tensor([-1, 3])),
    "huge counts": ("unread_lengths", lambda t: torch.tensor([2**62, 2**62])),
    "counts of more sequences": ("unread_lengths", lambda t: torch.cat([t, t])),
    "counts that are NaN": ("lengths", lambda t: t.float() * float("nan")),
    "negative lengths": ("lengths", lambda t: t - 100),
    "huge lengths": ("lengths", lambda t: t + 2**62),
    "no lengths": ("lengths", lambda t: t[:0]),
    "finished as numbers": ("finished", lambda t: t.long()),
    "another vocabulary": ("seen", lambda t: t[:, :-1]),
    "seen of one sequence": ("seen", lambda t: t[:1]),
    "a short generator": ("generators", lambda t: t[:, :-1].contiguous()),
    "one generator": ("generators", lambda t: t[:1]),
    "a generator of floats": ("generators", lambda t: t.float()),
    "an empty generator": ("generators", lambda t: torch.zeros_like(t)),
    "a generator beyond its words": ("generators", lambda t: words(_16=10_000)),
    "a generator with none left": ("generators", lambda t: words(_8=0)),
    "a generator with too many left": ("generators", lambda t: words(_8=100_000)),
}


@pytest.mark.parametrize("damage", BAD)
def test_what_no_generation_wrote_is_refused(saved, models, tmp_path, damage):
    name, change = BAD[damage]
    with safe_open(saved, framework="pt") as file:
        about = {key: value for key, value in file.metadata().items() if "crc32" not in key}
    about["fingerprint"] = fingerprint_of_0_1(models["hybrid"])
    tensors = load_file(saved)
    save_file(tensors, tmp_path / "whole", metadata=about)
    Context.load(tmp_path / "whole", models["hybrid"])
    tensors[f"extra.{name}"] = change(tensors[f"extra.{name}"]).contiguous()
    save_file(tensors, tmp_path / "bad", metadata=about)
    with pytest.raises(UserError, match=r"bad is damaged: "):
        Context.load(tmp_path / "bad", models["hybrid"])
