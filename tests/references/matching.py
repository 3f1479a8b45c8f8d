"""What every comparison with another library does: weights away from their initial values, and one sequence at once,
then as a prefill followed by single tokens."""

import torch
from torch import nn

from subquad.kernels.examples import relative_error

TOLERANCE = 1e-5  # float32
TIME, PREFILL = 130, 70  # across two chunks of 64, and a prefill that ends within one


@torch.no_grad()
def randomized(module: nn.Module) -> nn.Module:
    """No weight at its initial value, every signal of about its size. Vectors and decay rates are moved, and set where
    a library leaves them unwritten."""
    for name, p in module.named_parameters():
        if p.dim() == 1 or name.endswith("A_log"):
            p.copy_(p.nan_to_num().clamp(-3, 3) + 0.3 * torch.randn_like(p))
        else:
            p.normal_(std=1.0 if "embed" in name else p.shape[-1] ** -0.5)
    return module.eval()


@torch.no_grad()
def check(ours: nn.Module, inputs: torch.Tensor, expected: torch.Tensor) -> None:
    """One call, and a prefill followed by single tokens."""
    assert relative_error(ours(inputs)[0], expected) < TOLERANCE
    prefill = PREFILL * inputs.shape[1] // TIME
    state, outs = ours.init_state(inputs.shape[0], inputs.shape[1]), []
    for piece in [inputs[:, :prefill], *inputs[:, prefill:].split(1, 1)]:
        out, state = ours(piece, state)
        outs.append(out)
    assert relative_error(torch.cat(outs, 1), expected) < TOLERANCE
