"""`fuzzytok explain` and `fuzzytok info`: what they say of a look-up, for GPUs that are there and that are not."""

import json
import re

import pytest
import torch
from places import CONFIG, GENERIC, GPU, OP, PROBLEM, SIBLING

from fuzzytok_kernels.cli import main
from fuzzytok_kernels.tuning import hashes, store
from fuzzytok_kernels.tuning.gpu import Gpu

SHAPE = ["--op", OP, "--shape", "32,2048,256,256,3"]


def explained(capsys, *arguments: str) -> str:
    assert main(["explain", *SHAPE, *arguments]) == 0
    return capsys.readouterr().out


def test_explain_what_serves(places, capsys):
    path = places.put(places.cache, 2, problem=PROBLEM._replace(c_in=128), time_us=41.7, default_us=45.0)
    text = explained(capsys)
    assert re.search(
        rf"served by +{re.escape(str(path))}\nentry +K=3 C_in=128 C_out=256 B\*T=65536\nits time .*\nconfig .*num_stages=2", text
    )
    assert "41.7 us, the default's 45.0 us" in text
    assert "nearest K=3 C_in=128 C_out=256 B*T=65536: 1.00 doublings away" in text
    assert "no such file" in text
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "versions": {**content["versions"], "triton": "3.0.0"}}))
    assert "version   triton was 3.0.0, is " in explained(capsys)
    path.write_text(json.dumps({**content, "versions": None}))
    assert "version   torch was None, is " in explained(capsys)


def test_explain_says_why_not_field_by_field(places, capsys):
    content = json.loads(places.put(places.own, 1).read_text())
    content |= {"kernel_hash": "old", "space_hash": "older"}
    store.path_of(places.own, GPU, OP).write_text(json.dumps(content))
    places.put(places.cache, 2, problem=PROBLEM._replace(dtype="tf32"))
    places.put(places.shipped, 3).write_text("{")
    places.put(places.shipped, 4, SIBLING, shared=1 << 30)
    text = explained(capsys)
    assert f"kernel_hash is 'old', expected '{hashes.kernel_hash(OP)}'" in text
    assert f"space_hash is 'older', expected '{hashes.space_hash()}'" in text
    assert "dtype is 'tf32', expected '16 bits'" in text
    assert "Expecting property name" in text
    assert "shared memory is 1,073,741,824 bytes, expected at most 232,448" in text
    assert "default config" in text
    assert "to tune it  fuzzytok warmup --op causal_conv1d --shape 1,65536,256,256,3 --dtype bf16 --layout last --dilation 1" in text


def test_explain_for_a_gpu_that_is_not_there(places, capsys, monkeypatch):
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda device: None))
    places.put(places.shipped, 4, SIBLING)
    ampere = CONFIG._replace(path="pointer", num_stages=5)
    places.put(places.shipped, 5, GENERIC._replace(arch="sm80"), PROBLEM._replace(aligned=False), config=ampere)
    assert "num_stages=4" in explained(capsys, "--gpu", SIBLING.name)
    assert "num_stages=5" in explained(capsys, "--gpu", "sm80")
    for arguments in (["--gpu", "Voodoo 2"], []):
        with pytest.raises(SystemExit) as exit:
            main(["explain", *SHAPE, *arguments])
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert "known are: NVIDIA A100" in error
        assert error.endswith("sm80, Fake GPU 9000 Ti\n")


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"gpu": {"name": "Odd", "arch": "smXY", "sm_count": 0, "shared_memory": 0}}'], ids=len
)
def test_a_broken_file_is_not_in_the_way(text, places, capsys):
    path = places.put(places.shipped, 3)
    store.path_of(places.own, GPU._replace(name="Odd"), OP).parent.mkdir(parents=True)
    store.path_of(places.own, GPU._replace(name="Odd"), OP).write_text(text)
    assert f"served by   {path}" in explained(capsys, "--gpu", GPU.name)
    with pytest.raises(SystemExit):
        main(["explain", *SHAPE, "--gpu", "Odd"])
    assert "known are: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_looked_at_is_not_in_the_way(places, capsys, monkeypatch):
    path = places.put(places.shipped, 3)
    monkeypatch.setenv("FUZZYTOK_TUNING_DIR", "x" * 5000)  # an OSError for root too, whom no permissions stop
    assert f"served by   {path}" in explained(capsys, "--gpu", GPU.name)
    assert main(["info"]) == 0
    assert "xxx (does not exist)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["--op", OP], ["--shape", "1,2,3,4,5"], [*SHAPE[:2], "--shape", "1,2,3"], [*SHAPE, "--dilation", "0"]], ids=str
)
def test_explain_refuses_half_a_problem(arguments, places, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["explain", *arguments])
    assert exit.value.code != 0


def test_info(places, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places.put(places.own, 1), places.put(places.shipped, 4, SIBLING), places.put(places.shipped, 5, GENERIC)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "gpu 1      Fake GPU 9000 (sm90, 132 multiprocessors" in text
    assert f"torch {torch.__version__}" in text
    assert f"the user's cache: {places.cache} (does not exist)" in text
    assert text.count("causal_conv1d: 1 of Fake GPU 9000, 1 of other sm90 GPUs, 1 defaults of sm90") == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info"]) == 0
    assert "gpu        none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("", "--model is ''; expected MODULE:CALLABLE"),
        ("os", "--model is 'os'; expected MODULE:CALLABLE"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("os:nothing", "has no attribute 'nothing'"),
        ("os:sep", "os:sep is a str; expected what can be called without arguments"),
        ("os:getcwd", "nothing in os:getcwd ran an op that is tuned; does it run on the GPU?"),
    ],
)
def test_warmup_refuses_a_model_by_name(model, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as exit:
        main(["warmup", "--model", model])
    assert exit.value.code != 0
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_error_inside_a_model_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(store, "model", lambda: None.forward, raising=False)
    with pytest.raises(AttributeError, match="forward"):
        main(["warmup", "--model", f"{store.__name__}:model"])
