"""`python3 -m bench.scaled FILE...`: scaling.md and scaling.json of the lines that bench.sequence_parallel and bench.links wrote."""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import FOLDER
from bench.sequence_parallel import ALONE, MAIN, STACK, STRONG, WEAK, Row, bytes_sent

DIM, ITEMSIZE = 256, 2
BAR = 0.95  # weak scaling, 2 ranks of MAIN bytes, by what a user gets who sets nothing
_METHOD = """\
A step of ByteLM (C=256, nine blocks; forward, loss, backward, the mean of the gradients; no optimiser) on one row, whose bytes lie on the
GPUs in the order of time; parameters in fp32 under autocast to bf16, or FSDP2's mixed precision. Each form's gradients were first compared
with those of one rank that has all bytes. A time is the median of 9 rounds of at least 60 ms, of a captured graph that is replayed, all
forms in turns, after a second of the same; of the GPUs the slowest. All GPUs of a run work at the same time: where a row has fewer, several
rows do, and the worst is given. Efficiency is tokens/s over the sum of what the same GPUs do, each on its own: in a run before ("one GPU"),
and in turns with the exchange ("in turns"). These are the same step, without a message and so, on several GPUs, with wrong gradients; it
may take longer in turns than before. "Without exchange" is its time in turns. The bar is met where both are at least that. Bytes are those
that all GPUs of a row send in a step, by formula: histories, and gradients and parameters in rings. NCCL's time is that of its kernels in a
profile of 5 steps, on the GPU that waits least for the others; hidden is what of it lies beside another kernel; in "other kernels" some
other kernel runs, on the GPU where it is longest. A kernel that shares its GPU with NCCL's takes longer: hidden is not free."""
_WEAK = (
    "GPUs",
    "exchange",
    "us a step",
    "tokens/s",
    "efficiency: one GPU",
    "in turns",
    "without exchange",
    "bytes: histories",
    "gradients, parameters",
    "NCCL",
    "hidden",
    "other kernels",
)


class Times(NamedTuple):
    """Of the rows that were measured together: a file of bench.sequence_parallel."""

    rows: dict[tuple[str, int, int, str], Row]  # by how, ranks, steps, form

    def replayed(self) -> list[tuple[int, int, str]]:
        """Ranks, steps and form of what was, by the number of ranks."""
        return sorted((key[1:] for key in self.rows if key[0] == "replayed"), key=lambda key: key[0])

    def us(self, ranks: int, T: int, form: str, how: str = "replayed") -> list[float]:
        row = self.rows.get((how, ranks, T, form))
        return row.us if row else []

    def step(self, ranks: int, T: int, form: str, how: str = "replayed") -> float | None:
        """Of the slowest rank."""
        return max(self.us(ranks, T, form, how), default=None)

    def weak(self, ranks: int, T: int, form: str, in_turns: bool = False) -> float | None:
        """The efficiency of the worst row of GPUs: their tokens/s over the sum of what each does on its own, before or in turns."""
        alone, together = self.us(ranks if in_turns else 1, T, ALONE), self.us(ranks, T, form)
        rows = range(0, min(len(alone), len(together)), ranks)
        shares = [ranks / max(together[i : i + ranks]) / sum(1 / us for us in alone[i : i + ranks]) for i in rows]
        return min(shares, default=None)

    def strong(self, ranks: int, whole: int, form: str) -> float | None:
        """How many times as fast as one GPU with all bytes, per GPU."""
        alone, together = self.step(1, whole, ALONE), self.step(ranks, whole // ranks, form)
        return alone / together / ranks if alone and together else None

    def exchanged(self, ranks: int, T: int, form: str) -> tuple[float, float, float] | None:
        """Microseconds a step: NCCL's and the hidden ones of them where they are the fewest, other kernels' where they are the most."""
        row = self.rows.get(("profiled", ranks, T, form))
        if not row or not row.exchanged:
            return None
        total, hidden, _ = min(row.exchanged)
        return total, hidden, max(busy - total + hidden for total, hidden, busy in row.exchanged)


def read(paths: Iterable[Path]) -> tuple[dict[str, str], list[Times], list[dict[str, Any]]]:
    """The machine, the rows of each file and the links. ValueError where the files are of several machines."""
    machines, files, links = [], [], []
    for path in paths:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        machines += [line for line in lines if "gpu" in line]
        rows = [Row(**line) for line in lines if "form" in line]
        links += [line for line in lines if "bytes" in line]
        if rows:
            files.append(Times({(row.how, row.ranks, row.steps, row.form): row for row in rows}))
    kinds = {(machine["gpu"], machine["torch"], machine["nccl"]) for machine in machines}
    if len(kinds) != 1:
        raise ValueError(f"the files are of {sorted(kinds)}; expected those of one GPU, torch and NCCL")
    return machines[0], files, links


def report(machine: dict[str, str], files: list[Times], links: list[dict[str, Any]]) -> str:
    versions = f"torch {machine['torch']}, triton {machine['triton']}, NCCL {machine['nccl']}"
    sections = [
        [f"# Scaling of a training step on {machine['gpu']}s of one host, measured", "", f"{machine['date']}; {versions}.", "", _METHOD],
        ["## The bar", "", *_bar(files)],
        *([f"## Weak scaling, {T:,} bytes a GPU", "", *_weak(files, T)] for T in WEAK),
        *([f"## Strong scaling, {whole:,} bytes in all", "", *_strong(files, whole)] for whole in STRONG),
        ["## Launched kernel by kernel", "", *_launched(files)],
        *([["## Links", "", *_links(links)]] if links else []),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _bar(files: list[Times]) -> Iterator[str]:
    yield from ("| asked | measured: one GPU | in turns | |", "|---|---|---|---|")
    times = next((times for times in files if times.weak(2, MAIN, STACK)), Times({}))
    shares = times.weak(2, MAIN, STACK), times.weak(2, MAIN, STACK, in_turns=True)
    measured = [share for share in shares if share is not None]
    verdict = "not measured" if not measured else "met" if min(measured) >= BAR else "missed"
    figures = " | ".join(map(_share, shares))
    yield f"| sequence parallel, weak scaling on 2 GPUs, {MAIN:,} bytes each: >= {BAR:.0%} | {figures} | {verdict} |"


def _weak(files: list[Times], T: int) -> Iterator[str]:
    yield from (f"| {' | '.join(_WEAK)} |", f"|{'---|' * len(_WEAK)}")
    for times in files:
        for ranks, steps, form in times.replayed():
            us, same = times.step(ranks, T, form), times.step(ranks, T, ALONE)
            if us and steps == T and (form != ALONE or ranks == 1):
                history, gradients = bytes_sent(form, ranks, T, DIM, ITEMSIZE)
                seen = _seen(times.exchanged(2 if form == ALONE else ranks, T, form))
                shares = " | ".join(_share(times.weak(ranks, T, form, in_turns)) for in_turns in (False, True))
                yield (
                    f"| {ranks} | {form} | {us:,.0f} | {ranks * T / us * 1e6:,.0f} | {shares} "
                    f"| {f'{same:,.0f} us' if same else ''} | {history:,} | {gradients:,} | {seen} |"
                )


def _seen(us: tuple[float, float, float] | None) -> str:
    if us is None:
        return "| |"
    total, hidden, others = us
    return f"{total:.0f} us | {hidden / total if total else 0:.0%} | {others:,.0f} us"


def _strong(files: list[Times], whole: int) -> Iterator[str]:
    yield from ("| GPUs | bytes each | exchange | us a step | tokens/s | times one GPU | a GPU |", f"|{'---|' * 7}")
    for times in files:
        for ranks, T, form in times.replayed():
            us, share = times.step(ranks, T, form), times.strong(ranks, whole, form)
            if us and share and T * ranks == whole and (form != ALONE or ranks == 1):
                yield f"| {ranks} | {T:,} | {form} | {us:,.0f} | {whole / us * 1e6:,.0f} | {share * ranks:.2f} | {share:.1%} |"


def _launched(files: list[Times]) -> Iterator[str]:
    """Where the host, and not the GPU, is what a step waits for."""
    yield from (f"| GPUs | exchange | us a step of {MAIN:,} bytes a GPU |", "|---|---|---|")
    for times in files:
        for how, ranks, steps, form in times.rows:
            if how == "launched" and steps == MAIN:
                yield f"| {ranks} | {form} | {times.step(ranks, steps, form, how):,.0f} |"


def _links(links: list[dict[str, Any]]) -> Iterator[str]:
    """A message is half of "two messages"; GB/s are the whole's bytes over the time."""
    halves = [line | {"name": "message", "us": line["us"] / 2} if line["name"] == "two messages" else line for line in links]
    sizes = sorted({line["bytes"] for line in halves})
    yield f"| GPUs | us of | {' | '.join(f'{size:,} bytes' for size in sizes)} | GB/s |"
    yield f"|{'---|' * (len(sizes) + 3)}"
    for ranks, name in dict.fromkeys((line["ranks"], line["name"]) for line in halves):
        us = {line["bytes"]: line["us"] for line in halves if (line["ranks"], line["name"]) == (ranks, name)}
        rate = max(us) / us[max(us)] / 1e3
        yield f"| {ranks} | {name} | {' | '.join(f'{us[size]:.1f}' if size in us else '' for size in sizes)} | {rate:.0f} |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="those of one machine")
    paths = parser.parse_args().files
    machine, files, links = read(paths)
    folder = FOLDER / machine["slug"]
    folder.mkdir(exist_ok=True)
    text = report(machine, files, links)
    (folder / "scaling.md").write_text(text, encoding="utf-8")
    stored = [f'"{path.stem}": [\n' + ",\n".join(path.read_text(encoding="utf-8").splitlines()) + "\n]" for path in paths]
    (folder / "scaling.json").write_text("{" + ",\n".join(stored) + "}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
