"""FLOPs and parameters against the published figures, and peaks that must not be another device's."""

import pytest

from megaspark.flops import Shape, parameters, peak_flops, per_token

S3B = Shape(layers=28, hidden=2048, heads=16, kv_heads=2, head_dim=128, ffn=11008, vocab=32000)
S30B = Shape(layers=60, hidden=6656, heads=64, kv_heads=64, head_dim=104, ffn=17920, vocab=32000)


def test_litespark_figures():
    """A MFU on another count is not comparable: these two reproduce 9 of the paper's 12 rows within 0.02 %."""
    assert per_token(S3B, 4096).litespark == 16_159_604_736
    assert per_token(S30B, 4096).litespark == 213_520_220_160
    tokens_per_s, tflops_a_gpu = 439_645, 888.06  # Table 2, 3B on 8 GPUs
    assert tokens_per_s * per_token(S3B, 4096).litespark / 8 / 1e12 == pytest.approx(tflops_a_gpu, rel=2e-4)


def test_causal_count_is_what_a_loop_over_the_positions_gives():
    """Off by one key a token, or a factor of two in attention, moves MFU by percents."""
    shape, seq = Shape(layers=3, hidden=48, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=100), 33
    matmul = 3 * (48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 96) + 48 * 100
    forward = 0
    for position in range(seq):
        keys = position + 1
        forward += 2 * matmul + 3 * 4 * (2 * 16 * keys + 2 * 16 * keys)  # q k^T and the product with v
    assert per_token(shape, seq).causal * seq == 3 * forward
    full = 2 * matmul + 3 * 4 * (2 * 16 * seq + 2 * 16 * seq)
    assert per_token(shape, seq).litespark == 3 * full


def test_causal_is_lower_by_what_the_paper_leaves_unsaid():
    """8.7 % at 3B and 4.6 % at 30B: the two counts must never be confused."""
    for shape, share in ((S3B, 0.087), (S30B, 0.046)):
        flops = per_token(shape, 4096)
        assert 1 - flops.causal / flops.litespark == pytest.approx(share, abs=5e-4)


def test_parameters():
    """The two published models, untied, to the last one; tying saves one table."""
    assert parameters(S3B, tied=False) == 2_289_158_144
    assert parameters(S30B, tied=False) == 32_528_943_616
    assert parameters(S3B, tied=False) - parameters(S3B, tied=True) == 32000 * 2048


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200", "fp8", 1979e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("AMD Instinct MI300X", "bf16", 1307e12),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        ("cpu", "fp32", None),
        ("", "bf16", None),
    ],
)
def test_peak_is_the_devices_own_or_none(name, precision, peak):
    """A guessed peak makes a MFU that means nothing; the names are those that torch reports."""
    assert peak_flops(name, precision) == peak
