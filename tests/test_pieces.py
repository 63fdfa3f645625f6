"""Pieces of parameters, strips of columns cut into runs of elements, put together and cut otherwise: none lost, none twice."""

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import Processes
from torch import Tensor

from megaspark.checkpoint import Checkpoint
from megaspark.fragments import STATE, Fragment
from megaspark.pieces import rectangles, row_width

Cut = tuple[int, list[int]]  # strips of columns, and the relative places where each strip's elements are cut


@st.composite
def cuts(draw: st.DrawFn, width: int) -> Cut:
    strips = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if width % n == 0]))
    return strips, sorted(draw(st.lists(st.integers(0, 100), max_size=4)))


def fragments_of(whole: Tensor, cut: Cut) -> list[Fragment]:
    """The whole [rows, columns] as fragments, one holder for each place between cuts, of each strip."""
    strips, places = cut
    width = whole.shape[1] // strips
    out = []
    for strip in range(strips):
        flat = whole[:, strip * width : (strip + 1) * width].flatten()
        bounds = [0, *(place * len(flat) // 100 for place in places), len(flat)]
        for start, end in pairwise(bounds):
            tensors = {kind: flat[start:end] + number for number, kind in enumerate(STATE)}
            columns = None if strips == 1 else (strip * width, width)
            out.append(Fragment("w", tuple(whole.shape), start, end - start, tensors, columns))
    return out


@given(data=st.data(), rows=st.integers(1, 5), width=st.sampled_from([1, 4, 6, 12]))
@settings(max_examples=60, deadline=None)
def test_any_strips_in_any_strips_out(tmp_path_factory, data, rows, width):
    """Tensor parallelism holds columns, ZeRO cuts them anywhere: an element from the wrong row or strip trains another model."""
    whole = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    folder = tmp_path_factory.mktemp("pieces") / "step_00000001"
    held = [[fragment] for fragment in fragments_of(whole, data.draw(cuts(width)))]
    assert Processes(len(held)).save(folder, {"step": 1}, held) == [None] * len(held)
    checkpoint = Checkpoint(folder)
    for fragment in fragments_of(whole, data.draw(cuts(width))):
        for number, kind in enumerate(STATE):
            found = checkpoint.read("w", kind, fragment.start, fragment.length, fragment.columns)
            assert torch.equal(found, fragment.tensors[kind]), (number, fragment)
    assert torch.equal(checkpoint.tensor("w"), whole)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 7), st.booleans())
def test_rectangles_tile_their_range(start, length, width, narrow):
    """An element in two rectangles, or in none, or in another place of the buffer."""
    columns = (3, width) if narrow else None
    seen = {}
    for r in rectangles(start, length, width + 5 if narrow else width, columns):
        for row in range(r.top, r.bottom):
            for column in range(r.left, r.right):
                seen[r.at + (row - r.top) * r.pitch + column - r.left] = row * width + column - (3 if narrow else 0)
    assert seen == {k: start + k for k in range(length)}


def test_row_width():
    """A vector taken for a column would make a rectangle of each element."""
    assert (row_width((5,)), row_width((2, 3)), row_width((2, 3, 4))) == (5, 3, 12)
    assert math.prod((2, 3, 4)) // 12 == 2
