"""Figures, or why there are none: a rival that does not compile costs its own row, a wrong result the whole run."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from bench.measure import WrongResultError

Figures = dict[str, Any]  # what JSON can hold


def attempted(make: Callable[[], Any]) -> Any:
    """What `make` returns, or {"failed": why}."""
    try:
        return make()
    except WrongResultError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return {"failed": f"{type(error).__name__}: {first[:120]}"}


def free() -> None:
    """Give back what the last measurement compiled and allocated."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
