"""torch.compile(fullgraph=True) takes every layer whole: training, packed rows with a state, and decoding."""

import pytest
import torch

from subquad.kernels.state import leaves
from subquad.layers import available
from subquad.layers.base import convert
from subquad.models.lm import LM

BLOCKS = {name: {"mixer": name} for name, layer in available().items() if layer.kind == "mixer"}
BLOCKS |= {name: {"ffn": name} for name, layer in available().items() if layer.kind == "ffn"}
BLOCKS["Attention, window"] = {"mixer": {"name": "Attention", "n_heads": 2, "window": 4, "n_sinks": 1}}
V = 17
# Errors allowed. The calls are the same, so narrow dtypes round in the same places.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Layers that take another path in the dtypes people use; the others in them are slow tests.
NARROW = {("MoE", torch.float32), ("MoE", torch.bfloat16), ("Hyena", torch.float32), ("Mamba", torch.bfloat16)}


@pytest.fixture(
    params=[
        pytest.param((name, dtype), marks=[] if dtype == torch.float64 or (name, dtype) in NARROW else pytest.mark.slow)
        for dtype in BOUNDS
        for name in BLOCKS
    ],
    ids=lambda pair: f"{pair[0]}-{str(pair[1])[6:]}",
)
def model(request):
    torch._dynamo.reset()
    name, dtype = request.param
    config = {"d_model": 32, "vocab_size": V, "blocks": [{"pattern": [BLOCKS[name]]}]}
    return convert(LM.from_config(config), dtype)


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
    bound = BOUNDS[reference["logits"].dtype]
    for name, x in reference.items():
        size = x.abs().max().item() if x.numel() and bound > 1e-10 else 1.0
        torch.testing.assert_close(
            ours[name], x, rtol=bound, atol=bound * size, msg=lambda text, name=name: f"{name}: {text}"
        )


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
