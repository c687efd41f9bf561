"""xformers, which the extra ``bench`` brings, as a peer: its attention is our full attention. Runs where it imports."""

import pytest
import torch

try:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]
except Exception as error:  # what its compiled parts raise on a torch that they were not built for is their own
    pytest.skip(f"xformers does not import here: {error!r}", allow_module_level=True)

from vmoba_flex import BlockPartition, TopK, vmoba_attention


def test_it_is_a_peer_of_the_benchmarks():
    from bench.attention.peers import PEERS

    assert "xformers" in PEERS


@pytest.mark.gpu
def test_its_attention_is_full_attention():
    partition = BlockPartition.spatial((4, 8, 8), (4, 4))
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, partition.num_tokens, 64, device="cuda", generator=generator).bfloat16()
    ours = vmoba_attention(q, k, v, partition, TopK(1), dispatch="dense")
    exact = vmoba_attention(q.double(), k.double(), v.double(), partition, TopK(1), dispatch="dense")
    theirs = memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    error, theirs_error = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
    assert theirs_error <= 3 * error
