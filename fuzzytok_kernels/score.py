"""`fuzzytok bits-per-byte MODEL_FOLDER FILE`: how well a ByteLM, as `save_pretrained` wrote it, predicts a file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fuzzytok_kernels.nn import ByteLM


def main(arguments: Sequence[str]) -> int:
    """Print the mean over all bytes of the file but the first, each predicted from those before it; 0."""
    parser = argparse.ArgumentParser(prog="fuzzytok bits-per-byte", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="what ByteLM.save_pretrained wrote")
    parser.add_argument("file", type=Path, metavar="FILE", help="any bytes, at least two")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.model.is_dir():  # else from_pretrained would look for it on the Hugging Face Hub
        parser.error(f"{options.model} is no folder; expected what ByteLM.save_pretrained wrote")
    try:
        text = options.file.read_bytes()
        if len(text) < 2:
            raise ValueError(f"{options.file} has {len(text)} bytes; expected at least 2")
        model = ByteLM.from_pretrained(options.model).to(options.device)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:  # the last: a PyTorch without CUDA is asked for it
        parser.error(str(error))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(options.device)
    print(f"{model.score(ids):.4f} bits per byte of {options.file} ({len(text):,} bytes)")
    return 0
