"""Positions, attention and norms of the model against the formulas written out."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megamoe.model.attention import CausalAttention
from megamoe.model.decoding import Decoding
from megamoe.model.embedding import TokenEmbedding, sinusoid
from megamoe.model.norms import FullNorm, HeadNorm, Norm


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_gradients(ours: torch.Tensor, plain: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    seed = normal(*ours.shape, seed=99)
    gradients = (torch.autograd.grad(y, leaves, seed, retain_graph=True) for y in (ours, plain))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- positions


def test_sinusoids_are_the_formula():
    """fairseq: sin(p * w_i), then cos(p * w_i), w_i = 10000 ** (-i / (d/2 - 1)); p starts at 2, padding id + 1."""
    table = sinusoid(50, 12)
    assert table.shape == (50, 12) and table.dtype == torch.float32
    for row in (0, 1, 17, 49):
        for i in range(6):
            angle = (row + 2) * 10_000.0 ** (-i / 5)
            assert table[row, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[row, 6 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_sinusoids_are_fairseqs_table_at_full_length():
    num_positions, dim = 2048, 64
    frequencies = torch.exp(torch.arange(dim // 2, dtype=torch.float) * -(math.log(10000) / (dim // 2 - 1)))
    angles = torch.arange(num_positions + 2, dtype=torch.float).unsqueeze(1) * frequencies.unsqueeze(0)
    table = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    torch.testing.assert_close(sinusoid(num_positions, dim), table[2:], rtol=0.0, atol=1e-6)


def test_a_tensor_rank_adds_the_positions_of_its_slice():
    own = SimpleNamespace(_positions=None, tensor_rank=1, decoding=Decoding())
    own._position_table = partial(TokenEmbedding._position_table, own)

    def rows(length: int, num_here: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return TokenEmbedding._position_rows(own, length, torch.zeros(num_here, 3, 6, dtype=dtype)).squeeze(1)

    assert torch.equal(rows(8, 8), sinusoid(8, 6)), "a rank that has the whole sequence"
    assert torch.equal(rows(8, 4, torch.bfloat16), sinusoid(8, 6)[4:].bfloat16())
    assert torch.equal(rows(12, 12), sinusoid(12, 6)), "and when a longer sequence comes later"
    assert torch.equal(rows(5, 5), sinusoid(5, 6))


# ---------------------------------------------------------------- attention


def attention(**options) -> CausalAttention:
    config = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    return CausalAttention(config, layer_number=1, decoding=Decoding(), **options)


def plain_attention(query, key, value, scale: float) -> torch.Tensor:
    """Softmax over the past, head by head."""
    length, batch, num_heads, _ = query.shape
    heads_per_group = num_heads // key.shape[2]
    past = torch.ones(length, length).tril().bool()
    rows = []
    for b in range(batch):
        heads = []
        for n in range(num_heads):
            g = n // heads_per_group
            scores = (query[:, b, n] @ key[:, b, g].T * scale).masked_fill(~past, -torch.inf)
            heads.append(scores.softmax(-1) @ value[:, b, g])
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_the_softmax_over_the_past(num_groups, scale):
    query = normal(7, 2, 6, 4, seed=1).requires_grad_()
    key, value = (normal(7, 2, num_groups, 4, seed=seed).requires_grad_() for seed in (2, 3))
    ours = attention(softmax_scale=scale)(query, key, value, None)
    assert ours.shape == (7, 2, 24)
    same_gradients(ours, plain_attention(query, key, value, scale or 4**-0.5), [query, key, value])


def test_no_token_sees_a_later_one():
    query, key, value = (normal(5, 1, 2, 4, seed=seed) for seed in (1, 2, 3))
    before = attention()(query, key, value)
    key[3:], value[3:] = 7.0, -7.0
    after = attention()(query, key, value)
    assert torch.equal(before[:3], after[:3]) and not torch.isclose(before[3:], after[3:]).any()


# ---------------------------------------------------------------- norms


def fill(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Values that are not those of a fresh norm."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return list(module.parameters())


def settings(normalization: str) -> SimpleNamespace:
    return SimpleNamespace(params_dtype=torch.float64, normalization=normalization)


@pytest.mark.parametrize(("normalization", "num_parameters"), [("LayerNorm", 2), ("RMSNorm", 1)])
def test_norms_are_torchs(normalization, num_parameters):
    norm = Norm(settings(normalization), 6, eps=0.1)
    parameters = fill(norm)
    assert len(parameters) == num_parameters
    theirs = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[normalization](6, eps=0.1).double()
    theirs.load_state_dict(norm.state_dict())
    x = normal(3, 2, 6).requires_grad_()
    torch.testing.assert_close(norm(x), theirs(x))
    center = x.mean(-1, keepdim=True) if normalization == "LayerNorm" else 0.0
    plain = (x - center) / ((x - center).square().mean(-1, keepdim=True) + 0.1).sqrt() * parameters[0]
    same_gradients(norm(x), plain + (parameters[1] if num_parameters == 2 else 0.0), [x, *parameters])


def test_head_norm_is_over_each_head_with_one_weight():
    norm = HeadNorm(settings("RMSNorm"), 4, eps=0.1)
    (weight,) = fill(norm)
    x = normal(3, 2, 5, 4).requires_grad_()
    heads = [x[:, :, n] / (x[:, :, n].square().mean(-1, keepdim=True) + 0.1).sqrt() * weight for n in range(5)]
    assert weight.shape == (4,)
    same_gradients(norm(x), torch.stack(heads, dim=2), [x, weight])


def test_full_norm_is_over_all_heads_with_a_weight_for_each_feature():
    norm = FullNorm(SimpleNamespace(params_dtype=torch.float32), 4, eps=0.1, num_heads=5, group=None, size=1)
    (weight,) = fill(norm)
    x = normal(3, 2, 5, 4).float().requires_grad_()
    plain = F.rms_norm(x.flatten(2), (20,), weight, 0.1).view(3, 2, 5, 4)
    assert weight.shape == (20,)
    torch.testing.assert_close(norm(x), plain)
    seed = normal(3, 2, 5, 4, seed=9).float()
    for gradient, expected in zip(
        torch.autograd.grad(norm(x), [x, weight], seed), torch.autograd.grad(plain, [x, weight], seed), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(norm(x), F.rms_norm(x, (4,), None, 0.1) * weight.view(5, 4)), "not head by head"


def test_full_norm_squares_in_fp32_and_keeps_the_dtype():
    norm = FullNorm(SimpleNamespace(params_dtype=torch.float16), 4, eps=1e-6, num_heads=2, group=None, size=1)
    with torch.no_grad():
        norm.weight.fill_(1.0)
    y = norm(torch.full((1, 1, 2, 4), 1000.0, dtype=torch.float16))  # 1000 ** 2 is beyond fp16
    assert y.dtype == torch.float16 and torch.allclose(y.float(), torch.ones(1, 1, 2, 4))
