"""The router's product in 16 bits: widened where the processor has no instructions for it, rounded all the same."""

from types import SimpleNamespace

import pytest
import torch

from megamoe.config.schema import MoEConfig
from megamoe.moe.layer import Router


@pytest.mark.parametrize("widen", [False, True])
def test_logits_and_gradients_are_those_of_the_models_dtype(monkeypatch, widen):
    monkeypatch.setattr("megamoe.moe.precision._is_slow_on_cpu", lambda dtype: widen)
    context = SimpleNamespace(hidden_size=32, dtype=torch.bfloat16, device="cpu", config=MoEConfig(num_experts=8))
    router, generator = Router(context, 8), torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
    x = torch.randn(16, 32, generator=generator, dtype=torch.bfloat16).requires_grad_()
    logits = router(x)
    exact = x.detach().double() @ router.weight.detach().double().t()
    assert logits.dtype is torch.float32
    assert torch.equal(logits, logits.bfloat16().float()), "rounded to the model's dtype"
    assert ((logits - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all()
    seed = torch.randn(16, 8, generator=generator)
    logits.backward(seed)
    assert x.grad.dtype is router.weight.grad.dtype is torch.bfloat16
    rounded = seed.bfloat16().double()
    for gradient, right in (
        (x.grad, rounded @ router.weight.detach().double()), (router.weight.grad, rounded.t() @ x.detach().double()),
    ):  # fmt: skip
        assert (gradient.double() - right).norm() < 2**-8 * right.norm()
