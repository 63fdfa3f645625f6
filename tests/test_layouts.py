"""Layouts: every process has its own place, and what cannot run is refused by a line whose advice does run."""

import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaspark.deepspeed_files import DeepSpeedFile, read_deepspeed_file
from megaspark.errors import UserError
from megaspark.layouts import Layout, Parallel, layout
from megaspark.samples import Phase

MODEL = {"layers": 4, "heads": 12, "kv_heads": 4, "ffn": 48}
RUN = {"micro_batch": 2, "global_batch": 48, "precision": "bf16"}


def config_of(model: dict[str, int] | None = None, run: dict[str, Any] | None = None, seq: int = 24, **parallel: int) -> Any:
    """Of a run's config, what a layout follows from."""
    return SimpleNamespace(
        model=SimpleNamespace(**{**MODEL, **(model or {})}), run=SimpleNamespace(**{**RUN, **(run or {})}),
        data=SimpleNamespace(phases=[Phase(0, seq, None, "plain")]), optim=SimpleNamespace(clip=1.0), parallel=Parallel(**parallel),
    )  # fmt: skip


def file_of(stage: int, **zero: Any) -> DeepSpeedFile:
    return DeepSpeedFile(Path("here.json"), {"zero_optimization": {"stage": stage, **zero}})


SIZES = st.sampled_from([1, 2, 3, 4])


@given(SIZES, SIZES, SIZES, SIZES)
def test_every_process_has_a_place_of_its_own(pipeline, data, sequence, tensor):
    """Two processes with one share, or a share that nobody has; a tensor group that is no neighbourhood."""
    world = pipeline * data * sequence * tensor
    made = Layout(world, data, 1, {}, 1, pipeline=pipeline, tensor=tensor, sequence=sequence)
    places = [made.place(rank) for rank in range(world)]
    assert len(set(places)) == world and [made.rank(place) for place in places] == list(range(world))
    assert [place.tensor for place in places] == [rank % tensor for rank in range(world)]
    assert [place.pipeline for place in places] == sorted(place.pipeline for place in places)


def test_places_are_those_of_deepspeeds_grid():
    """Gradients averaged over other processes than those that share the weights."""
    from megaspark.pipelines import topology

    made = Layout(24, 2, 1, {}, 1, pipeline=3, tensor=2, sequence=2)
    grid = topology(made)
    for rank in range(24):
        theirs, ours = grid.get_coord(rank), made.place(rank)
        assert (theirs.pipe, theirs.model, theirs.data) == (ours.pipeline, ours.tensor, ours.data * 2 + ours.sequence)


@given(st.tuples(SIZES, SIZES, SIZES), st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_what_is_legal_adds_up_and_what_is_not_says_one_line(sizes, stage, world):
    """A layout that silently leaves processes or samples out, or that dies of something else than a refusal."""
    pipeline, tensor, sequence = sizes
    config = config_of(pipeline=pipeline, tensor=tensor, sequence=sequence)
    try:
        made = layout(config, file_of(stage), world)
    except UserError as error:
        assert "\n" not in str(error) and re.search(r"nearest: \d|set |say ", str(error)), error
        return
    assert made.data_parallel * pipeline * tensor * sequence == world
    assert made.accumulation * made.data_parallel * config.run.micro_batch == config.run.global_batch
    settings = made.deepspeed
    replicas = settings["train_batch_size"] // settings["train_micro_batch_size_per_gpu"] // settings["gradient_accumulation_steps"]
    assert replicas == made.replicas, "DeepSpeed would refuse these batch sizes"


REFUSED = {
    # what is asked, in how many processes: the words of the refusal; and what it advises, which must then be legal
    "pipeline with ZeRO 2": (dict(pipeline=2), 2, 2, ["parallel.pipeline = 2", "stage 2", "zero1.json"], (dict(pipeline=2), 1, 2)),
    "pipeline with ZeRO 3": (dict(pipeline=2), 3, 2, ["parallel.pipeline = 2", "stage 3", "zero1.json"], (dict(pipeline=2), 1, 2)),
    "stages without a layer": (dict(pipeline=8), 1, 8, ["model.layers = 4", "nearest: 4"], (dict(pipeline=4), 1, 8)),
    "heads": (dict(tensor=8), 1, 8, ["parallel.tensor = 8", "model.heads = 12", "nearest: 4"], (dict(tensor=4), 1, 8)),
    "kv heads": (dict(tensor=6), 1, 6, ["parallel.tensor = 6", "model.kv_heads = 4", "nearest: 4"], (dict(tensor=4), 1, 4)),
    "heads for sequence": (dict(sequence=8), 1, 8, ["parallel.sequence = 8", "12 heads", "nearest: 4"], (dict(sequence=4), 1, 8)),
    "both": (dict(tensor=4, sequence=2), 1, 8, ["parallel.sequence = 2", "3 heads", "nearest: 1"], (dict(tensor=4), 1, 8)),
    "processes": (dict(tensor=2), 1, 3, ["= 2 does not divide 3 processes", "2 or 4 processes"], (dict(tensor=2), 1, 4)),
    "too few processes": (dict(tensor=2), 1, 1, ["does not divide 1 processes", "nearest: 2 processes"], (dict(tensor=2), 1, 2)),
    "bf16 without ZeRO": (dict(tensor=2), 0, 2, ["parallel.tensor = 2", "stage 0", "zero1.json"], (dict(tensor=2), 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_both_sides_and_a_layout_that_works(name):
    """Advice that is refused in turn, or a refusal by DeepSpeed once the cluster is taken."""
    parallel, stage, world, words, (advised, advised_stage, advised_world) = REFUSED[name]
    with pytest.raises(UserError) as caught:
        layout(config_of(**parallel), file_of(stage), world)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    layout(config_of(**advised), file_of(advised_stage), advised_world)


def test_sequence_that_does_not_divide():
    """Tokens at the end of each sample that no process would have."""
    with pytest.raises(UserError, match=r"parallel.sequence = 4 does not divide data.seq = 30; nearest: 3"):
        layout(config_of(seq=30, sequence=4), file_of(1), 4)


@pytest.mark.parametrize("stage, zero, parallel, word", [
    (0, {"offload_optimizer": {"device": "cpu"}}, {}, "needs ZeRO stage 1"),
    (2, {"offload_param": {"device": "cpu"}}, {}, "needs ZeRO stage 3"),
    (1, {"offload_optimizer": {"device": "cpu"}}, {"pipeline": 2}, "cannot go with parallel.pipeline = 2"),
    (1, {"overlap_comm": True}, {"pipeline": 2}, "has no effect under parallel.pipeline = 2"),
])  # fmt: skip
def test_options_that_deepspeed_would_ignore_or_die_of(stage, zero, parallel, word):
    """An option that is silently off, or an assertion without a name an hour later."""
    with pytest.raises(UserError, match=re.escape(word)):
        layout(config_of(**parallel), file_of(stage, **zero), 2)


def test_offload_takes_our_optimizer():
    """DeepSpeed's own would be compiled at the first start, and rounds otherwise."""
    made = layout(config_of(), file_of(2, offload_optimizer={"device": "cpu"}), 2)
    assert made.deepspeed["zero_force_ds_cpu_optimizer"] is False


def test_shipped_files_are_legal_on_every_number_of_processes(tmp_path):
    """A shipped file that some layout of the matrix cannot take for another reason than a pipeline's."""
    for stage, (pipeline, tensor) in product(range(4), [(1, 1), (2, 1), (1, 2), (2, 2)]):
        file = read_deepspeed_file(f"zero{stage}.json")
        config = config_of(run={"precision": "fp32"}, pipeline=pipeline, tensor=tensor)
        if pipeline == 1 or stage < 2:
            assert layout(config, file, 4).stage == stage
    assert json.loads(json.dumps(made := layout(config_of(), read_deepspeed_file("zero1.json"), 2).deepspeed)) == made
