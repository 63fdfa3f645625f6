"""Bytes that an op moves, counted: our kernels' own loads and stores in Triton's interpreter, and torch's operations by what each
reads and writes.

Nothing is timed and floats are not computed, so a case of full size takes seconds: tensors of floats are blank memory, matrix
products are skipped (their FLOPs are counted), and of a grid with many programs evenly spaced ones run, each standing for its
neighbours. Integers are computed, since they decide what runs: positions, documents, labels.

What a byte is: an access counts each time it is made, also where a GPU's cache would answer; a masked-out element counts
nothing; an atomic addition reads and writes.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from triton.runtime import interpreter as upstream

from megaspark.kernels.cases import Case, Inputs

# A launch runs whole while its programs make fewer accesses in all than this; of a larger one as many programs run as make so
# many, at least FEWEST. What a program makes is seen from FEWEST of them. Counts are then good to about half a percent.
ACCESSES, FEWEST = 4000, 8


@dataclass
class Traffic:
    """What one kernel launch, or one operation of torch's, moves and multiplies."""

    name: str
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    matrix_flops: float = 0.0

    @property
    def moved_bytes(self) -> float:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    def times(self, factor: float) -> Traffic:
        """The same so many times."""
        return Traffic(self.name, factor * self.read_bytes, factor * self.written_bytes, factor * self.matrix_flops)


class Blank(Inputs):
    """A case's inputs on the CPU: floats without values, integers with them."""

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that nothing was written to: no page of it exists before it is."""
        return torch.empty(shape, dtype=dtype or self.dtype)


def case_traffic(function: Callable[..., Any], case: Case) -> tuple[list[Traffic], list[Traffic]]:
    """What one call moves, forward and backward; where it launches Triton kernels, in a process with TRITON_INTERPRET=1."""
    arguments = case.make(Blank("cpu", case.dtype))
    leaves = [arguments[name].requires_grad_() for name in case.differentiated]
    with counting() as forward:
        outputs = function(**arguments)
    outputs = [out for out in tree_leaves(outputs) if isinstance(out, Tensor) and out.requires_grad]
    if not leaves or not outputs:
        return forward, []
    gradients = [torch.empty_like(out) for out in outputs]
    with counting() as backward:
        torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return forward, backward


@contextmanager
def counting() -> Iterator[list[Traffic]]:
    """Inside, floats are counted and not computed; yields the list that launches and operations are noted in."""
    found: list[Traffic] = []
    with ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))  # blank memory holds any number
        stack.enter_context(_counted_kernels(found))
        stack.enter_context(_Operations(found))
        yield found


# ---- our kernels


class _Sampled:
    """A kernel that runs for some programs of its grid only."""

    def __init__(self, function: Callable[..., None], chosen: frozenset[int]) -> None:
        self.__name__, self.__signature__ = function.__name__, inspect.signature(function)  # what the interpreter asks for
        self.__globals__, self.__annotations__ = function.__globals__, function.__annotations__
        self._function, self._chosen = function, chosen

    def __call__(self, **kwargs: Any) -> None:
        (x, y, z), (_, ny, nz) = upstream.interpreter_builder.grid_idx, upstream.interpreter_builder.grid_dim
        if (x * ny + y) * nz + z in self._chosen:
            self._function(**kwargs)


def sampled(programs: int, count: int) -> frozenset[int]:
    """`count` of so many programs, all if there are not more: one of each of `count` equal parts.

    Its place in the part moves on by the golden ratio, so that no period in what programs do (the last tile of a row, a head)
    is met always at the same point.
    """
    if count >= programs:
        return frozenset(range(programs))
    golden = (5**0.5 - 1) / 2
    bounds = [i * programs // count for i in range(count + 1)]
    return frozenset(first + int(i * golden % 1 * (end - first)) for i, (first, end) in enumerate(itertools.pairwise(bounds)))


@dataclass
class _Count:
    """What the running kernel has done so far."""

    traffic: Traffic
    accesses: int = 0


@contextmanager
def _counted_kernels(found: list[Traffic]) -> Iterator[None]:
    builder, now = upstream.InterpreterBuilder, _Count(Traffic(""))
    masked_load, masked_store, atomic_rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        now.traffic.read_bytes += _bytes(ptrs, mask)
        now.accesses += 1
        kind = ptrs.get_element_ty()
        if kind.is_floating():
            return upstream.TensorHandle(np.zeros(np.shape(ptrs.data), upstream._get_np_dtype(kind)), kind)
        return masked_load(self, ptrs, mask, *rest, **kwargs)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        now.traffic.written_bytes += _bytes(ptrs, mask)
        now.accesses += 1
        if not ptrs.get_element_ty().is_floating():
            masked_store(self, ptrs, value, mask, *rest, **kwargs)

    def atomic(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        now.traffic.read_bytes += _bytes(ptr, mask)
        now.traffic.written_bytes += _bytes(ptr, mask)
        now.accesses += 1
        return atomic_rmw(self, operation, ptr, value, mask, *rest)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        now.traffic.matrix_flops += 2 * prod(a.data.shape) * b.data.shape[-1]
        now.accesses += 1
        return upstream.TensorHandle(np.zeros_like(d.data), d.dtype.scalar)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if callable(grid):
            grid = grid(inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names}))
        programs = prod(grid)

        def run_some(count: int) -> Traffic:
            chosen = sampled(programs, count)
            now.traffic, now.accesses = Traffic(self.fn.__name__), 0
            with torch.utils._python_dispatch._disable_current_modes():
                kernel = _Sampled(self.rewrite(), chosen)
                upstream.GridExecutor(kernel, self.arg_names, tuple(grid), self.pre_run_hooks)(*args, **kwargs)
            return now.traffic.times(programs / len(chosen))

        counted = run_some(FEWEST)
        count = ACCESSES * FEWEST // max(1, now.accesses)
        found.append(run_some(count) if min(count, programs) > FEWEST else counted)

    with ExitStack() as stack:
        replacements = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic, "create_dot": dot}
        for name, replacement in replacements.items():
            stack.enter_context(patch.object(builder, name, replacement))
        stack.enter_context(patch.object(upstream.InterpretedFunction, "run", run))
        # It copies every argument back to its device: on the CPU onto itself.
        stack.enter_context(patch.object(upstream.GridExecutor, "_restore_args_dev", lambda *_: None))
        yield


def _bytes(ptrs: Any, mask: Any) -> int:
    element_bytes = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    return int(np.count_nonzero(np.broadcast_to(mask.data, np.shape(ptrs.data)))) * element_bytes


# ---- torch's operations

_MATRIX = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"}
_NOTHING_MOVED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}


class _Operations(TorchDispatchMode):
    """Notes what each operation reads and writes, and computes only what is not floats."""

    def __init__(self, found: list[Traffic]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "megaspark":  # our own launch code: what it calls in turn is counted
            with self:
                return OPDEFS[f"megaspark::{function._schema.name.partition('::')[2]}"]._init_fn(*args, **kwargs)
        written = _written(function, args, kwargs)
        if written and all(tensor.is_floating_point() for tensor in written):
            result = written[0] if len(written) == 1 else tuple(written)
        else:
            result = _result(function, args, kwargs)
        self._note(function, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)], written, result)
        return result

    def _note(self, function: Any, given: list[Tensor], written: list[Tensor], result: Any) -> None:
        name = function._schema.name.partition("::")[2]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in given}
        is_view = made and not written and all(x.untyped_storage()._cdata in storages for x in made)
        if is_view or not made or name in _NOTHING_MOVED:
            return
        only_written = {id(x) for x in written} if name in ("copy_", "fill_", "zero_") or "out" in function._overloadname else set()
        read = {id(x): x for x in given if id(x) not in only_written}
        self._found.append(
            Traffic(
                f"aten.{name}", sum(map(_held_bytes, read.values())), sum(map(_held_bytes, written or made)),
                2 * made[0].numel() * given[-2 if name in ("addmm", "baddbmm") else 0].shape[-1] if name in _MATRIX else 0,
            )
        )  # fmt: skip


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes into."""
    named = {argument.name: value for argument, value in zip(function._schema.arguments, args, strict=False)} | kwargs
    found = [named.get(a.name) for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def _result(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation's result: blank where it is all floats, of its own memory and large, else computed."""
    large = any(isinstance(x, Tensor) and x.numel() > 4096 for x in tree_leaves((args, kwargs)))
    is_view = any(out.alias_info is not None for out in function._schema.returns)
    if not large or is_view:
        return function(*args, **kwargs)
    try:
        on_meta = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        shapes = function(*on_meta[0], **{**on_meta[1], **({"device": "meta"} if "device" in kwargs else {})})
    except (NotImplementedError, RuntimeError):  # no shapes without values
        return function(*args, **kwargs)
    if not all(x.is_floating_point() for x in tree_leaves(shapes) if isinstance(x, Tensor)):
        return function(*args, **kwargs)
    return tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype), shapes)


def _held_bytes(x: Tensor) -> int:
    """Bytes of the different elements: an expanded tensor has each only once."""
    return prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


# ---- torch.compile


def inductor_bytes(function: Callable[..., Any], case: Case) -> tuple[int, int]:
    """Bytes that torch.compile's kernels would move for an op in plain torch, forward and backward, by inductor's own count.

    The graph is traced, partitioned and fused as torch.compile does for the CPU; nothing is generated or run. Inductor counts for
    each fused kernel every buffer that goes in or out once.
    """
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    counts: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph = GraphLowering(module)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()), V.set_fake_mode(detect_fake_mode(inputs)):
            graph.run(*inputs)
            graph._update_scheduler()
            counts.append(int(graph.count_bytes()[0]))
        values = [getattr(node, "meta", {}).get("val") for node in next(iter(reversed(module.graph.nodes))).args[0]]
        shapes = [None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in values]
        return make_boxed_func(lambda *_: [s and torch.empty_strided(s[0], s[1], dtype=s[2]) for s in shapes])

    arguments = case.make(Blank("cpu", case.dtype))
    leaves = [arguments[name].requires_grad_() for name in case.differentiated]
    values, structure = tree_flatten(arguments)
    tensors = [x for x in values if isinstance(x, Tensor)]

    def on_tensors(*given: Tensor) -> Any:
        rest = iter(given)
        return function(**tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in values], structure))

    compiled = aot_function(
        on_tensors, count, count, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table()
    )
    with patch.object(torch.compiler, "is_compiling", lambda: True):  # a reference may be written differently for torch.compile
        outputs = [out for out in tree_leaves(compiled(*tensors)) if isinstance(out, Tensor) and out.requires_grad]
        if leaves and outputs:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs], allow_unused=True)
    forward, backward = itertools.islice(itertools.chain(counts, (0, 0)), 2)
    return forward, backward
