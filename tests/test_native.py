"""The CPU kernels in C++: attention and the head at every edge of their blocks, whatever CPU they are compiled for; their making.

Tolerances are those of interpreted/numerics.py: at most twice plain torch's error in the same dtype. test_attention.py and
test_linear_cross_entropy.py hold them, too, against the same tests as the other implementations.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted.numerics import UNIT_ROUNDOFF, check, normal, poisoned_memory, results
from torch import Tensor

from conftest import process_environment
from megaspark.kernels import attention_native as attention_module
from megaspark.kernels import linear as linear_module
from megaspark.kernels import native
from megaspark.kernels.attention import attention, attention_sdpa, spans_from_starts
from megaspark.kernels.linear import linear, linear_reference
from megaspark.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

# Planted bugs that these, test_attention.py and test_linear_cross_entropy.py caught, each alone. Attention: a key of the future
# seen, a document's first key not; a block taken for wholly seen by its first or its last query alone; a block of keys left
# out, forward and backward; heads paired by h % K; sums or outputs that keep an old shift; -inf - -inf; the softmax's sums
# without their shift; a shift that stays until exp is infinite; another query's shift or sum; the diagonal's keys or queries
# cut two too early; keys beyond the last; delta left out; dK without its scale; the first sequence's documents for all; every
# second row of dS not stored. Layouts: a row's neighbour twice; the last number of a row, or the end of an output's row,
# forgotten; a neighbour's scale. Products: the last row of registers forgotten; later steps that overwrite; pairs the wrong way
# round. Rounding cut off. The head: exp without its upper end; the label's numerator counted twice; an odd token lost; chunks
# that overwrite; an ignored token with a gradient; half of z-loss; no second try after an overflow; the label's gradient not
# stored; numerators kept in another tile's place, in another row's, or one row for two; a tile's later rows left out; the first
# token's gradient for all; sums begun with what was there. Linear layers: parts of a sum that overwrite, or add to what was
# there; the first tile for all; the first part of a panel for all; a block's last row not packed, or not multiplied; columns
# beyond the last whole vector stored; steps beyond the end; the last block's rows forgotten; a thread without rows. Tiles: the
# wrong rows exchanged; the first row for all; no room for what the last store leaves behind; rows and numbers beyond the end
# read; a line of memory half packed; blocks of no rows, for ever. What survived changes no result: the sums of rows that are
# padding, 1e-38 in place of 0, a NaN of rare bits.
DTYPES = [torch.float32, torch.bfloat16]
HEADS = (partial(linear_cross_entropy, backend="native"), linear_cross_entropy_reference)
# What -march=native may mean elsewhere: vectors of 16 numbers without products of bf16, of 8, and of 4.
X86 = ["x86-64-v4", "x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else []


@pytest.fixture(params=["native", *X86])
def compiled_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library as it is made on another CPU of this kind."""
    flag = {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}.get(request.param)
    if flag and flag not in native._cpu():
        pytest.skip(f"this CPU has no {flag}")
    monkeypatch.setattr(native, "FLAGS", tuple(f.replace("=native", f"={request.param}") for f in native.FLAGS))
    native._built.cache_clear()
    yield request.param
    native._built.cache_clear()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def starts_of(S: int, cuts: list[int]) -> Tensor:
    """The first key that each query sees, [1, S] int32, where documents begin at 0 and at the cuts."""
    return torch.tensor([[max(c for c in (0, *cuts) if c <= m) for m in range(S)]], dtype=torch.int32)


def before_a_forbidden_page(x: Tensor) -> Tensor:
    """A copy that wants a gradient, of which the last byte is the last of its page, and the next page must not be touched."""
    page, used = mmap.PAGESIZE, x.numel() * x.element_size()
    room = -(-used // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=room - used).view(x.shape)
    return copy.copy_(x).requires_grad_()


def check_attention(S: int, heads: int, kv_heads: int, D: int, dtype: torch.dtype, seen: Any = None, scale: float | None = None,
                    batch: int = 2, grows: float = 0) -> None:  # fmt: skip
    """By the error's norm, at most twice plain torch's, or a few roundings of the largest result. Scores grow by `grows` a key.

    Where a query sees one key, torch subtracts two equal numbers and has a gradient of exactly 0; here, as in every flash
    attention, both come from sums of their own over D products in fp32.
    """
    shapes = {"q": (heads, 1), "k": (kv_heads, 2), "v": (kv_heads, 3)}
    inputs = {name: normal(batch, S, count, D, seed=seed) for name, (count, seed) in shapes.items()}
    if grows:
        inputs["q"][..., 0] = D**0.5
        inputs["k"][..., 0] = grows * torch.arange(S)[:, None]
    op, plain = (partial(run_attention, backend=backend, seen=seen, scale=scale) for backend in ("native", "plain"))
    exact, torchs = results(plain, torch.float64, inputs), results(plain, dtype, inputs)
    with poisoned_memory():
        found, again = results(op, dtype, inputs), results(op, dtype, inputs)
    floor = (4 * UNIT_ROUNDOFF[dtype] + D**0.5 * 2.0**-24) * max(right.norm() for right in exact.values())
    for name, right in exact.items():
        mine, theirs = ((x[name].double() - right).norm() for x in (found, torchs))
        assert mine <= 2 * theirs + floor, f"{name}: {mine:.2e}, torch's {theirs:.2e} of {right.norm():.2e}"
        assert torch.equal(found[name], again[name]), f"{name}: two runs differ"


def run_attention(q: Tensor, k: Tensor, v: Tensor, backend: str, seen: Any, scale: float | None) -> Tensor:
    """Natively, or written out in the dtype of the inputs."""
    if backend == "native":
        return attention(q, k, v, seen, scale=scale, backend="native")
    S, groups = q.shape[1], q.shape[2] // k.shape[2]
    index, start = torch.arange(S), torch.zeros(1, S) if seen is None else seen.start_BS
    sees = (index[:, None] >= index) & (index >= start[:, :, None])
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * (scale or q.shape[3] ** -0.5)
    return torch.einsum("bhmn,bnhd->bmhd", scores.masked_fill(~sees[:, None], float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("S", [2, 63, 64, 65, 128, 200])
def test_attention_at_the_edges_of_blocks(compiled_for, S, dtype):
    """The last block's missing tokens counted, rows of registers left out, vectors beyond a head's features."""
    for D, heads, kv_heads in [(48, 2, 2), (64, 2, 1), (104, 2, 2), (10, 3, 1)]:
        check_attention(S, heads, kv_heads, D, dtype)


@given(
    st.integers(2, 210), st.lists(st.integers(1, 209), max_size=5), st.sampled_from([None, 1, 3, 64, 65, 100]),
    st.integers(1, 130), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from(DTYPES), st.sampled_from([None, 0.3]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_attention_over_documents_and_windows(S, cuts, window, D, heads, dtype, scale):
    """A block taken for wholly seen or wholly unseen that is not; a row of a block that sees nothing of it makes NaN."""
    seen = spans_from_starts(starts_of(S, [c for c in cuts if c < S]), window, dtype, "native")
    check_attention(S, *heads, D, dtype, seen, scale, batch=1)


@pytest.mark.parametrize("grows", [-3.0, 0.05, 3.0])
def test_attention_whose_scores_grow_or_fall(compiled_for, grows):
    """Sums under a shift of long ago: infinite, where later scores are larger by hundreds, or with what it was before; their
    logarithm."""
    for D in (16, 24):
        check_attention(200, 2, 1, D, torch.float32, grows=grows)


def test_attention_of_sequences_with_documents_of_their_own():
    """The first sequence's documents taken for all."""
    starts = torch.cat([starts_of(150, [70]), starts_of(150, [5, 130])])
    check_attention(150, 2, 1, 32, torch.float32, spans_from_starts(starts, None, torch.float32, "native"))


def test_attention_reads_views_where_they_lie():
    """Heads of a packed projection, and of one whose features are not neighbours: read with another's distances."""
    packed = normal(2, 70, 6, 3, 16).float()
    for views in (packed.unbind(3), normal(2, 70, 6, 16, 3).float().unbind(4)):
        leaves = [x.detach().requires_grad_() for x in views]
        upstream = normal(2, 6, 70, 16, seed=5).float().transpose(1, 2)
        found = [torch.autograd.grad(f(*leaves), leaves, upstream) for f in (partial(attention, backend="native"), attention_sdpa)]
        for mine, right in zip(*found, strict=True):
            assert (mine - right).norm() <= 1e-6 * right.norm()


def test_attention_is_the_same_bits_in_any_company():
    """A sum whose order depends on the number of threads, or on the other sequences of the batch."""
    inputs = [normal(3, 150, heads, 40, seed=heads).bfloat16() for heads in (4, 2, 2)]

    def results(rows: slice, count: int) -> list[Tensor]:
        with threads(count):
            leaves = [x[rows].detach().requires_grad_() for x in inputs]
            out = attention(*leaves, backend="native")
            return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    right = results(slice(None), 1)
    for count in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(results(slice(None), count), right, strict=True))
    assert all(torch.equal(a, b[1:2]) for a, b in zip(results(slice(1, 2), 2), right, strict=True))


def test_head_and_linear_are_the_same_bits_for_any_threads():
    """Rows shared out otherwise, and summed otherwise."""
    x, weight, labels = normal(333, 70, seed=1).float(), normal(500, 70, seed=2).float(), torch.arange(333)

    def results(count: int) -> list[Tensor]:
        with threads(count):
            leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
            outputs = [linear_cross_entropy(*leaves, labels, backend="native"), linear(*leaves, backend="native")]
            gradients = [torch.autograd.grad(out, leaves, torch.cos(out.detach())) for out in outputs]
            return [*(out.detach() for out in outputs), *(x for pair in gradients for x in pair)]

    for count in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(results(count), results(1), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_stays_one(dtype):
    """A loss that should have been NaN, and a step that should have been refused."""
    q, k, v = (normal(1, 100, 1, 16, seed=i).to(dtype) for i in range(3))
    for broken in (q, k, v):
        kept, broken[0, 3, 0, 5] = broken[0, 3, 0, 5].item(), float("nan")
        assert attention(q, k, v, backend="native")[0, 3].isnan().any()
        broken[0, 3, 0, 5] = kept
    hidden, weight, labels = normal(50, 20).to(dtype), normal(30, 20).to(dtype), torch.arange(50) % 30
    hidden[7, 3] = float("nan")
    assert linear_cross_entropy(hidden, weight, labels, backend="native").isnan()


def test_huge_scores_and_what_they_round_to():
    """exp of a score of 1,000 overflows unless the row's largest is taken off; a block of far smaller ones weighs nothing."""
    q, k = torch.full((1, 130, 1, 16), 100.0), torch.zeros(1, 130, 1, 16)
    k[0, 70:] = 1.0
    v = torch.arange(130.0).view(1, 130, 1, 1).expand(1, 130, 1, 16)
    out = attention(q, k, v, backend="native", scale=1.0)
    assert torch.allclose(out[0, :70, 0, 0], torch.arange(70) / 2) and torch.allclose(out[0, 129, 0], torch.tensor(99.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, vocab, hidden", [(47, 100, 16), (48, 241, 65), (49, 240, 128), (97, 483, 40), (700, 130, 24)])
def test_head_at_the_edges_of_blocks(compiled_for, monkeypatch, tokens, vocab, hidden, dtype):
    """A vocabulary's last rows, a chunk's last tokens, an odd one of either whose pair holds what it should not."""
    from megaspark.kernels import linear_cross_entropy as module

    labels = torch.arange(tokens) * 7 % vocab
    labels[::5] = -100
    inputs = {"hidden_NE": normal(tokens, hidden, seed=1), "weight_VE": normal(vocab, hidden, seed=2, std=0.2)}
    for chunk in (tokens, 100):
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk * vocab * dtype.itemsize)
        with threads(3):
            check(*(partial(op, labels_N=labels, z_loss=1e-3) for op in HEADS), dtype, **inputs)


def test_head_where_the_label_is_far_below(compiled_for):
    """Numerators above 1e30 are made again with the largest logit as shift: once with it, once for the sums."""
    hidden, weight = normal(60, 24, seed=1), normal(300, 24, seed=2, std=0.2)
    hidden[:, 0], weight[250:, 0], labels = 1, 100, torch.arange(60)  # logits of 100, in another block than the labels'
    inputs = {"hidden_NE": hidden, "weight_VE": weight}
    check(*(partial(op, labels_N=labels) for op in HEADS), torch.float32, **inputs)


@pytest.mark.parametrize("tokens, wide, out", [(1, 1, 1), (5, 7, 9), (241, 65, 97), (130, 520, 64), (500, 16, 241)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_linear_at_the_edges_of_blocks(compiled_for, tokens, wide, out, dtype):
    """Rows, columns and steps beyond the last whole block; a copy of a transposed factor that is another's; an idle thread."""
    inputs = {"x_E": normal(tokens, wide, seed=1), "weight_FE": normal(out, wide, seed=2)}
    with threads(3):
        check(partial(linear, backend="native"), linear_reference, dtype, **inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_a_tensors_end_is_read(dtype):
    """What is multiplied and dropped must not be read either: the page behind a tensor may be nobody's, and the process dies."""
    shapes = {"x": (13, 27), "weight": (37, 27), "q": (1, 13, 2, 27), "k": (1, 13, 2, 27), "v": (1, 13, 2, 27)}
    inputs = {name: before_a_forbidden_page(normal(*shape).to(dtype)) for name, shape in shapes.items()}
    x, weight = inputs["x"], inputs["weight"]
    linear(x, weight, backend="native").backward(before_a_forbidden_page(normal(13, 37).to(dtype)))
    linear_cross_entropy(x, weight, torch.arange(13), backend="native").sum().backward()
    out = attention(inputs["q"], inputs["k"], inputs["v"], backend="native")
    out.backward(before_a_forbidden_page(normal(1, 13, 2, 27).to(dtype)))
    assert all(tensor.grad.isfinite().all() for tensor in inputs.values())


def test_linear_takes_what_lies_anyhow():
    """A weight that is a slice of another's columns, activations of three dimensions whose tokens are not neighbours."""
    x, weight = normal(3, 40, 24, seed=1).transpose(0, 1), normal(50, 72, seed=2)[:, 24:48]
    check(partial(linear, backend="native"), linear_reference, torch.float32, x_E=x, weight_FE=weight)
    frozen = [x.detach().float().requires_grad_(), weight.detach().float()]
    linear(*frozen, backend="native").sum().backward()
    assert frozen[0].grad is not None and frozen[1].grad is None


def test_linear_chooses(monkeypatch):
    """A layout of the weight for one token; a processor whose own library is better."""
    few, many, some = (127, 8), (2, 64, 8), (7, 8)
    for slow in (True, False):
        monkeypatch.setattr(native, "mkl_is_slow", lambda slow=slow: slow)
        monkeypatch.setattr(native, "has_bf16", lambda slow=slow: not slow)
        for shape, dtype, ours in [(many, torch.float32, True), (few, torch.float32, False), (few, torch.bfloat16, True),
                                   (some, torch.bfloat16, False), (many, torch.float64, False)]:  # fmt: skip
            name = "native" if ours and slow else "reference"
            assert linear_module._auto(torch.empty(shape, dtype=dtype), torch.empty(8, 8, dtype=dtype)) == name
    with pytest.raises(ValueError, match="'native' has fp32 and bf16 on CPUs"):
        linear(torch.zeros(2, 4).bfloat16(), torch.zeros(3, 4), backend="native")


@pytest.mark.parametrize(
    "flags, bf16, slow",
    [("fma avx", False, False), ("avx avx2", False, True), ("avx2 avx512_bf16", True, True), ("amx_bf16", True, False)],
)
def test_processors_tell_what_they_have(monkeypatch, flags, bf16, slow):
    """A flag that is a part of another's name; Intel's taken for AMD's."""
    monkeypatch.setattr(native, "_cpu", lambda: f"flags\t\t: {flags}\nvendor_id\t: AuthenticAMD")
    assert (native.has_bf16(), native.mkl_is_slow()) == (bf16, slow)
    monkeypatch.setattr(native, "_cpu", lambda: f"flags\t\t: {flags}\nvendor_id\t: GenuineIntel")
    assert (native.has_bf16(), native.mkl_is_slow()) == (bf16, False)


def test_custom_ops_compile_whole():
    """torch's own checks, and a graph break in every layer."""
    q, k, v = (normal(1, 20, heads, 8, seed=heads).float().requires_grad_() for heads in (2, 1, 1))
    x, weight = normal(20, 8).float().requires_grad_(), normal(12, 8, seed=1).float().requires_grad_()
    start = starts_of(20, [12])
    torch.library.opcheck(attention_module._attend, (q, k, v, start, 0.5))
    torch.library.opcheck(linear_module._forward, (x, weight))

    def both(q: Tensor, x: Tensor) -> Tensor:
        return attention(q, k, v, backend="native").sum() + linear(x, weight, backend="native").square().sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(f(q, x), (q, k, v, x, weight)) for f in (compiled, both)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- the library


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder that is not there yet."""
    monkeypatch.setenv(native.CACHE, str(tmp_path / "a" / "b"))
    native._built.cache_clear()
    yield tmp_path / "a" / "b"
    native._built.cache_clear()


def test_without_a_compiler_torch_does_it(elsewhere, monkeypatch):
    """An import error, or a warning in every run, on a laptop that never had a compiler; and a clear word to who insists."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    q = torch.randn(1, 5, 2, 8)
    assert not native.available() and not elsewhere.exists()
    assert torch.equal(attention(q, q, q), attention_sdpa(q, q, q))
    with pytest.raises(ValueError, match=r"'native' needs a C\+\+ compiler \(on Debian: apt-get install g\+\+\)"):
        attention(q, q, q, backend="native")


def test_a_compiler_that_fails_is_named(elsewhere, monkeypatch, tmp_path):
    """A slow run, and nobody knows why; half a library that the next process loads."""
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: out of ideas" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match=r"plain torch stands in for them: .*ended with status 1: x.cpp:1: error: out of ideas"):
        assert not native.available()
    assert {path.suffix for path in elsewhere.iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_is_named(elsewhere):
    """A home that is read-only on the compute nodes ends the run in a traceback."""
    elsewhere.parent.mkdir()
    elsewhere.write_text("a file")
    with pytest.warns(UserWarning, match="plain torch stands in for them: .*File exists"):
        assert not native.available()


def test_processes_that_start_together_make_one_library(elsewhere, tmp_path):
    """Eight workers compile eight times, or one loads what another has half written."""
    counted = tmp_path / "counted"
    counted.write_text(f'#!/bin/sh\n[ "$1" = -shared ] && echo >> {tmp_path}/links\nexec g++ "$@"\n')
    counted.chmod(0o755)
    code = "import torch; from megaspark.kernels import native; native.library().attention_forward_float32; print('loaded')"
    environment = process_environment(CXX=str(counted), **{native.CACHE: str(elsewhere)})
    said: list[str] = []

    def start() -> None:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        said.append(done.stdout + done.stderr)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["loaded\n"] * 3 and (tmp_path / "links").read_text() == "\n"
    assert len([path for path in elsewhere.iterdir() if path.suffix == ".so"]) == 1 and len([*elsewhere.iterdir()]) == 2


def test_one_openmp_runtime():
    """A second one has threads of its own, which wait for work, at full speed, while torch's do it."""
    code = """
import torch
from megaspark.kernels import native
torch.randn(300, 300) @ torch.randn(300, 300); native.library()
print(sorted({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'omp5' in line}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=process_environment(), capture_output=True, text=True)
    assert done.stdout.count("omp") == 1, done.stdout + done.stderr
