"""The optimizer: its learning rate at every step, what decays, and AdamW itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaspark.errors import UserError
from megaspark.models import llama
from megaspark.optim import CosineSchedule, SplitAdamW, adamw, parameter_groups
from megaspark.weights import build_model

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
    model = build_model(TINY, 1)
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


def split_optimizer(seed: int = 1) -> tuple[llama.Model, SplitAdamW]:
    model = build_model(TINY, seed).bfloat16()
    return model, SplitAdamW(parameter_groups(model, 0.1), lr=3e-3)


def random_steps(model: llama.Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(parameter.dtype)
        optimizer.step()


def test_split_adamw_trains_the_fp32_master():
    """Groups' settings ignored, steps not counted, a master that lives in 16 bits: all show against torch's own on fp32."""
    model, optimizer = split_optimizer()
    wide, _ = split_optimizer()
    wide.float()
    plain = torch.optim.AdamW(parameter_groups(wide, 0.1), lr=3e-3, betas=(0.9, 0.95), foreach=False)
    random_steps(model, optimizer, range(6))
    random_steps(wide, plain, range(6))
    for parameter, expected in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(optimizer.master(parameter), expected.detach())
        # bf16 rounds to nearest with ties to even, ours with ties away from 0: one tie in 2^16.
        assert (parameter != expected.bfloat16()).float().mean() <= 0.01


def test_split_adamw_resumes_to_the_bit(tmp_path):
    """torch's load_state_dict makes bf16 of every state of a bf16 parameter; a state shared with the loaded one would drift."""
    model, optimizer = split_optimizer()
    random_steps(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved")
    other, resumed = split_optimizer(seed=2)
    saved = torch.load(tmp_path / "saved")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    random_steps(model, optimizer, range(3, 6))
    random_steps(other, resumed, range(3, 6))
    for mine, again in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, again) and torch.equal(optimizer.master(mine), resumed.master(again))
        assert {v.dtype for v in resumed.state[again].values() if isinstance(v, torch.Tensor)} == {torch.int16, torch.float32}


def test_split_adamw_takes_a_master():
    """A checkpoint's fp32 masters would come back rounded; parameters without a gradient would decay, or lose their master."""
    model, optimizer = split_optimizer()
    first = next(model.parameters())
    master = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    optimizer.set_master(first, master)
    assert torch.equal(optimizer.master(first), master) and (first.float() - master).abs().max() <= 2**-8 * master.abs().max()
    before = [optimizer.master(parameter) for parameter in model.parameters()]
    assert optimizer.step(lambda: 7) == 7
    assert all(torch.equal(optimizer.master(p), b) for p, b in zip(model.parameters(), before, strict=True))


def test_split_adamw_says_what_it_takes():
    """fp32 parameters read as pairs of bf16 would train to noise."""
    with pytest.raises(UserError, match="dense bf16 parameters, not one of"):
        SplitAdamW(llama.Model(TINY).parameters(), lr=1e-3)
