"""The optimizer: its learning rate at every step, what decays, and AdamW itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaspark.models import llama
from megaspark.optim import CosineSchedule, adamw, parameter_groups

TINY = llama.Config(hidden=16, layers=1, heads=2, kv_heads=1, ffn=24, vocab=31)


@given(st.integers(0, 50), st.integers(1, 200), st.floats(1e-6, 1), st.floats(0, 1))
def test_cosine_with_warmup(warmup, steps, lr, ratio):
    """A first step at rate 0, a peak one step late, an end above min_lr, or a rate that rises again after the end."""
    warmup = min(warmup, steps - 1)
    schedule = CosineSchedule(lr, ratio * lr, warmup, steps)
    rates = [schedule(step) for step in range(steps)]
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in rates[:-1])
    assert min(rates[warmup:]) >= ratio * lr * (1 - 1e-12)
    assert rates[:warmup] == pytest.approx([lr * (step + 1) / warmup for step in range(warmup)])
    assert rates[warmup] == pytest.approx(lr)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps - 1 > warmup:
        assert rates[-1] == pytest.approx(ratio * lr, abs=1e-12 * lr)
    assert schedule(10 * steps) == pytest.approx(schedule(steps) if steps - 1 > warmup else ratio * lr, abs=1e-12 * lr)
    middle = warmup + (steps - 1 - warmup) / 2
    if middle == int(middle) and steps - 1 > warmup:
        assert schedule(int(middle)) == pytest.approx((1 + ratio) * lr / 2)


def test_only_matrices_decay():
    """Decay on norm weights pulls every activation towards 0; a parameter in no group never learns."""
    model = llama.Model(TINY)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in kept["params"]} == {name for name in names.values() if "norm" in name}
    assert sorted(names[id(p)] for p in [*decayed["params"], *kept["params"]]) == sorted(names.values())


def test_tied_weights_are_stepped_once():
    """The shared table in two groups, or twice in one, would take two steps at a time."""
    model = llama.Model(TINY.model_copy(update={"tie_embeddings": True}))
    parameters = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len({id(p) for p in parameters}) == len(parameters) == len(list(model.parameters()))


def test_adamw_is_adamw():
    """The formula of arXiv 1711.05101 in fp64: decay apart from the moments, both corrected for their start."""
    model = llama.Model(TINY)
    model.initialize_(1)
    lr, (beta1, beta2), eps, decay = 3e-3, (0.9, 0.95), 1e-8, 0.1
    optimizer = adamw(model, 1.0, (beta1, beta2), eps, decay)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            m, v = moments[name]
            m.mul_(beta1).add_((1 - beta1) * p.grad.double())
            v.mul_(beta2).add_((1 - beta2) * p.grad.double() ** 2)
            expected[name] *= 1 - lr * (decay if p.ndim > 1 else 0)
            expected[name] -= lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        optimizer.step()
    for name, p in model.named_parameters():
        # Five steps, each of a few roundings of values up to 1 (the norms): 5 x 4 x 2^-24.
        assert (p.double() - expected[name]).abs().max() <= 20 * 2**-24, name
