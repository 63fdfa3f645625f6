"""What a block of our kernels keeps for its backward pass, counted on the tape, against the formula that plans rely on."""

import pytest
import torch

from megaspark.flops import Shape
from megaspark.footprints import block_bytes
from megaspark.models import llama
from megaspark.models.blocks import Execution
from megaspark.weights import build_model
from megaspark.workloads import Workload

BACKENDS = {op: "triton" for op in ("attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy")}
BATCH, SEQ = 2, 128


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_block_keeps_what_the_plan_says(precision, dtype):
    """A kernel that saves one more tensor makes every plan's activations too small; at 30B that is gigabytes a rank."""
    config = llama.Config(hidden=64, layers=1, heads=4, kv_heads=2, ffn=176, vocab=100)
    model = build_model(config, 1, Execution(BACKENDS)).to(dtype)
    positions_BS = torch.arange(SEQ).repeat(BATCH, 1)
    x_BSE = torch.randn(BATCH, SEQ, config.hidden, dtype=dtype, requires_grad=True)
    context = model.context(positions_BS, dtype, documents=True)
    shared = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *context[:2], *context.spans) if t is not None}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.blocks[0](x_BSE, context)
    assert out.requires_grad
    shape = Shape(1, 64, 4, 2, 16, 176, 100)
    assert sum(kept.values()) == block_bytes(Workload(shape, False, 1, SEQ, BATCH, 1, precision))
