"""`report.md` and its pictures from a run's `bench.json`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bench import pictures
from bench.bars import bars, geometric_mean
from bench.grid import DILATIONS, OPS, PAPER_FORMS, PAPER_SHAPES, PYTORCH_FORMS, Shape, cases
from bench.results import FOLDER, Run, slug

LABELS = {
    "ours": "ours",
    "module": "CausalConv1d",
    "gemm": "GEMM (a bound)",
    "conv1d_pad": "F.conv1d + F.pad",
    "conv1d_trim": "F.conv1d, trimmed",
    "conv2d_pad": "conv2d channels_last + F.pad",
    "conv2d_trim": "conv2d channels_last, trimmed",
    "shifted": "K shifted GEMMs",
    "compiled": "torch.compile of F.conv1d + F.pad",
    "conv2d_pad_searched": "conv2d + F.pad, cudnn.benchmark",
    "conv2d_trim_searched": "conv2d, trimmed, cudnn.benchmark",
    "listing1": "Listing 1, tile 32",
    "naive": "naive Triton",
}
_TITLES = {
    "forward": "Forward",
    "input_grad": "Input-grad",
    "weight_grad": "Weight-grad with bias-grad",
    "forward_backward": "Forward + backward",
}
_METHOD = """\
Shapes are `BxTxC_K_d` (`C_in`to`C_out` where they differ). On a GPU a time is the median replay of a captured graph of at least 32 calls,
by the device's clock, divided by the calls; the calls rotate over more fresh random data than the L2 holds, and no two copies share their
outputs. Every row was first compared with the reference in fp64. A rival holds its inputs in the layout that suits it, and its weight in
its own order of taps; ours takes the weight as `CausalConv1d` keeps it. What a call needs beyond that, for ours the packing too, is inside
its time. GB/s count each input read once and each output written once; the roofline is the larger of that over the copy's bandwidth and
the operations over the product's rate. F.conv1d and conv2d run with PyTorch's default switches, those marked cudnn.benchmark with cuDNN's
own search. Rows in fp16 and of each dilation were replayed in turns with the row that a bar holds them against, so that both ran at one
clock; by itself fp16, whose random data draw more power, may run at a lower one. torch.compile runs in mode
max-autotune-no-cudagraphs, since the timer captures every rival in a graph."""


def write(path: Path) -> str:
    """Write `report.md` and the pictures beside `path`, a bench.json. Returns the table of bars, or of a CPU the whole report."""
    run = Run.load(path)
    on_gpu = run.gpu is not None
    drawn = pictures.draw(run, path.parent) if on_gpu else []
    sections = [_head(run), *([_bars(run)] if on_gpu else []), *_main(run), *_sections(run), _slower(run), _missing(run)]
    sections += [f"![{picture.stem}]({picture.name})" for picture in drawn]
    text = "\n\n".join(section for section in sections if section) + "\n"
    (path.parent / "report.md").write_text(text, encoding="utf-8")
    return _bars(run) if on_gpu else text


def _head(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
    lines = [f"# Throughput on {run.gpu or 'the CPU'}", "", f"{run.date}, commit {(run.commit or 'unknown')[:12]}; {versions}.", ""]
    if run.ceilings:
        product, copy = run.ceilings["flops"] / 1e12, run.ceilings["bandwidth"] / 1e12
        lines += [
            f"Ceilings in this run: {product:.0f} TFLOP/s (8192^3 product in bf16), {copy:.2f} TB/s (2 GiB copy, read plus write).",
            "",
        ]
    else:
        lines += ["Ours is plain PyTorch here, the reference: these figures say that the bench runs, not how fast the kernels are.", ""]
    return "\n".join([*lines, _METHOD])


def _bars(run: Run) -> str:
    return "## The bars\n\n" + table(("what", "bar", "measured", "verdict"), bars(run))


# ---- bf16, channels-last


def _main(run: Run) -> Iterator[str]:
    for op in OPS:
        shapes = _shapes(run, "main", op)
        if shapes:
            yield f"## {_TITLES[op]}\n\n" + _figures(run, "main", op, shapes)
            yield _rivals(run, "main", op, shapes)
    if _shapes(run, "main", "forward", "naive"):
        yield "## The paper's Table 1: tokens/s, forward\n\n" + _paper(run)


def _figures(run: Run, section: str, op: str, shapes: Sequence[Shape]) -> str:
    """Ours, in all units."""
    header = ("shape", "us", "tokens/s", "TFLOP/s", "GB/s", "of the roofline", "relative error")
    lines = []
    for shape in shapes:
        if row := run.get(section, op, "ours", shape):
            share = "" if row.roofline_share is None else f"{row.roofline_share:.2f}"
            figures = (f"{row.microseconds:.1f}", f"{row.tokens_per_s / 1e6:.4g} M", f"{row.tflops:.3g}", f"{row.gb_per_s:.4g}")
            lines.append((str(shape), *figures, share, f"{row.error:.1e}"))
    return table(header, lines)


def _rivals(run: Run, section: str, op: str, shapes: Sequence[Shape], ours_in: str | None = None) -> str:
    """Each rival's time, and how many times ours it is; `ours_in` is the section of ours where it is another."""
    columns = [name for name in LABELS if name != "ours" and any(run.time(section, op, name, shape) for shape in shapes)]
    times = {(shape, name): run.time(section, op, name, shape) for shape in shapes for name in columns}
    ours = {shape: run.time(ours_in or section, op, "ours", shape) for shape in shapes}
    ratios = {key: time / own for key, time in times.items() if time and (own := ours[key[0]])}
    lines = []
    for shape in shapes:
        cells = (_with_ratio(times[shape, name], ratios.get((shape, name))) for name in columns)
        lines.append((str(shape), _microseconds(ours[shape]), *cells))
    means = [geometric_mean(ratio for (_, name), ratio in ratios.items() if name == column) for column in columns]
    last = ("geometric mean of its ratios", "", *(f"{mean:.2f}x" if mean else "" for mean in means))
    header = ("us, and times ours", "ours", *(LABELS[name] for name in columns))
    return table(header, [*lines, last])


def _paper(run: Run) -> str:
    names = [*reversed(PAPER_FORMS), "ours"]
    lines = []
    for shape in PAPER_SHAPES:
        rows = [run.get("main", "forward", name, shape) for name in names]
        lines.append((str(shape), *(f"{row.tokens_per_s / 1e6:.4g} M" if row else "" for row in rows)))
    return table(("shape", *(LABELS[name] for name in names)), lines)


# ---- the smaller sections


def _sections(run: Run) -> Iterator[str]:
    op = "forward_backward"
    if shapes := _shapes(run, "channels_first", op):
        yield "## Channels-first contiguous input: forward + backward\n\n" + _rivals(run, "main", op, shapes, ours_in="channels_first")
    yield from _pair(run, "fp16", "fp16: ours beside ours in bf16", _beside_bf16)
    yield from _pair(run, "tf32", "fp32 with TF32", _rivals)
    yield from _pair(run, "fp32", "fp32, strict", _rivals)
    yield from _pair(run, "dilation", f"Dilation from 1 to {DILATIONS[-1]}", _figures)
    if shapes := _shapes(run, "length", op):
        yield "## Length: forward + backward\n\n" + _rivals(run, "length", op, shapes)
    yield from _pair(run, "host", "Host: microseconds until an eager call returns", _rivals)


def _pair(run: Run, section: str, title: str, body: Callable[..., str]) -> Iterator[str]:
    for op in ("forward", "forward_backward"):
        if shapes := _shapes(run, section, op):
            yield f"## {title}: {_TITLES[op].lower()}\n\n" + body(run, section, op, shapes)


def _beside_bf16(run: Run, section: str, op: str, shapes: Sequence[Shape]) -> str:
    lines = []
    for shape in shapes:
        half, bf16 = run.time(section, op, "ours", shape), run.beside(section, op, shape)
        lines.append((str(shape), _microseconds(half), _microseconds(bf16), f"{half / bf16:.3f}" if half and bf16 else ""))
    return table(("shape", "us", "bf16's us", "ratio"), lines)


# ---- what hurts


def _slower(run: Run) -> str:
    """Every row in which a rival, or the bound, took less time than ours."""
    lines = []
    for row in run.rows.values():
        case = row.case
        ours = run.time(case.section, case.op, "ours", case.shape)
        if case.rival in (*PYTORCH_FORMS, *PAPER_FORMS, "gemm") and ours and row.microseconds < ours:
            lines.append((case.section, case.op, str(case.shape), LABELS[case.rival], f"{row.microseconds:.1f}", f"{ours:.1f}"))
    slower = table(("section", "op", "shape", "which", "its us", "our us"), lines) if lines else "Nowhere."
    return "## Where ours is slower than something\n\n" + slower


def _missing(run: Run) -> str:
    missing = Counter((case.section, case.op, case.rival) for case in run.missing())
    total = len(cases(on_gpu=run.gpu is not None))
    if not missing:
        return f"All {total} rows of the grid were measured."
    lines = [(*key, str(count)) for key, count in sorted(missing.items())]
    return f"## Not measured\n\nDeselected or failed, of {total} rows:\n\n" + table(("section", "op", "rival", "rows"), lines)


# ---- tables


def _shapes(run: Run, section: str, op: str, rival: str = "ours") -> list[Shape]:
    """The shapes of the grid's rows that were measured."""
    wanted = [case for case in cases(on_gpu=run.gpu is not None) if case[:3] == (section, op, rival)]
    return [case.shape for case in wanted if case[:4] in run.rows]


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _with_ratio(time: float | None, ratio: float | None) -> str:
    return _microseconds(time) + (f" ({ratio:.2f}x)" if ratio else "")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


if __name__ == "__main__":
    print(write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / slug() / "bench.json"))
