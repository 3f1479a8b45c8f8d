"""torch.compile(fullgraph=True) takes every layer whole: training, packed rows with a state, and decoding."""

import pytest
import torch

from subquad.kernels.state import leaves
from subquad.layers import available
from subquad.models.lm import LM

BLOCKS = {name: {"mixer": name} for name, layer in available().items() if layer.kind == "mixer"}
BLOCKS |= {name: {"ffn": name} for name, layer in available().items() if layer.kind == "ffn"}
BLOCKS["Attention, window"] = {"mixer": {"name": "Attention", "n_heads": 2, "window": 4, "n_sinks": 1}}
V = 17


@pytest.fixture(params=BLOCKS)
def model(request):
    torch._dynamo.reset()
    config = {"d_model": 32, "vocab_size": V, "blocks": [{"pattern": [BLOCKS[request.param]]}]}
    return LM.from_config(config).double()


@pytest.fixture
def decoder(model):
    if not all(hasattr(part, "init_state") for block in model.blocks for part in (block.mixer, block.ffn) if part):
        pytest.skip("it reads the whole sequence at once")
    return model


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def results(run, *arguments):
    """Logits, new state and gradients by name."""
    run.zero_grad()
    logits, state = run(*arguments)
    found = {"logits": logits, **{path: x for path, _, x in leaves(state or ())}}
    if logits.requires_grad:
        logits.square().sum().backward()
        found |= {name: p.grad for name, p in run.named_parameters()}
    return {name.removeprefix("_orig_mod."): x.detach().clone() for name, x in found.items()}


def agree(ours, reference):
    assert set(ours) == set(reference)
    for name, x in reference.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.unchecked
def test_training(model):
    tokens = torch.randint(V, (2, 12))
    reference = results(model, tokens)
    assert len(reference) > 3
    agree(results(compiled(model), tokens), reference)


@pytest.mark.unchecked
@torch.no_grad()
def test_packed_rows_with_a_state(decoder):
    tokens, cu_seqlens = torch.randint(V, (1, 12)), torch.tensor([0, 5, 5, 10], dtype=torch.int32)
    reference = results(decoder, tokens, decoder.init_state(3, 20), cu_seqlens)
    agree(results(compiled(decoder), tokens, decoder.init_state(3, 20), cu_seqlens), reference)


@pytest.mark.unchecked
@torch.no_grad()
def test_decoding_keeps_the_addresses(decoder):
    prompt, token = torch.randint(V, (2, 6)), torch.randint(V, (2, 1))
    reference = results(decoder, token, decoder(prompt, decoder.init_state(2, 20))[1])
    state = decoder(prompt, decoder.init_state(2, 20))[1]
    before = [x.data_ptr() for _, _, x in leaves(state)]
    _, after = (step := compiled(decoder))(token, state)
    assert [x.data_ptr() for _, _, x in leaves(after)] == before
    agree(results(step, token, decoder(prompt, decoder.init_state(2, 20))[1]), reference)
