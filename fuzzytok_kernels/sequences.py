"""The first and the last steps of each sequence of a batch, padded or packed, by functions that PyTorch can differentiate.

No value of `cu_seqlens` is read on the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def heads(x: Tensor, count: int, cu_seqlens: Tensor | None) -> Tensor:
    """(N, C, 2 * count): `count` zeros, and the first `count` steps of each sequence of x (B, C, T); zeros behind its end."""
    T = x.shape[2]
    if cu_seqlens is None:
        steps = x[:, :, :count].mT
        return F.pad(steps, (0, 0, count, count - steps.shape[1])).mT
    offset = torch.arange(-count, count, device=x.device)
    step = cu_seqlens[:-1, None] + offset  # (N, 2 * count)
    if T == 0:
        return x.new_zeros(step.shape[0], x.shape[1], 2 * count)
    inside = (offset >= 0) & (step < cu_seqlens[1:, None])
    return torch.where(inside[:, :, None], x[0].mT[step.clamp(0, T - 1)], 0).mT


def last_steps(x: Tensor, count: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(N, C, count): the end of each sequence of x (B, C, T) behind its initial state (N, C, count), or zeros; channels-last in memory."""
    N, channels, T = x.shape
    if cu_seqlens is not None:
        N = cu_seqlens.shape[0] - 1
    past = x.new_zeros(N, channels, count) if initial_state is None else initial_state
    past = past.mT.to(x.dtype)  # (N, count, C)
    if cu_seqlens is None:
        kept = torch.sym_min(count, T)
        return torch.cat([past[:, kept:], x.mT[:, T - kept :]], 1).mT
    if T == 0:
        return torch.cat([past, x.mT.expand(N, 0, channels)], 1).mT
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()  # (N, 1)
    step = ends - count + torch.arange(count, device=x.device)  # (N, count)
    before = (step - starts + count).clamp(max=count - 1)  # of a step that lies in the state
    states = past[torch.arange(N, device=x.device)[:, None], before]  # (N, count, C)
    return torch.where((step >= starts)[:, :, None], x[0].mT[step.clamp(0, T - 1)], states).mT
