"""Which tokens are sample number i: a pure function of datasets, phases, the seed and i, the same for any number of processes.

The order is a keyed permutation, computed when asked, not a shuffled array: starting takes O(shards) time and memory however
many samples there are. The whole state of reading is one integer, the number of samples taken, beside the list of phases, each
of which is a blend and a sample length from a known sample on. numpy only.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from megaspark.packing import CUTS, Cut
from megaspark.permutations import Permutation as Permutation
from megaspark.permutations import turn, turns
from megaspark.shards import TokenDataset

WINDOW = 1 << 16  # in every aligned window of so many samples a blend's shares are met exactly (rounded to 1/65,536)


@dataclass(frozen=True)
class Phase:
    """How samples are made from number `first_sample` on: their length, the share of each dataset, how documents are cut.

    blend: shares by dataset, or None for all datasets by their number of samples. packing: "plain" or "best_fit".
    """

    first_sample: int
    seq: int
    blend: Mapping[str, float] | None = None
    packing: str = "plain"

    def __post_init__(self) -> None:
        if self.first_sample < 0 or self.seq < 1:
            raise ValueError(f"a phase of samples of {self.seq} tokens from sample {self.first_sample}")
        if self.blend is not None and (not self.blend or not all(0 < w < math.inf for w in self.blend.values())):
            raise ValueError(f"blend {dict(self.blend)}: every weight must be above 0; leave a dataset out to skip it")
        if self.packing not in CUTS:
            raise ValueError(f"packing {self.packing!r} is none of {', '.join(CUTS)}")

    def recorded(self) -> dict[str, Any]:
        """Itself as plain data, from which Phase(**data) makes it again."""
        return asdict(self) | {"blend": None if self.blend is None else dict(sorted(self.blend.items()))}


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises ValueError unless the first phase starts at sample 0 and each later one after the one before."""
    if not phases or phases[0].first_sample != 0:
        raise ValueError("the first phase must start at sample 0")
    for before, after in pairwise(phases):
        if after.first_sample <= before.first_sample:
            raise ValueError(f"a phase from sample {after.first_sample} cannot follow one from sample {before.first_sample}")


def changed_past(recorded: Sequence[Phase], wanted: Sequence[Phase], taken: int) -> str | None:
    """What makes `wanted` another run than the one that took `taken` samples by `recorded`, or None; the future may differ."""
    old, new = ([p.recorded() for p in phases if p.first_sample < max(1, taken)] for phases in (recorded, wanted))
    for number in range(max(len(old), len(new))):
        was, now = (phases[number] if number < len(phases) else None for phases in (old, new))
        if was is None or now is None:
            return f"a phase from sample {(was or now)['first_sample']} is {'new' if was is None else 'missing'}"
        for key in was:
            if was[key] != now[key]:
                return f"{key} was {was[key]}, is {now[key]}, in the phase from sample {was['first_sample']}"
    return None


@dataclass
class _Stretch:
    """A phase with what follows from it and from those before: by member of the blend, where it goes on."""

    phase: Phase
    members: list[int]
    cuts: list[Cut]
    bounds: list[int]
    taken: list[int] = field(default_factory=list)


class Samples:
    """Samples of seq + 1 tokens from a blend of datasets, shuffled anew in every epoch of each; megaspark.packing cuts them.

    What is guaranteed, by `tests/test_phases.py`:

    - Any sample can be asked for at once; nothing depends on which were asked for before, or by whom.
    - In every window of 65,536 samples, aligned to the start of the phase, each dataset of a blend has exactly its share, and
      at no time is it further from it than half a sample for each time that the number of datasets can be halved. Whose turn
      it is does not depend on the seed; which of its samples a dataset gives does.
    - Without a blend the same holds for windows of `epoch_samples`: in a run of one phase every sample is taken once in each.
    - Each dataset has its own epochs; in an epoch each of its samples comes once. A change of blend, to or from None as well,
      leaves every dataset exactly where it is in its epoch: none of its samples is repeated or lost. A dataset that is out of
      the blend waits. After such a change the epochs of the datasets no longer end together, also under None.
    - A change of seq or packing cuts the tokens anew. Where both cuts are plain and both seqs divide packing.UNIT_TOKENS, 2^17,
      a dataset goes on with its next shelf: no token is read twice in the epoch (but the one that neighbours share), and what
      was left of the begun shelf, fewer than 2^29 tokens, is left out of it. In any other case, and from its last shelf, it
      goes on with its next epoch, which reads all tokens again. `left_out` says how many samples each change leaves out.
    - Samples are numbered on through all phases.

    `phases` is a list of phases, or the seq of a single one. Raises ValueError for phases out of order, a dataset that a blend
    names and `datasets` lacks, and one shorter than a sample.
    """

    def __init__(
        self,
        datasets: Mapping[str, TokenDataset],
        phases: Sequence[Phase] | int,
        seed: int,
        blend: Mapping[str, float] | None = None,
    ):
        self.phases = [Phase(0, phases, blend)] if isinstance(phases, int) else list(phases)
        check_phases(self.phases)
        self.seed = seed
        self.names = sorted({name for phase in self.phases for name in phase.blend or datasets})
        for name in self.names:
            if name not in datasets:
                raise ValueError(f"the blend names {name}, which is none of the datasets {', '.join(sorted(datasets))}")
        self.datasets = [datasets[name] for name in self.names]
        self.left_out: list[tuple[int, str, int]] = []  # (first sample of a phase, dataset, samples skipped in its epoch)
        self._firsts = [phase.first_sample for phase in self.phases]
        self._cuts: dict[tuple[int, int, str], Cut] = {}
        self._stretches = [self._stretch(phase) for phase in self.phases]
        self._follow()

    @property
    def seq(self) -> int:
        """Tokens of a sample, in the last phase."""
        return self.phases[-1].seq

    @property
    def sizes(self) -> list[int]:
        """Samples of each dataset of the last phase."""
        return [cut.size for cut in self._stretches[-1].cuts]

    @property
    def ends(self) -> list[int]:
        """The samples of each dataset in a window of the last phase, summed up."""
        return self._stretches[-1].bounds[1:]

    @property
    def epoch_samples(self) -> int:
        """Samples of all datasets of the last phase together, each once."""
        return sum(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` >= 0: [seq + 1] tokens; a view into the shard unless it is made of more than one piece."""
        stretch, member, number = self._find(index)
        return stretch.cuts[member].read(number)

    def locate(self, index: int) -> tuple[int, int]:
        """The number in `names` of the dataset of global sample `index`, and the sample's number in it."""
        stretch, member, number = self._find(index)
        return stretch.members[member], number

    def phase(self, index: int) -> Phase:
        """The phase that sample `index` belongs to."""
        return self.phases[bisect_right(self._firsts, index) - 1]

    def tokens_before(self, index: int) -> int:
        """Tokens trained on when samples [0, index) were."""
        ends = [*self._firsts[1:], index]
        return sum(max(0, min(end, index) - p.first_sample) * p.seq for p, end in zip(self.phases, ends, strict=True))

    def _find(self, index: int) -> tuple[_Stretch, int, int]:
        if index < 0:
            raise IndexError(f"sample {index}")
        stretch = self._stretches[bisect_right(self._firsts, index) - 1]
        member, before = turn(stretch.bounds, index - stretch.phase.first_sample)
        cut, name = stretch.cuts[member], self.names[stretch.members[member]]
        epoch, position = divmod(stretch.taken[member] + before, cut.size)
        return stretch, member, cut.order.sample(position, f"{self.seed}/{name}/{epoch}")

    def _stretch(self, phase: Phase) -> _Stretch:
        members = [i for i, name in enumerate(self.names) if phase.blend is None or name in phase.blend]
        cuts = [self._cut(member, phase) for member in members]
        if phase.blend is None:
            shares = [cut.size for cut in cuts]
        else:
            shares = _quotas([phase.blend[self.names[member]] for member in members])
        return _Stretch(phase, members, cuts, [0, *accumulate(shares)])

    def _cut(self, member: int, phase: Phase) -> Cut:
        key = (member, phase.seq, phase.packing)
        if key not in self._cuts:
            self._cuts[key] = CUTS[phase.packing](self.datasets[member], phase.seq)
            if self._cuts[key].size < 1:
                raise ValueError(f"dataset {self.names[member]} is shorter than one sample of {phase.seq + 1} tokens")
        return self._cuts[key]

    def _follow(self) -> None:
        """Works out where each dataset stands at the start of each phase."""
        last: dict[int, tuple[Cut, int]] = {}  # by dataset: how it was cut when last taken from, and samples taken
        for stretch, end in zip(self._stretches, [*self._firsts[1:], None], strict=True):
            for member, cut in zip(stretch.members, stretch.cuts, strict=True):
                before, taken = last.get(member, (cut, 0))
                if before is not cut:
                    taken = self._recut(before, cut, taken, (stretch.phase.first_sample, self.names[member]))
                stretch.taken.append(taken)
            if end is not None:
                counts = turns(stretch.bounds, end - stretch.phase.first_sample)
                for member, cut, taken, count in zip(stretch.members, stretch.cuts, stretch.taken, counts, strict=True):
                    last[member] = (cut, taken + count)

    def _recut(self, before: Cut, after: Cut, taken: int, where: tuple[int, str]) -> int:
        """How many samples of the cut `after` count as taken when `taken` of `before` were; notes what is left out."""
        epoch, position = divmod(taken, before.size)
        shelf = before.order.next_shelf(position)
        together = before.unit_tokens is not None and before.unit_tokens == after.unit_tokens
        if together and shelf < before.order.shelves:
            skipped, taken = shelf * before.order.shelf - position, epoch * after.size + shelf * after.order.shelf
        else:
            skipped, taken = -position % before.size, (epoch + bool(position)) * after.size
        if skipped:
            self.left_out.append((*where, skipped))
        return taken


def _quotas(weights: list[float]) -> list[int]:
    """Samples of each dataset in a window: shares of WINDOW, rounded by the largest remainder; none less than 1."""
    exact = [weight / math.fsum(weights) * WINDOW for weight in weights]
    quotas = [max(1, math.floor(x)) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: max(0, WINDOW - sum(quotas))]:
        quotas[i] += 1
    while sum(quotas) > WINDOW:
        quotas[quotas.index(max(quotas))] -= 1
    return quotas


def unigram_entropy(datasets: Mapping[str, TokenDataset], limit_tokens: int = 1 << 24) -> float:
    """Nats a token of the best model that looks at no context, from the first `limit_tokens` of each dataset."""
    counts = np.zeros(max(dataset.manifest.vocab for dataset in datasets.values()), dtype=np.int64)
    for dataset in datasets.values():
        start, end = 0, min(dataset.tokens, limit_tokens)
        while start < end:
            length = min(1 << 20, end - start)
            found = np.bincount(dataset.read(start, length))
            counts[: len(found)] += found
            start += length
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
