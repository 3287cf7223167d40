"""`fuzzytok demo`: train a ByteLM on a text; show what it learnt, that its tokenizer is causal, how fast it is, and what it writes."""

import argparse
import copy
import lzma
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fuzzytok_kernels.nn import ByteLM, CausalConv1d, FuzzyTokenizer, bits_per_byte

_SHORTEST, _LONGEST = 2000, 4 << 20  # bytes of text: enough for a held-out part, and little enough for xz to keep up
_PASSES = 10  # over the text, at most: a text learnt by heart predicts no other
_PROMPT, _SAMPLE = 60, 300  # bytes
_STEPS = 200  # in those passes, at least: a short text gets smaller batches


class _Size(NamedTuple):
    """What fits the device: channels of the model, bytes in a training step and in a timed step."""

    dim: int
    batch: int
    length: int
    timed_length: int


_SIZES = {"cpu": _Size(128, 16, 256, 256), "cuda": _Size(256, 32, 512, 2048)}


class _PaddedConv1dTokenizer(nn.Module):
    """A FuzzyTokenizer with the same parameters as people write it today: `F.conv1d(F.pad(x))`, channels-first."""

    def __init__(self, tokenizer: FuzzyTokenizer) -> None:
        super().__init__()
        self.embedding, self.norm = tokenizer.embedding, tokenizer.norm
        convs = [module.to_conv1d() for module in tokenizer.modules() if isinstance(module, CausalConv1d)]
        self.convs = nn.ModuleList(convs)
        self.histories = [(conv.kernel_size[0] - 1) * conv.dilation[0] for conv in convs]

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embedding(ids.long())).transpose(1, 2)
        for conv, history in zip(self.convs, self.histories, strict=True):
            h = h + F.gelu(conv(F.pad(h, (history, 0))))
        return h.transpose(1, 2)


def main(arguments: Sequence[str]) -> int:
    """Run the demo; 0, or 1 if an output depended on a later byte."""
    parser = argparse.ArgumentParser(prog="fuzzytok demo", description=__doc__)
    parser.add_argument("--file", type=Path, help="what to train on, any bytes; Python's own help texts if not given")
    parser.add_argument("--text", default="Naïve café: 日本語, ünïcödé and typoos are bytes like any other.", help="a line to encode")
    parser.add_argument("--seconds", type=float, default=40, help="how long to train at most (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = _SIZES[device.type]
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds is {options.seconds}; expected more than 0")
    try:
        name, text = _read(options.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    cut = len(text) * 9 // 10
    training, held_out = text[:cut], text[cut:]
    print(f"text       {name}: {len(training):,} bytes to train on, the {len(held_out):,} after them held out")

    model = ByteLM(dim=size.dim).to(device)
    tokenizer = model.tokenizer
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model      ByteLM(dim={size.dim}), FuzzyTokenizer and a next-byte head: {parameters:,} parameters, {_device_text(device)}")
    print(f"           receptive field {tokenizer.receptive_field} bytes")
    _train(model, _ids(training, device), size, options.seconds)
    _print_bits(model, training, held_out, device)
    causal = _print_causality(tokenizer, _ids(held_out, device)[:1024])
    _print_encoding(tokenizer, options.text)
    _print_speed(copy.deepcopy(model), size, device)  # its steps train on noise
    _print_sample(model, held_out[:_PROMPT], device)
    return 0 if causal else 1


def _read(file: Path | None) -> tuple[str, bytes]:
    if file is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n".join(topics.values()).encode()
    with file.open("rb") as stream:
        text = stream.read(_LONGEST + 1)
    if len(text) < _SHORTEST:
        raise ValueError(f"{file} has {len(text)} bytes; expected at least {_SHORTEST}")
    if len(text) > _LONGEST:
        return f"the first {_LONGEST:,} bytes of {file}", text[:_LONGEST]
    return str(file), text


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"bf16 autocast on {torch.cuda.get_device_name(device)}"
    return f"fp32 on the CPU, {torch.get_num_threads()} threads"


def _ids(text: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---- training


def _train(model: nn.Module, ids: Tensor, size: _Size, seconds: float) -> None:
    """AdamW on random windows until the time is up or the text was passed over often enough; the learning rate falls to 0 by then."""
    length = min(size.length, len(ids) - 1)
    bytes_in_all = _PASSES * len(ids)
    batch_size = max(1, min(size.batch, bytes_in_all // (_STEPS * length)))
    most = bytes_in_all // (batch_size * length)
    optimizer = torch.optim.AdamW(model.parameters())
    window = torch.arange(length + 1, device=ids.device)
    begin, steps, loss = time.perf_counter(), 0, torch.tensor(math.nan)
    with tqdm(total=1.0, bar_format="train      {percentage:3.0f}% |{bar}| {elapsed} {postfix}", mininterval=0.5) as bar:
        while (done := max(steps / most, (time.perf_counter() - begin) / seconds)) < 1:
            bar.update(done - bar.n)
            if steps % 10 == 1:
                bar.set_postfix_str(f"step {steps:,}, {loss.item():.2f} bits per byte", refresh=False)
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (steps + 1) / 30) * (1 - done)
            batch = ids[torch.randint(len(ids) - length, (batch_size, 1), device=ids.device) + window]
            loss = _step(model, optimizer, batch[:, :-1], batch[:, 1:])
            steps += 1
        bar.update(1 - bar.n)
    took, passes = time.perf_counter() - begin, steps * batch_size * length / len(ids)
    print(f"trained    {steps:,} steps of {batch_size} x {length} bytes in {took:.0f} s, {passes:.1f} times the text")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor) -> Tensor:
    with _autocast(ids.device):
        loss = bits_per_byte(model(ids), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---- what is shown


def _print_bits(model: ByteLM, training: bytes, held_out: bytes, device: torch.device) -> None:
    with _autocast(device):
        bits = model.score(_ids(held_out, device))
    after = (_xz_bits(training + held_out) - _xz_bits(training)) / len(held_out)
    print("held-out bits per byte")
    print(f"           {bits:.3f}  FuzzyTok")
    print(f"           {_unigram_bits(training, held_out):.3f}  byte unigrams, counted in the training part")
    print(f"           {_xz_bits(held_out) / len(held_out):.3f}  xz, the held-out part alone")
    print(f"           {after:.3f}  xz, what the held-out part adds behind the training part")


def _unigram_bits(training: bytes, held_out: bytes) -> float:
    """Add-one smoothed byte frequencies of the training part, scored on the held-out part."""
    counts = Counter(training)
    return -sum(math.log2((counts[byte] + 1) / (len(training) + 256)) for byte in held_out) / len(held_out)


def _xz_bits(text: bytes) -> int:
    return 8 * len(lzma.compress(text))


@torch.no_grad()
def _print_causality(tokenizer: FuzzyTokenizer, ids: Tensor) -> bool:
    """Change every byte from a cut on, and compare the outputs before it bit for bit; False if one differs, or if none behind it does."""
    causal = True
    z = tokenizer(ids[None])
    for cut in (1, len(ids) // 2, len(ids) - 1):
        changed = ids.clone()
        changed[cut:] += 1  # uint8 wraps
        z_changed = tokenizer(changed[None])
        before, behind = torch.equal(z[:, :cut], z_changed[:, :cut]), torch.equal(z[:, cut:], z_changed[:, cut:])
        causal &= before and not behind
        print(f"causality  bytes {cut} to {len(ids) - 1} changed: outputs before are {'bit-identical' if before else 'DIFFERENT'}", end="")
        print(f", those from there on {'THE SAME' if behind else 'differ'}")
    return causal


def _print_speed(model: ByteLM, size: _Size, device: torch.device) -> None:
    """Training steps of the same model on both convolutions, in turns on the same bytes; a median each."""
    plain = nn.Sequential(_PaddedConv1dTokenizer(model.tokenizer), model.head)
    ids = torch.randint(256, (size.batch, size.timed_length), dtype=torch.uint8, device=device)
    with torch.no_grad(), _autocast(device):
        expected = plain(ids).float()
        difference = (model(ids) - expected).norm() / expected.norm()
    steps = {"fuzzytok_kernels": _timed_step(model, ids), "F.conv1d(F.pad(x))": _timed_step(plain, ids)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 + 7):
        for name, step in steps.items():
            seconds[name].append(step())
    print(f"speed      tokens/s of a training step of {size.batch} x {size.timed_length} bytes; the logits agree to {difference:.0e}")
    for name, values in seconds.items():
        print(f"           {ids.numel() / statistics.median(values[2:]):12,.0f}  {name}")
    if device.type == "cpu":
        print("           (without a GPU both are PyTorch's own convolution)")


def _timed_step(model: nn.Module, ids: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        begin = time.perf_counter()
        _step(model, optimizer, ids, ids)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return step


@torch.no_grad()
def _print_encoding(tokenizer: FuzzyTokenizer, text: str) -> None:
    ids, _ = tokenizer.encode(text)
    z = tokenizer(ids)
    print(f"encode     {text!r}: {ids.shape[1]} bytes -> z {tuple(z.shape)}")
    print(f"           z[0, -1, :4] = {[round(value, 3) for value in z[0, -1:, :4].flatten().tolist()]}")


def _print_sample(model: ByteLM, prompt: bytes, device: torch.device) -> None:
    """What the model writes behind `prompt`, as it comes."""
    print(f"sample     behind {prompt.decode(errors='replace')!r}, a byte at a time from the state:\n           ", end="")
    begin = time.perf_counter()
    with _autocast(device):
        for (piece,) in model.generate(prompt, _SAMPLE, temperature=0.7, seed=0):
            print("".join(c if c.isprintable() else "\n           " if c == "\n" else "." for c in piece), end="", flush=True)
    print(f"\n           ({_SAMPLE} bytes in {time.perf_counter() - begin:.1f} s)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
