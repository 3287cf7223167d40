"""`fuzzytok info`: the GPUs, the versions, the folders of tuning files, and how many entries apply here."""

import argparse
import os
from collections.abc import Iterator, Sequence

import torch

from fuzzytok_kernels.tuning import lookup, store
from fuzzytok_kernels.tuning.gpu import Gpu, versions
from fuzzytok_kernels.tuning.space import OPS


def main(arguments: Sequence[str]) -> int:
    """Print it; 0."""
    argparse.ArgumentParser(prog="fuzzytok info", description=__doc__).parse_args(arguments)
    gpus = [gpu for device in range(torch.cuda.device_count()) if (gpu := Gpu.current(device))]
    print("\n".join([*_machine(gpus), *_folders(), *(line for gpu in dict.fromkeys(gpus) for line in _entries(gpu))]))
    return 0


def _machine(gpus: list[Gpu]) -> Iterator[str]:
    for number, gpu in enumerate(gpus):
        yield f"gpu {number}      {gpu}"
    if not gpus:
        yield "gpu        none: the kernels run on NVIDIA and AMD GPUs, all else on PyTorch's own convolution"
    yield "versions   " + ", ".join(f"{name} {version or 'none'}" for name, version in versions().items())


def _folders() -> Iterator[str]:
    for name, folder in lookup.folders().items():
        state = "not set" if folder is None else str(folder) if os.path.isdir(folder) else f"{folder} (does not exist)"
        yield f"folder     {name}: {state}"


def _entries(gpu: Gpu) -> Iterator[str]:
    for op in OPS:
        counts = [0, 0, 0]  # by how far a source counts: this GPU's, another's, an architecture's default
        for source in lookup.sources(gpu, op):
            counts[source.farther] += len(store.read(source.path, gpu, op)[0])
        yield f"entries    {op}: {counts[0]} of {gpu.name}, {counts[1]} of other {gpu.arch} GPUs, {counts[2]} defaults of {gpu.arch}"
