"""The last linear layer and its cross-entropy in one, over chunks of tokens: all the logits never exist at once.

A 4,096-token sequence at a vocabulary of 32,000 holds 524 MB of fp32 logits and as much again for their gradient; here a
chunk's logits become a loss and a gradient at once and are forgotten. 6NVD FLOPs in all, as the plain layer takes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 1024  # 1,024 rows of 32,000 fp32 logits are 131 MB


def linear_cross_entropy(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor) -> Tensor:
    """Mean over tokens of -log softmax(hidden weight^T)[label], in fp32.

    hidden_NE: [N, E]; weight_VE: [V, E] of the same float dtype; labels_N: [N] int64 in [0, V). Returns a fp32 scalar.
    The gradients are made in the forward pass, one chunk after the other, whenever one is wanted.
    """
    return _LinearCrossEntropy.apply(hidden_NE, weight_VE, labels_N)


def linear_cross_entropy_reference(hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor) -> Tensor:
    """The same with all logits held: what `linear_cross_entropy` must equal."""
    return F.cross_entropy(F.linear(hidden_NE, weight_VE).float(), labels_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad
        tokens = hidden_NE.shape[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        grad_hidden_NE = torch.empty_like(hidden_NE) if wanted[0] else None
        grad_weight_VE = torch.zeros(weight_VE.shape, dtype=torch.float32, device=hidden_NE.device) if wanted[1] else None
        for start in range(0, tokens, CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            hidden, labels = hidden_NE[rows], labels_N[rows, None]
            log_p = torch.log_softmax(F.linear(hidden, weight_VE).float(), dim=-1)
            loss -= log_p.gather(1, labels).sum()
            if not (wanted[0] or wanted[1]):
                continue
            grad_logits = log_p.exp_().scatter_add_(1, labels, log_p.new_full(labels.shape, -1.0)).div_(tokens)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden_NE is not None:
                torch.mm(grad_logits, weight_VE, out=grad_hidden_NE[rows])
            if grad_weight_VE is not None:
                grad_weight_VE += grad_logits.T @ hidden
        ctx.save_for_backward(grad_hidden_NE, grad_weight_VE)
        ctx.dtype = hidden_NE.dtype
        return loss / tokens

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The scale (1/3 for three micro-batches) is applied in fp32: rounded to bf16 it would lengthen all gradients by 0.2 %.
        scaled = [None if g is None else (g.float() * grad_loss).to(ctx.dtype) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None
