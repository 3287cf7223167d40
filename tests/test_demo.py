"""`fuzzytok demo`, run as a user runs it but on a small model and a short text."""

import io
import math
import random
import re
import sys

import pytest
import torch
from modes import INTERPRETED

from fuzzytok_kernels import FuzzyTokenizer, demo
from fuzzytok_kernels.cli import main
from fuzzytok_kernels.nn import language_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="some 500 training steps: too long through Triton's interpreter")


@pytest.fixture
def small(monkeypatch):
    """Some 280 training steps of a second or two in all, not ended by the clock."""
    size = demo._Size(dim=16, batch=4, length=64, timed_length=64)
    monkeypatch.setattr(demo, "_SIZES", {"cpu": size, "cuda": size})


@pytest.fixture
def file(tmp_path):
    """4,000 bytes, not all of them UTF-8, that an order-1 model predicts far better than their frequencies do."""
    words = [b"causal ", b"dilated ", b"na\xefve ", b"\x00\xff\n"]
    path = tmp_path / "text.bin"
    path.write_bytes(b"".join(random.Random(0).choices(words, k=1000))[:4000])
    return path


def run(capsys, *arguments: str) -> tuple[int, str]:
    status = main(["demo", *arguments])
    return status, capsys.readouterr().out


def test_demo_shows_what_it_promises(small, file, capsys):
    status, out = run(capsys, "--file", str(file), "--text", "tëxt", "--seconds", "600")
    assert status == 0
    assert "3,600 bytes to train on, the 400 after them held out" in out
    assert re.search(r"281 steps of 2 x 64 bytes in \d+ s, 10\.0 times the text", out)
    bits = {name: float(value) for value, name in re.findall(r"^ +(\d+\.\d{3})  (.*)$", out, re.MULTILINE)}
    assert list(bits) == [
        "FuzzyTok",
        "byte unigrams, counted in the training part",
        "xz, the held-out part alone",
        "xz, what the held-out part adds behind the training part",
    ]
    assert bits["FuzzyTok"] < 0.7 * bits["byte unigrams, counted in the training part"]
    assert out.count("outputs before are bit-identical, those from there on differ") == 3
    assert re.search(r"^ +[\d,]+  fuzzytok_kernels$", out, re.MULTILINE)
    assert re.search(r"^ +[\d,]+  F\.conv1d\(F\.pad\(x\)\)$", out, re.MULTILINE)
    assert "encode     'tëxt': 5 bytes -> z (1, 5, 16)" in out
    sample = out.partition("sample     behind ")[2]
    assert len(sample) > 300
    assert sample.count("causal") + sample.count("dilated") >= 10
    assert re.search(r"\(300 bytes in \d+\.\d s\)\n$", sample)


def test_training_ends_when_its_time_is_up(small, file, capsys):
    _, out = run(capsys, "--file", str(file), "--seconds", "0.01")
    steps = re.search(r"trained    (\d+) steps", out)
    assert steps is not None
    assert 1 <= int(steps[1]) < 100


class Leaky(FuzzyTokenizer):
    def forward(self, ids):
        return super().forward(ids) + 1e-6 * ids.float().mean()


class Deaf(FuzzyTokenizer):
    def forward(self, ids):
        return super().forward(torch.zeros_like(ids))


@pytest.mark.parametrize(("broken", "said"), [(Leaky, "before are DIFFERENT"), (Deaf, "from there on THE SAME")])
def test_a_model_that_fails_the_causality_check_fails_the_demo(broken, said, small, file, capsys, monkeypatch):
    monkeypatch.setattr(language_model, "FuzzyTokenizer", broken)
    status, out = run(capsys, "--file", str(file), "--seconds", "0.01")
    assert status == 1
    assert said in out


def test_the_rival_is_the_same_model(device):
    tokenizer = FuzzyTokenizer(dim=16).to(device)
    ids = torch.randint(256, (2, 50), device=device)
    torch.testing.assert_close(demo._PaddedConv1dTokenizer(tokenizer)(ids), tokenizer(ids), atol=1e-2, rtol=1e-2)


def test_unigram_bits_are_add_one_smoothed():
    assert demo._unigram_bits(b"aabb", b"aaaa") == pytest.approx(math.log2(260 / 3))
    assert demo._unigram_bits(b"aabb", b"c") == pytest.approx(math.log2(260))


def test_a_long_file_is_cut_and_that_is_said(small, file, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_LONGEST", 3000)
    _, out = run(capsys, "--file", str(file), "--seconds", "0.01")
    assert f"the first 3,000 bytes of {file}: 2,700 bytes to train on" in out


@pytest.mark.parametrize("text", ["", "\udcff", "'\"$PATH\n"], ids=ascii)
def test_any_text_is_encoded(text, small, file, capsys):
    status, out = run(capsys, "--file", str(file), "--text", text, "--seconds", "0.01")
    assert status == 0
    assert f"encode     {text!r}" in out


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_a_terminal_cannot_show_is_replaced(encoding, small, file, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["demo", "--file", str(file), "--text", "日本", "--seconds", "0.01"]) == 0
    out.seek(0)
    assert "encode     '??': 6 bytes" in out.read()


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_errors_are_one_line(tmp_path, capsys):
    short = tmp_path / "short"
    short.write_bytes(b"short")
    assert refused(capsys, "demo", "--file", str(short)).endswith("short has 5 bytes; expected at least 2000")
    assert "No such file" in refused(capsys, "demo", "--file", str(tmp_path / "none"))
    assert "Is a directory" in refused(capsys, "demo", "--file", str(tmp_path))
    assert refused(capsys, "demo", "--seconds", "0").endswith("--seconds is 0.0; expected more than 0")
    assert "invalid choice: 'dance'" in refused(capsys, "dance")


@pytest.mark.parametrize(("arguments", "said"), [(["--help"], "demo"), (["demo", "--help"], "--file FILE")], ids=str)
def test_help(arguments, said, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 0
    assert said in capsys.readouterr().out
