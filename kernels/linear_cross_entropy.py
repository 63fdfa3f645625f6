"""The last linear layer and its cross-entropy in one, over chunks of tokens: all the logits never exist at once.

A 4,096-token sequence at a vocabulary of 32,000 holds 524 MB of fp32 logits and as much again for their gradient. Here a
chunk's logits, in the dtype of the weights, become losses and then, in the same memory, their own gradient, which is multiplied
into the gradients of both inputs and forgotten. That takes 6NVE FLOPs, as the plain layer does; recomputing the logits in a
backward pass (Wijmans et al. 2024, arXiv 2411.09009) would take 8NVE.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels import native
from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import by_device, kernel, launcher, only_shapes
from megaspark.kernels.linear_cross_entropy_cpu import add_product, forward_torch, rows_at_once, slices
from megaspark.kernels.linear_cross_entropy_native import fits, forward_native

# Logits held at once. The weights' gradient is read and written once a chunk, so bigger chunks move less; on a CPU 1,024 rows of
# 32,000 fp32 logits, or twice as many in bf16, are enough: more gain nothing.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}

CONFIGS: dict[str, list[dict[str, int]]] = {"_softmax_kernel": [{"BLOCK": 4096, "num_warps": 8}, {"BLOCK": 8192, "num_warps": 16}]}


def linear_cross_entropy_reference(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """The same with all logits held, as plain torch has it: what `linear_cross_entropy` must equal."""
    logits_NV = F.linear(hidden_NE, weight_VE)
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    losses_N = F.cross_entropy(logits_NV, labels_N, ignore_index=ignore_index, reduction="none")
    counted_N = labels_N != ignore_index
    losses_N = losses_N + z_loss * torch.where(counted_N, logits_NV.logsumexp(-1).square(), 0.0)
    return losses_N.sum() / counted_N.sum().clamp(min=1)


def _linear_cross_entropy_torch(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    return _run(hidden_NE, weight_VE, labels_N, ignore_index, z_loss, by="torch")[0]


def _linear_cross_entropy_native(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    return _run(hidden_NE, weight_VE, labels_N, ignore_index, z_loss, by="native")[0]


def _auto(hidden_NE: Tensor, *args: Any, **kwargs: Any) -> str:
    name = by_device(hidden_NE)
    return "native" if name == "reference" and fits(hidden_NE) else name


@kernel(_auto, native=_linear_cross_entropy_native, reference=_linear_cross_entropy_torch)
def linear_cross_entropy(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """Mean of -log softmax(hidden weight^T)[label], over the labels that count, in fp32.

    hidden_NE: [N, E]; weight_VE: [V, E] of the same float dtype; labels_N: [N] integers in [0, V), or ignore_index: such tokens
    weigh nothing, and if all are such the loss and its gradients are 0. z_loss: its multiple of logsumexp^2 is added to each
    token's loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5). Returns a fp32 scalar. The gradients that are wanted are
    made in the forward pass: under ZeRO-3 the weights are here only then. Raises ValueError for shapes and dtypes that do not
    fit; a label out of range is an error on the CPU, and a loss of NaN on a GPU.
    """
    return _run(hidden_NE, weight_VE, labels_N, ignore_index, z_loss, by="triton")[0]


def _token_losses_torch(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    with torch.no_grad():
        return _run(hidden_NE, weight_VE, labels_N, ignore_index, 0.0, by="torch")[1]


def _token_losses_native(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    with torch.no_grad():
        return _run(hidden_NE, weight_VE, labels_N, ignore_index, 0.0, by="native")[1]


@kernel(_auto, native=_token_losses_native, reference=_token_losses_torch)
def token_losses(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The loss of each token, [N] in fp32, 0 where it is ignored, without gradients; arguments as in `linear_cross_entropy`."""
    with torch.no_grad():
        return _run(hidden_NE, weight_VE, labels_N, ignore_index, 0.0, by="triton")[1]


def _run(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, by: str
) -> tuple[Tensor, ...]:
    """Looks at the arguments, and makes the gradients that are wanted and no others; returns what `_forward` does."""
    if by == "native" and (hidden_NE.device.type != "cpu" or hidden_NE.dtype not in native.DTYPES):
        found = f"{hidden_NE.dtype} on {hidden_NE.device}"
        raise ValueError(f"linear_cross_entropy's backend 'native' has fp32 and bf16 on CPUs, not {found}")
    found = f"hidden {tuple(hidden_NE.shape)} {hidden_NE.dtype}, weight {tuple(weight_VE.shape)} {weight_VE.dtype}"
    if hidden_NE.ndim != 2 or weight_VE.ndim != 2 or hidden_NE.shape[1] != weight_VE.shape[1]:
        raise ValueError(f"linear_cross_entropy takes hidden [N, E] and weight [V, E]; these are {found}")
    if hidden_NE.dtype != weight_VE.dtype or hidden_NE.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"linear_cross_entropy takes one dtype, float32, bfloat16 or float16; these are {found}")
    if labels_N.shape != hidden_NE.shape[:1] or labels_N.dtype not in (torch.int64, torch.int32):
        found = f"{tuple(labels_N.shape)} {labels_N.dtype}, {found}"
        raise ValueError(f"linear_cross_entropy takes integer labels [N]; these are {found}")
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_NE, weight_VE)]
    return _forward(hidden_NE, weight_VE, labels_N, ignore_index, z_loss, by, *wanted)


@launcher("linear_cross_entropy_forward")
def _forward(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, by: str,
    hidden_wanted: bool, weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(mean loss, each token's loss [N], 1 / how many count, gradients of the losses' sum by hidden and by weight).

    A gradient that is not wanted is empty; the weights' is in fp32 unless one chunk covers all tokens.
    """
    tokens, vocab = hidden_NE.shape[0], weight_VE.shape[0]
    most = max(1, CHUNK_BYTES["cuda" if hidden_NE.is_cuda else "cpu"] // (vocab * hidden_NE.element_size()))
    chunk = triton.cdiv(tokens, triton.cdiv(tokens, most)) if tokens > most else tokens  # equal ones
    fp32 = {"dtype": torch.float32, "device": hidden_NE.device}
    losses_N, loss, inverse_count = torch.empty(tokens, **fp32), torch.empty((), **fp32), torch.empty((), **fp32)
    grad_hidden_NE = torch.empty(hidden_NE.shape if hidden_wanted else (0,), dtype=hidden_NE.dtype, device=hidden_NE.device)
    summed = weight_VE.dtype if chunk == tokens else torch.float32
    grad_weight_VE = torch.empty(weight_VE.shape if weight_wanted else (0,), dtype=summed, device=hidden_NE.device)
    if only_shapes(hidden_NE):
        return loss, losses_N, inverse_count, grad_hidden_NE, grad_weight_VE
    gradients = grad_hidden_NE if hidden_wanted else None, grad_weight_VE if weight_wanted else None
    made_by = {"triton": _forward_triton, "torch": forward_torch, "native": forward_native}[by]
    made_by(hidden_NE, weight_VE, labels_N, ignore_index, z_loss, chunk, losses_N, *gradients)
    inverse_count.copy_((labels_N != ignore_index).sum().clamp(min=1).float().reciprocal())
    loss.copy_(losses_N.sum() * inverse_count)
    return loss, losses_N, inverse_count, grad_hidden_NE, grad_weight_VE


def _forward_triton(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, chunk: int, losses_N: Tensor,
    grad_hidden_NE: Tensor | None, grad_weight_VE: Tensor | None,
) -> None:  # fmt: skip
    """Writes each token's loss and the gradients of their sum that are asked for, `chunk` tokens at a time."""
    logits_CV = torch.empty(chunk, len(weight_VE), dtype=hidden_NE.dtype, device=hidden_NE.device)
    gradient = grad_hidden_NE is not None or grad_weight_VE is not None
    for rows in slices(len(hidden_NE), chunk):
        hidden, logits = hidden_NE[rows], logits_CV[: rows.stop - rows.start]
        torch.mm(hidden, weight_VE.t(), out=logits)
        _softmax_triton(logits, labels_N[rows], losses_N[rows], ignore_index, z_loss, gradient)
        if grad_hidden_NE is not None:
            torch.mm(logits, weight_VE, out=grad_hidden_NE[rows])
        if grad_weight_VE is not None:
            _add_product(grad_weight_VE, logits, hidden, first=rows.start == 0)


def _add_product(total_VE: Tensor, grad_logits_NV: Tensor, hidden_NE: Tensor, first: bool) -> None:
    """total (+)= grad_logits^T hidden; between chunks the total is fp32, whatever the factors are."""
    if total_VE.dtype == hidden_NE.dtype or not total_VE.is_cuda or torch.version.hip:
        add_product(total_VE, grad_logits_NV.t(), hidden_NE, first)
    elif first:
        torch.mm(grad_logits_NV.t(), hidden_NE, out_dtype=torch.float32, out=total_VE)
    else:
        torch.addmm(total_VE, grad_logits_NV.t(), hidden_NE, out_dtype=torch.float32, out=total_VE)


def _softmax_triton(
    logits_NV: Tensor, labels_N: Tensor, losses_N: Tensor, ignore_index: int, z_loss: float, gradient: bool
) -> None:
    _softmax_kernel[(len(logits_NV),)](
        logits_NV, labels_N.contiguous(), losses_N, logits_NV.shape[1], ignore_index, z_loss, GRADIENT=gradient,
        **CONFIGS["_softmax_kernel"][0],
    )  # fmt: skip


@launcher("linear_cross_entropy_backward")
def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [rows, E] x scale [] in `dtype`, multiplied in fp32.

    Rounded to bf16 a scale of 1/3 (three micro-batches) would lengthen all gradients by 0.2 %.
    """
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if not only_shapes(gradient):
        for rows in slices(len(gradient), rows_at_once(gradient[0]) if len(gradient) else 1):
            torch.mul(gradient[rows].float(), scale, out=out[rows])
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses_N, inverse_count, grad_hidden_NE, grad_weight_VE = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(losses_N, inverse_count, grad_hidden_NE, grad_weight_VE)
    ctx.wanted, ctx.dtype = inputs[6:], inputs[0].dtype
    ctx.save_for_backward(inverse_count, grad_hidden_NE, grad_weight_VE)


def _gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    inverse_count, *gradients = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 8
    scale = grad_loss * inverse_count
    scaled = (_scaled(g, scale, ctx.dtype) if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True))
    return *scaled, *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _softmax_kernel(
    logits_ptr, labels_ptr, losses_ptr, V, ignore_index, z_loss, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):
    """Program n turns row n's logits into its loss and, in place, into the gradient of that loss by them.

    Everything between is fp32; a loss stored in bf16 would be off by up to 0.03 at 10.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    # Read before the first reduction, which no thread passes alone: later another one may have overwritten it.
    at_label = tl.load(logits_ptr + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    column = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    log_total = largest + tl.log(total)
    loss = log_total - at_label + z_loss * log_total * log_total
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
    if GRADIENT:
        pull = 2.0 * z_loss * log_total
        factor = (1.0 + pull) / total
        p = tl.exp(at_label - largest) / total
        at_label = p - 1.0 + p * pull  # in this order: of a p near 1 little is left
        for start in range(0, V, BLOCK):
            inside = start + column < V
            x = tl.load(logits_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.where(start + column == label, at_label, tl.exp(x - largest) * factor)
            gradient = tl.where(counted, gradient, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + column, gradient, mask=inside)


def cases() -> list[Case]:
    """The heads of Litespark's 3B and 30B Llama and of StarCoder2 3B, for one sequence and for four."""

    def make(tokens: int, vocab: int, hidden: int, trained: bool = True) -> Case:
        def inputs(make: Inputs) -> dict[str, Any]:
            weight_VE = make.normal(vocab, hidden, std=0.02)
            return {"hidden_NE": make.normal(tokens, hidden), "weight_VE": weight_VE, "labels_N": make.integers(vocab, tokens)}

        once = 2 * hidden * (tokens + vocab)
        return Case(
            name=f"{'' if trained else 'evaluated_'}{tokens}x{hidden}x{vocab}",
            make=inputs,
            differentiated=("hidden_NE", "weight_VE") if trained else (),
            forward_bytes=(2 if trained else 1) * once + 12 * tokens,
            backward_bytes=2 * once if trained else 0,  # both gradients scaled
            forward_flops=(6 if trained else 2) * tokens * vocab * hidden,
            op="linear_cross_entropy" if trained else "token_losses",
        )

    sizes = [(4096, 32000, 2048), (16384, 32000, 2048), (4096, 32000, 6656), (16384, 32000, 6656), (4096, 49152, 3072)]
    return [*(make(*size) for size in sizes), make(4096, 32000, 2048, trained=False)]
