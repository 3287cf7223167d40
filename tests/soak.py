"""`make soak`: 30,000 training steps of a small FuzzyTokenizer on a GPU: no NaN, no growth in memory, and it learns.

    PYTHONPATH=. python3 tests/soak.py [--steps N] [--device cuda]

Lengths change from step to step, so that plans, layouts and the allocator's blocks do too.
"""

import argparse
import contextlib
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

from fuzzytok_kernels import FuzzyTokenizer, bits_per_byte

_LENGTHS = (64, 61, 50, 48, 33, 16, 7)
_WARM = 0.1  # the share of the steps after which memory must not grow any more
_TEXT = (Path(__file__).parents[1] / "README.md").read_bytes()


def main() -> int:
    """1 if a loss was not finite, memory grew or nothing was learnt, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    device, started = torch.device(chosen.device), time.monotonic()
    tokenizer = FuzzyTokenizer(dim=32, dilations=(1, 2)).to(device)
    head = nn.Linear(32, tokenizer.num_ids, device=device)
    optimizer = torch.optim.AdamW([*tokenizer.parameters(), *head.parameters()], lr=1e-3, fused=True)
    text = torch.frombuffer(bytearray(_TEXT), dtype=torch.uint8).long().to(device)
    starts = torch.randint(len(text) - max(_LENGTHS) - 1, (chosen.steps,)).tolist()
    bad, losses, warm, done = torch.zeros((), dtype=torch.bool, device=device), [], (0, 0), 0
    with contextlib.suppress(KeyboardInterrupt):
        for done, start in enumerate(starts, 1):
            T, B = _LENGTHS[done % len(_LENGTHS)], 4 + done % 3
            ids = text[start : start + T + 1].expand(B, -1).roll(done % B, 0)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = bits_per_byte(head(tokenizer(ids[:, :-1])), ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bad |= ~loss.detach().isfinite()
            if done % 1000 == 1:
                losses.append(loss.item())
                took = time.monotonic() - started
                print(f"step {done:6}  {took:.0f} s  {losses[-1]:.3f} bits a byte  {_memory(device)}", flush=True)
            if done == int(chosen.steps * _WARM):
                warm = _memory(device)
    finite = not bad.item() and all(parameter.isfinite().all() for parameter in tokenizer.parameters())
    grown = [after - before for before, after in zip(warm, _memory(device), strict=True)]
    learnt = losses[-1] < 0.7 * losses[0] or chosen.steps < 3000
    print(
        f"{done:,} of {chosen.steps:,} steps in {time.monotonic() - started:.0f} s: {'all' if finite else 'NOT ALL'} finite; "
        f"{losses[0]:.3f} to {losses[-1]:.3f} bits a byte; memory since step {int(chosen.steps * _WARM):,}: "
        f"{grown[0]:+,} bytes on the GPU, {grown[1] / 2**20:+.1f} MiB of the process"
    )
    return 0 if done == chosen.steps and finite and learnt and grown[0] <= 0 and grown[1] < 64 * 2**20 else 1


def _memory(device: torch.device) -> tuple[int, int]:
    """The most bytes that were reserved on the GPU, and that the process held, so far."""
    on_gpu = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return on_gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
