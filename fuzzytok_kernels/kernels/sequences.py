"""Where the sequences of a packed batch begin, and what a tile's rows may see of the steps around them.

`cu_seqlens` (N + 1,) is int32, never decreasing, from 0 to T: sequence n is the steps from its number n up to its number n + 1, maybe none.
Whatever else it holds, no address outside it, or outside the initial state, is formed of it. CHUNK of its boundaries are looked at
together: a search in one load, not in a chain of ten.
"""

import triton
import triton.language as tl


@triton.jit
def touched(cu_seqlens, n_sequences, t, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr = 1024):
    """The sequence that step t is in, and the first one that begins behind the steps t to t + BLOCK_T."""
    begun, within = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for i in range(0, n_sequences, CHUNK):
        start = _starts(cu_seqlens, n_sequences, i, 2147483647, CHUNK)
        begun += (start <= t).to(tl.int32)
        within += (start < t + BLOCK_T).to(tl.int32)
    return tl.maximum(tl.sum(begun), 1) - 1, tl.sum(within)


@triton.jit
def is_near(cu_seqlens, low, high, t, shift, history, BLOCK_T: tl.constexpr):
    """Whether a row of the steps t to t + BLOCK_T, which `touched` found to be in the sequences low to high, would see another sequence."""
    distance = tl.where(shift > 0, t - tl.load(cu_seqlens + low), tl.load(cu_seqlens + high) - (t + BLOCK_T))
    return (high - low > 1) | (distance < history)


@triton.jit
def room(cu_seqlens, n_sequences, low, high, t, shift, BLOCK_T: tl.constexpr):
    """[T]: how many steps each row may go back in its sequence, or on if shift is negative; and which sequence that is."""
    step = tl.cast(t, tl.int32) + tl.arange(0, BLOCK_T)
    steps, sequence = tl.full([BLOCK_T], 2147483647, tl.int32), tl.full([BLOCK_T], 0, tl.int32)
    for i in range(low, tl.minimum(high + 1, n_sequences)):
        start = tl.load(cu_seqlens + i)
        distance = tl.where(shift > 0, step - start, start - 1 - step)
        steps = tl.where(distance < 0, steps, tl.minimum(steps, distance))
        sequence = tl.where(step < start, sequence, i)
    return steps, sequence


@triton.jit
def next_near(cu_seqlens, n_sequences, block, last, history, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr = 1024):
    """The first block of time, from `block` on and before `last`, with a row that would look back into another sequence; else `last`."""
    found = tl.zeros([CHUNK], tl.int32) + last
    for i in range(0, n_sequences, CHUNK):
        start = _starts(cu_seqlens, n_sequences, i, 0, CHUNK)
        reaching = (start > 0) & (start + history > block * BLOCK_T)
        found = tl.where(reaching, tl.minimum(found, tl.maximum(start // BLOCK_T, block)), found)
    return tl.min(found)


@triton.jit
def assert_sequences(cu_seqlens, n_sequences, T, CHUNK: tl.constexpr = 1024):
    """One program's work, without a synchronisation: PyTorch reports the assertion at its next one."""
    for i in range(0, n_sequences, CHUNK):
        index = i + tl.arange(0, CHUNK)
        start, end = _starts(cu_seqlens, n_sequences, i, 0, CHUNK), _starts(cu_seqlens + 1, n_sequences, i, 2147483647, CHUNK)
        tl.device_assert((start <= end) & ((index > 0) | (start == 0)), "cu_seqlens must begin with 0 and never decrease")
    tl.device_assert(tl.load(cu_seqlens + n_sequences) == T, "cu_seqlens must end with the steps of x")


@triton.jit
def _starts(cu_seqlens, n_sequences, i, beyond, CHUNK: tl.constexpr):
    index = i + tl.arange(0, CHUNK)
    return tl.load(cu_seqlens + index, mask=index < n_sequences, other=beyond)
