"""Where the blocks of packed sequences are: what `kernels/sequences.py` counts and finds, beside a plain enumeration."""

import pytest
import torch
from modes import DEVICE, needs_kernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fuzzytok_kernels.kernels.sequences import count_blocks, find_block, following  # noqa: E402

pytestmark = needs_kernels
BLOCK = 16


@triton.jit(do_not_specialize=["n_sequences", "T", "apart"])
def walk_kernel(cu_seqlens, found, n_sequences, T, apart, BLOCK_T: tl.constexpr):
    """A program finds one block and the one that follows: the count and twice n, start, length, t go to its row of found [programs, 9]."""
    row = found + tl.program_id(0) * 9
    n_t, blocks = count_blocks(cu_seqlens, n_sequences, T, BLOCK_T)
    tl.store(row, n_t)
    n, start, length, t = find_block(tl.program_id(0) * apart, blocks, cu_seqlens, n_sequences, T, BLOCK_T)
    for i in range(2):
        tl.store(row + 1 + 4 * i, n)
        tl.store(row + 2 + 4 * i, start)
        tl.store(row + 3 + 4 * i, length)
        tl.store(row + 4 + 4 * i, t)
        n, start, length, t = following(n, start, length, t, cu_seqlens, n_sequences, T, BLOCK_T)


def walk(boundaries: list[int], T: int, programs: int, apart: int = 1) -> list[list[int]]:
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=DEVICE)
    found = torch.full((programs, 9), -7, dtype=torch.int32, device=DEVICE)
    walk_kernel[(programs,)](cu_seqlens, found, len(boundaries) - 1, T, apart, BLOCK_T=BLOCK)
    return found.tolist()


@pytest.mark.parametrize(
    "lengths",
    [[1], [BLOCK], [40, 0, 16, 17], [0] * 300 + [5] + [0] * 300 + [70], [1] * 257, [3] * 256 + [200] + [0] * 600, [0, 0, 33, 0, 0]],
    ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}",
)
def test_each_block_is_found_and_followed(lengths, device):
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    blocks = [[n, starts[n], length, t] for n, length in enumerate(lengths) for t in range(0, length, BLOCK)]
    behind = [len(lengths) - 1, starts[-1], 0, 0]
    apart = -(-len(blocks) // 12)
    rows = walk(starts, starts[-1], len(blocks) // apart + 1, apart)
    wanted = [*blocks, behind, *apart * [behind]]
    assert rows == [[len(blocks), *wanted[i * apart], *wanted[min(i * apart + 1, len(wanted) - 1)]] for i in range(len(rows))]


@pytest.mark.parametrize(
    ("boundaries", "T"),
    [
        ([0, 2**30] * 64, 2**30),  # 2**32 blocks, which are none in 32 bits
        ([0, 2**30] * 33, 2**30),
        ([0, 2**30] * 40 + [2**30], 2**30),
        ([-(2**31), 2**31 - 1] * 200, 2**31 - 1),
        ([50, 0, -9, 200, 3], 100),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_boundaries_stay_inside(boundaries, T, device):
    """However wrong the count: every block lies in a sequence of the batch, and no more are counted than there can be."""
    for apart in (1, 12_345_677):
        for count, *places in walk(boundaries, T, 12, apart):
            assert 0 <= count <= T // BLOCK + len(boundaries) - 1
            for n, start, length, t in (places[:4], places[4:]):
                assert 0 <= n < len(boundaries) - 1
                assert 0 <= t <= length and 0 <= start <= start + length <= T
