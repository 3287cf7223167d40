"""The `fuzzytok` command: the name of a sub-command, then that sub-command's own arguments."""

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

# A sub-command's module has a main(arguments) -> exit status, and is imported only when it is asked for.
_COMMANDS = {
    "bits-per-byte": ("fuzzytok_kernels.score", "how well a saved ByteLM predicts a file"),
    "check": ("fuzzytok_kernels.tuning.check", "race this GPU's stored winners against the default again"),
    "demo": ("fuzzytok_kernels.demo", "train FuzzyTokenizer on a text, here and now, and show what it does"),
    "explain": ("fuzzytok_kernels.tuning.explain", "which tuning file and entry serves a problem, and why the others do not"),
    "info": ("fuzzytok_kernels.tuning.info", "GPUs, versions, folders of tuning files, and how many entries apply here"),
    "warmup": ("fuzzytok_kernels.tuning.warmup", "tune this GPU, for the default list of problems, for one, or for those of a model"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status; `arguments` are those of the process if None."""
    parser = argparse.ArgumentParser(
        prog="fuzzytok",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<13} {summary}" for name, (_, summary) in _COMMANDS.items()),
    )
    parser.add_argument("command", choices=_COMMANDS, help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; `fuzzytok COMMAND --help` lists them")
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character costs that character alone
    module, _ = _COMMANDS[chosen.command]
    return importlib.import_module(module).main(chosen.arguments)
