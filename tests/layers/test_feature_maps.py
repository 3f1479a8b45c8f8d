"""What the feature maps promise beyond the layer's contract: unbiased random features, positions up to a horizon."""

from math import cos, pi

import pytest
import torch
import torch.nn.functional as F

from subquad.errors import UserError
from subquad.kernels.examples import relative_error
from subquad.layers import LinearAttention
from subquad.layers.feature_maps import CosformerFeatures, HedgehogFeatures, PerformerFeatures, TaylorFeatures


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_random_features_estimate_the_softmax_kernel_without_bias():
    """The mean over 400 draws of 64 features lies within five standard errors of exp(q . k / sqrt(d))."""
    d, draws = 8, 400
    q, k = normal(5, d) / 2, normal(5, d) / 2  # longer ones would give estimates with tails too heavy for the bound
    features = PerformerFeatures(d, 1, n_features=64).double()
    estimates = []
    for _ in range(draws):
        features.redraw()
        estimates.append(features.features(q) @ features.features(k).T)
    estimates = torch.stack(estimates)
    error = estimates.mean(0) - (q @ k.T / d**0.5).exp()
    assert (error.abs() < 5 * estimates.std(0) / draws**0.5).all()


def test_random_directions_are_orthogonal_and_fill_the_sphere():
    d = 6
    features = PerformerFeatures(d, 1, n_features=2000 * d + 2).double()
    features.redraw()  # in float64
    w = features.projection
    groups = w[: 2000 * d].unflatten(0, (2000, d))
    gram = groups @ groups.transpose(1, 2)
    assert (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max() < 1e-10
    # Each row alone is normal: mean 0 and covariance 1, within five standard errors (1 / sqrt(2000) for a place).
    assert groups.mean(0).abs().max() < 5 / 2000**0.5
    assert (w.T @ w / len(w) - torch.eye(d)).abs().max() < 5 * (2 / len(w)) ** 0.5


@torch.no_grad()
def test_many_random_features_give_softmax_attention():
    """With 40,000 features a relative error of 1/sqrt(40,000) = 0.5 % a kernel value, times the spread of exp: 3 %."""
    ours = LinearAttention(16, n_heads=2, feature_map="performer", n_features=40_000).double()
    x = normal(1, 20, 16)
    q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert relative_error(ours(x)[0], ours.o_proj(o.transpose(1, 2).flatten(2))) < 0.03


def test_long_queries_do_not_vanish():
    """exp(-|q|^2 / 2) underflows in float32 at |q'| = 13; divided by the largest feature, it does not."""
    features = PerformerFeatures(16, 1)
    q, _ = features(100 * torch.randn(1, 3, 1, 16), torch.randn(1, 3, 1, 16))
    assert (q.amax(-1) == 1).all()


def test_redrawn_features_are_saved():
    ours, other = (LinearAttention(16, feature_map="performer").double() for _ in range(2))
    ours.feature_map.redraw()
    other.load_state_dict(ours.state_dict())
    x = normal(1, 9, 16)
    assert torch.equal(ours(x)[0], other(x)[0])


def test_cosformer_weighs_by_the_cosine_of_the_distance():
    features = CosformerFeatures(5, 2, horizon=40)
    q, k = normal(1, 40, 2, 5), normal(1, 40, 2, 5)
    phi_q, phi_k = features(q, k, torch.arange(40)[None])
    scores = torch.einsum("bihd,bjhd->bhij", phi_q, phi_k)
    plain = torch.einsum("bihd,bjhd->bhij", F.relu(q), F.relu(k))
    assert scores[0, 1, 31, 7].item() == pytest.approx(plain[0, 1, 31, 7].item() * cos(pi / 2 * 24 / 40), abs=1e-12)
    assert scores.min() >= -1e-12


def test_taylor_features_are_the_series_of_exp():
    q, k = normal(7, 6), normal(7, 6)
    features = TaylorFeatures(6, 1)
    s = q @ k.T / 6**0.5
    assert relative_error(features.features(q) @ features.features(k).T, 1 + s + s.square() / 2) < 1e-12


def test_hedgehog_maps_each_head_and_side_by_its_own_weights():
    features = HedgehogFeatures(3, 2).double()
    torch.nn.init.normal_(features.q_weight)
    torch.nn.init.normal_(features.k_weight)
    x = normal(1, 4, 2, 3)
    for phi, weight in zip(features(x, x), (features.q_weight, features.k_weight), strict=True):
        y = weight[1] @ x[0, 2, 1]
        torch.testing.assert_close(phi[0, 2, 1], torch.cat([y, -y]).softmax(-1))


def test_a_sequence_past_the_horizon_is_an_error():
    layer = LinearAttention(16, feature_map="cosformer", horizon=10)
    sentence = "LinearAttention serves sequences of up to 10 tokens; 11 do not fit"
    cu_seqlens = torch.tensor([0, 3, 14], dtype=torch.int32)
    state = layer(torch.randn(1, 9, 16), layer.init_state(1, 10))[1]
    for call in (
        lambda: layer(torch.randn(1, 11, 16)),
        lambda: layer.init_state(1, 11),
        lambda: layer(torch.randn(1, 14, 16), None, cu_seqlens),
        lambda: layer(torch.randn(1, 2, 16), state),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
    assert layer(torch.randn(1, 14, 16), None, torch.tensor([0, 5, 13]))[0].shape == (1, 14, 16)


def test_an_argument_of_another_map_is_an_error():
    with pytest.raises(UserError, match="'elu' takes no n_features; it belongs to: performer"):
        LinearAttention(16, feature_map="elu", n_features=8)
    with pytest.raises(UserError, match="horizon is 0; it must be at least 1"):
        LinearAttention(16, feature_map="cosformer", horizon=0)
