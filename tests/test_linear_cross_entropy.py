"""The fused head: loss and gradients against the plain formula in fp64, in chunks, with ignored labels and z-loss.

Tolerances are those of interpreted/numerics.py: at most twice plain torch's error in the same dtype. What its Triton kernel
computes is tested in interpreted/test_linear_cross_entropy.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted.numerics import DTYPES, UNIT_ROUNDOFF, check, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaspark.kernels import linear_cross_entropy as module
from megaspark.kernels import linear_cross_entropy_cpu as cpu
from megaspark.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, token_losses

VOCAB = 37
BACKENDS = {"reference": "torch", "native": "native"}  # backend -> what the custom op calls it


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """What CPUs have of it: in plain torch and in C++."""
    return request.param


@pytest.fixture
def op(backend: str) -> Callable[..., Tensor]:
    """The op, on one of them."""
    return partial(linear_cross_entropy, backend=backend)


def inputs(tokens: int, hidden: int = 24, vocab: int = VOCAB, ignored: float = 0.0) -> dict[str, Any]:
    """What the op takes; of the labels about the share `ignored` is."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return {"hidden_NE": normal(tokens, hidden, seed=1), "weight_VE": normal(vocab, hidden, seed=2, std=0.3), "labels_N": labels}


def exact(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, z_loss: float = 0.0) -> Tensor:
    """The formula, written out; labels below 0 do not count."""
    logits = hidden_NE @ weight_VE.T
    log_total = torch.log(torch.exp(logits - logits.amax()).sum(1)) + logits.amax()
    losses = [log_total[n] - logits[n, y] + z_loss * log_total[n] ** 2 for n, y in enumerate(labels_N.tolist()) if y >= 0]
    return torch.stack(losses).mean() if losses else (hidden_NE.sum() + weight_VE.sum()) * 0


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Called with a number of tokens (and the vocabulary and dtype) it makes that the most a chunk takes."""

    def set_chunk(tokens: int, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> None:
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", tokens * vocab * dtype.itemsize)

    return set_chunk


def run(op: Callable[..., Tensor], dtype: torch.dtype, scale: float = 1.0, **given: Any) -> list[Tensor]:
    """[loss, gradient of hidden, gradient of weight] in fp64, for a loss multiplied by `scale`."""
    hidden, weight = (given.pop(name).to(dtype).requires_grad_() for name in ("hidden_NE", "weight_VE"))
    loss = op(hidden, weight, **given)
    (loss * scale).backward()
    return [loss.detach().double(), hidden.grad.double(), weight.grad.double()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 23])
def test_against_fp64(chunked, op, backend, tokens, dtype):
    """A chunk's edge that loses a row, a mean over the chunk in place of all tokens, a loss or a sum rounded to bf16."""
    if (backend, dtype) == ("native", torch.float16):
        with pytest.raises(ValueError, match="'native' has fp32 and bf16"):
            run(op, dtype, **inputs(tokens))
        return
    for ignored, z_loss in [(0.0, 0.0), (0.4, 1e-2)]:
        for most in (8, 100):
            chunked(most, dtype=dtype)
            check(op, linear_cross_entropy_reference, dtype, **inputs(tokens, ignored=ignored), z_loss=z_loss)


@given(
    st.integers(1, 40), st.integers(1, 50), st.integers(1, 70), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.1]), st.integers(0, 400), st.sampled_from([*BACKENDS]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_sizes(tokens, chunk, vocab, hidden, ignored, z_loss, block_bytes, backend):
    """No size, chunk or block of it changes the result: they are matters of memory and cache only. Also for ignored ones alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CHUNK_BYTES, "cpu", chunk * vocab * 4)
        patch.setattr(cpu, "BLOCK_BYTES", block_bytes)
        given = inputs(tokens, hidden, vocab, ignored)
        op = partial(linear_cross_entropy, backend=backend)
        found, right = run(op, torch.float32, **given, z_loss=z_loss), run(exact, torch.float64, **given, z_loss=z_loss)
    for mine, expected in zip(found, right, strict=True):
        # Dot products over up to 70 terms, exp and log of values up to 10: about sqrt(70) + 10 roundings, a few times over.
        assert (mine - expected).abs().max() <= 100 * 2.0**-24 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1 / 7, -65536.0])
@pytest.mark.parametrize("tokens, dtype", [(23, torch.float32), (64, torch.bfloat16), (200, torch.bfloat16)])
def test_upstream_gradient(chunked, op, tokens, dtype, scale):
    """A scale that is ignored, or rounded to bf16: 1/3 would lengthen all gradients by 0.2 %, and nobody would see it.

    Nor that the weight's gradient is summed over chunks in bf16: with 50 of them that shows.
    """
    chunked(4, dtype=dtype)
    found, plain = (run(f, dtype, scale, **inputs(tokens)) for f in (op, linear_cross_entropy_reference))
    right = run(exact, torch.float64, scale, **inputs(tokens))
    for mine, torchs, expected in zip(found, plain, right, strict=True):
        assert (mine - expected).norm() <= 2 * (torchs - expected).norm() + 1e-6 * expected.norm()
        # No systematic factor either: projected on the exact gradient the error must be far below one rounding.
        bias, torchs_bias = (((x - expected) * expected).sum() / expected.square().sum() for x in (mine, torchs))
        # (The scale itself is rounded twice in fp32, and so is what it is made of.)
        assert abs(bias) <= max(2 * abs(torchs_bias), UNIT_ROUNDOFF[dtype] / 8, 4 * 2.0**-24)


def test_makes_only_the_gradients_asked_for(chunked, op, backend):
    """Evaluation would hold gradients of the whole vocabulary, and a frozen head would get one."""
    chunked(8)
    given = inputs(20)
    whole = run(op, torch.float32, **given)
    hidden, weight, labels = given.values()
    for wanted in (0, 1):
        leaves = [hidden.float().requires_grad_(wanted == 0), weight.float().requires_grad_(wanted == 1)]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            loss = op(*leaves, labels)
        loss.backward()
        assert torch.equal(leaves[wanted].grad.double(), whole[1 + wanted]) and leaves[1 - wanted].grad is None
        assert [t.shape for t in saved if t.numel() > 1] == [leaves[wanted].shape]
    forward = torch.ops.megaspark.linear_cross_entropy_forward.default
    outputs = forward(hidden.float(), weight.float(), labels, -100, 0.0, BACKENDS[backend], False, False)
    assert outputs[0].double() == whole[0] and outputs[3].numel() == outputs[4].numel() == 0
    with torch.no_grad():
        assert op(hidden.float().requires_grad_(), weight.float(), labels).double() == whole[0]


def test_tied_weights(op):
    """The embedding's gradient and the head's arrive at one parameter: each once."""
    given = inputs(12, hidden=8, vocab=20)
    tokens = torch.arange(12) % 20

    def tied(head: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        weight = given["weight_VE"].to(dtype).requires_grad_()
        head(F.embedding(tokens, weight), weight, given["labels_N"]).backward()
        return weight.grad.double()

    assert (tied(op, torch.float32) - tied(exact, torch.float64)).abs().max() <= 100 * 2.0**-24


def test_all_labels_ignored(op):
    """0 / 0: one NaN loss of a sequence of padding would end a run."""
    given = inputs(9, ignored=1.0)
    for found in run(op, torch.float32, **given, z_loss=1e-2):
        assert (found == 0).all()


def test_ignore_index_may_be_a_token(op):
    """Padding marked by a token's own number, 0: it counts nowhere, though it is a column of the logits."""
    given = inputs(20)
    given["labels_N"][::3] = 0
    counted = given | {"labels_N": torch.where(given["labels_N"] == 0, -100, given["labels_N"])}
    for found, right in zip(run(op, torch.float32, **given, ignore_index=0), run(op, torch.float32, **counted), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_losses(chunked, op, backend, dtype):
    """A chunk's losses at another's place, an ignored one that counts, a loss rounded to bf16 (off by 0.03 at 10), a gradient."""
    chunked(8, dtype=dtype)
    given = inputs(21, ignored=0.3)
    hidden, weight = (given[name].to(dtype).requires_grad_() for name in ("hidden_NE", "weight_VE"))
    found = token_losses(hidden, weight, given["labels_N"], backend=backend)
    exactly = F.linear(hidden.double(), weight.double())
    logits = exactly if backend == "native" else F.linear(hidden, weight).double()  # in torch they are rounded to their dtype
    right = F.cross_entropy(logits, given["labels_N"], reduction="none")
    assert found.dtype == torch.float32 and not found.requires_grad
    assert (found - right).abs().max() <= 40 * 2.0**-24 and ((found == 0) == (given["labels_N"] == -100)).all()
    mean = found.sum() / (found != 0).sum()
    assert abs(mean - op(hidden, weight, given["labels_N"])) <= 4 * 2.0**-24 * mean


def test_huge_logits(op):
    """exp of a logit of 1,000 overflows unless the largest is taken off first."""
    hidden = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    loss = op(hidden, torch.eye(2), torch.tensor([0, 0]))
    loss.backward()
    assert loss == 500.0 and hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confident_tokens(op, dtype):
    """Where p is near 1 the gradient is p - 1, and a rounded product with p leaves nothing of it; a total of e^80 is still one."""
    for size in (6.0, -80.0):  # of the label's logit over the others
        hidden, weight = torch.ones(3, 1).double(), torch.zeros(VOCAB, 1).double()
        weight[5] = size
        given = {"hidden_NE": hidden, "weight_VE": weight, "labels_N": torch.full((3,), 5)}
        for found, right in zip(run(op, dtype, **given), run(exact, torch.float64, **given), strict=True):
            assert ((found - right).abs() <= 4 * UNIT_ROUNDOFF[dtype] * right.abs() + 48 * 2.0**-24).all()


def test_never_holds_all_logits(chunked):
    """The point of it. Any tensor of N x V numbers, or the fp32 copy of a whole chunk, is too much."""
    tokens, vocab, chunk = 64, 1024, 16

    class Largest(TorchDispatchMode):
        numel = numel_fp32 = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
                self.numel_fp32 = max(self.numel_fp32, out.numel() if out.dtype == torch.float32 else 0)
            return out

    chunked(chunk, vocab, torch.bfloat16)
    hidden, weight, labels = inputs(tokens, 4, vocab).values()
    blocks = cpu.rows_at_once(torch.empty(cpu.BLOCK_BYTES // 4))  # how many are worked on at a time
    inside = module._forward._init_fn  # torch shows a custom op to the mode as one operation
    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr(cpu, "BLOCK_BYTES", 4 * 4 * vocab // blocks)
        inside(hidden.bfloat16(), weight.bfloat16(), labels, -100, 0.0, "torch", True, True)
    assert largest.numel == chunk * vocab and largest.numel_fp32 == 4 * vocab


def test_labels_out_of_range_are_an_error(op):
    """A tokenizer with more tokens than the model would train on whatever lies behind the row."""
    for wrong in (-1, VOCAB):
        given = inputs(5)
        given["labels_N"][3] = wrong
        with pytest.raises(RuntimeError, match=f"index {wrong} is out of bounds"):
            run(op, torch.float32, **given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_NE": torch.zeros(2, 3, 24)}, r"hidden \[N, E\]"),
        ({"weight_VE": torch.zeros(37, 23)}, r"\(37, 23\)"),
        ({"weight_VE": torch.zeros(37, 24, dtype=torch.bfloat16)}, "one dtype"),
        ({"labels_N": torch.zeros(4, dtype=torch.int64)}, r"labels \[N\]"),
        ({"labels_N": torch.zeros(5)}, "integer labels"),
    ],
)
def test_mistakes(op, change, message):
    """Shapes that broadcast, and dtypes that torch promotes, would give a loss of something else."""
    good = {"hidden_NE": torch.zeros(5, 24), "weight_VE": torch.zeros(37, 24), "labels_N": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        op(**good | change)


@pytest.mark.parametrize("most", [4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_custom_op(chunked, backend, dtype, most):
    """torch's own checks: the schema, the fake implementation (dtypes of gradients in one chunk and in several), autograd."""
    chunked(most, dtype=dtype)
    given = inputs(10, ignored=0.3)
    labels = given["labels_N"]
    forward = torch.ops.megaspark.linear_cross_entropy_forward.default
    for wanted in [(True, True), (True, False), (False, True)]:
        pairs = zip(("hidden_NE", "weight_VE"), wanted, strict=True)
        leaves = [given[name].to(dtype).requires_grad_(asked) for name, asked in pairs]
        torch.library.opcheck(forward, (*leaves, labels, -100, 0.1, BACKENDS[backend], *wanted))
    scaled = (torch.randn(6, 4), torch.tensor(0.3), dtype)
    torch.library.opcheck(torch.ops.megaspark.linear_cross_entropy_backward.default, scaled)


def test_compiled_whole(chunked, op):
    """A graph break in the last layer, or another result: torch.compile with fullgraph, bit for bit."""
    chunked(8, dtype=torch.bfloat16)
    given = inputs(20, ignored=0.3)

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return op(hidden * 2, weight, labels, z_loss=1e-3)

    def results(f: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [given[name].bfloat16().requires_grad_() for name in ("hidden_NE", "weight_VE")]
        loss = f(*leaves, given["labels_N"])
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for found, right in zip(results(torch.compile(head, fullgraph=True)), results(head), strict=True):
        assert torch.equal(found, right)
