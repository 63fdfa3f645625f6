"""The fused head in plain torch, laid out as CPUs want it: logits are [vocabulary, tokens].

So every product has its large factor as it lies in memory. oneDNN multiplies bf16 two to three times as fast then as with a large
factor transposed, and MKL fp32 a fifth faster.

What is stored over the logits is exp(logit - shift), the softmax's numerator. Its denominator is known only at the end of a column
and is a matter of the token alone, so it is divided out of a product's result or of its other, small factor; the numbers of
[vocabulary, tokens] are gone over once. The shift is the logit of the label, which needs no pass of its own to be found; where
that lies so far below the others that a sum overflows, the largest logit is taken instead, and the logits made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20  # what one CPU core works on at a time: half of its second-level cache on a server
LARGEST_TOTAL = 1e30  # of numerators, times a weight or a hidden number: far from 3e38, the largest of fp32 and bf16


def slices(count: int, step: int) -> Iterator[slice]:
    """0 to count in steps."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rows_at_once(row: Tensor, blocks: int = 1) -> int:
    """Rows like this one, in fp32, that CPU cores go over again and again while they are in a cache; on a GPU all there are.

    Several threads wait for each other after every pass, so they get more to do between.
    """
    threads = torch.get_num_threads()
    block_bytes = BLOCK_BYTES * (blocks if threads == 1 else 4 * threads)
    return 1 << 30 if row.is_cuda else max(1, block_bytes // (4 * row.numel()))


def forward_torch(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, chunk: int, losses_N: Tensor,
    grad_hidden_NE: Tensor | None, grad_weight_VE: Tensor | None,
) -> None:  # fmt: skip
    """Writes each token's loss and the gradients of their sum that are asked for, `chunk` tokens at a time.

    hidden_NE: [N, E]; weight_VE: [V, E] of the same float dtype; labels_N: [N] integers. losses_N: [N] fp32; grad_hidden_NE and
    grad_weight_VE: of the shapes of what they are gradients of, or None where not asked for.
    """
    if hidden_NE.dtype == torch.float16:  # whose range ends at 65,504
        hidden_NE, weight_VE = hidden_NE.float(), weight_VE.float()
    gradient = grad_hidden_NE is not None or grad_weight_VE is not None
    weight_EV = None if grad_hidden_NE is None else _transposed(weight_VE)
    memory = torch.empty(len(weight_VE) * chunk, dtype=hidden_NE.dtype, device=hidden_NE.device)
    for tokens in slices(len(hidden_NE), chunk):
        hidden, counted_C1 = hidden_NE[tokens], (labels_N[tokens] != ignore_index)[:, None]
        labels_C = torch.where(counted_C1[:, 0], labels_N[tokens].long(), 0)
        logits_VC = memory[: len(weight_VE) * len(hidden)].view(len(weight_VE), -1)

        def make(hidden: Tensor = hidden, out: Tensor = logits_VC) -> Tensor:
            return torch.mm(weight_VE, hidden.t(), out=out)

        losses_C, scale_C, at_label_C = _softmax(make, labels_C, z_loss, gradient)
        losses_N[tokens] = torch.where(counted_C1[:, 0], losses_C, 0.0)
        scale_C1 = torch.where(counted_C1, scale_C[:, None], 0.0)
        labelled = labels_C, torch.arange(len(hidden), device=hidden.device)
        if grad_hidden_NE is not None:  # the label's part, mostly the larger, in fp32: what is rounded is the others'
            logits_VC[labelled] = 0
            others_CE = torch.mm(weight_EV, logits_VC).t() * scale_C1
            grad_hidden_NE[tokens] = others_CE.addcmul_(at_label_C[:, None] * scale_C1, weight_VE[labels_C].float())
        if grad_weight_VE is not None:
            logits_VC[labelled] = at_label_C.to(hidden.dtype)
            add_product(grad_weight_VE, logits_VC, (hidden * scale_C1).to(hidden.dtype), first=tokens.start == 0)


def _transposed(x_VE: Tensor) -> Tensor:
    """A copy [E, V]; by blocks, since torch goes through the whole of x once for every few of its columns."""
    out = torch.empty(x_VE.shape[1], len(x_VE), dtype=x_VE.dtype, device=x_VE.device)
    for rows in slices(len(x_VE), min(512, rows_at_once(x_VE[0]))):
        out[:, rows] = x_VE[rows].t()
    return out


def _softmax(make: Callable[[], Tensor], labels_C: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [C], scale [C], at_label [C]) of the logits [V, C] that `make` makes, which become the softmax's numerators.

    With at_label in place of the label's they are, times scale, the gradient.
    """
    logits_VC = make()
    label_logits_C = shift_C = logits_VC.gather(0, labels_C[None])[0].float()
    total_C = _exponentials(logits_VC, shift_C, gradient)
    if not (total_C < LARGEST_TOTAL).all():
        shift_C = make().amax(0).float()
        total_C = _exponentials(logits_VC, shift_C, gradient)
    log_total_C = total_C.log() + shift_C
    pull_C = 1 + 2 * z_loss * log_total_C
    pull_C = torch.where(pull_C == 0, 2.0**-24, pull_C)  # it is divided by
    losses_C = log_total_C - label_logits_C + z_loss * log_total_C.square()
    return losses_C, pull_C / total_C, (label_logits_C - shift_C).exp() - total_C / pull_C


def _exponentials(logits_VC: Tensor, shift_C: Tensor, keep: bool) -> Tensor:
    """Sums [C] of exp(logits - shift), which are left in place of the logits if they are kept."""
    total_C = torch.zeros_like(shift_C)
    step, scratch = min(rows_at_once(logits_VC[0]), len(logits_VC)), None
    if logits_VC.dtype != torch.float32:
        scratch = torch.empty(step, logits_VC.shape[1], dtype=torch.float32, device=logits_VC.device)
    for rows in slices(len(logits_VC), step):
        logits = logits_VC[rows]
        x = logits if scratch is None else scratch[: len(logits)].copy_(logits)
        total_C += x.sub_(shift_C).exp_().sum(0)
        if scratch is not None and keep:
            logits.copy_(x)
    return total_C


def add_product(total_VE: Tensor, grad_logits_VC: Tensor, hidden_CE: Tensor, first: bool) -> None:
    """total (+)= grad_logits hidden; between chunks the total is fp32, whatever the factors are."""
    if total_VE.dtype == hidden_CE.dtype:
        total_VE.addmm_(grad_logits_VC, hidden_CE, beta=0 if first else 1)
        return
    # No product of bf16 adds to fp32 on CPUs and ROCm; by blocks, so that it is added while it is in the cache.
    step = min(rows_at_once(total_VE[0], blocks=8), len(total_VE))
    block = torch.empty(step, total_VE.shape[1], dtype=hidden_CE.dtype, device=hidden_CE.device)
    for rows in slices(len(total_VE), step):
        product = torch.mm(grad_logits_VC[rows], hidden_CE, out=block[: rows.stop - rows.start])
        total_VE[rows].copy_(product) if first else total_VE[rows].add_(product)
