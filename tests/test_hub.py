"""Models in folders, and in front of a Hugging Face model."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from modes import not_interpreted

from fuzzytok_kernels import ByteLM, FuzzyTokenizer, ResidualCausalBlock, pool, segments_from_starts, unpool
from fuzzytok_kernels.cli import main
from fuzzytok_kernels.nn import hub

pytestmark = not_interpreted
MODELS = {
    "a language model": lambda: ByteLM(16, dilations=(1, 2), num_special=1),
    "a tied one": lambda: ByteLM(16, 2, dilations=range(1, 3), activation="relu", tied=True),
    "a tokenizer": lambda: FuzzyTokenizer(16, dilations=(1, 2), embedding_dim=24),
    "a tokenizer with a gate": lambda: FuzzyTokenizer(16, dilations=[3], activation="glu", num_special=4),
}
KEYS = [
    "tokenizer.embedding.weight",
    "tokenizer.norm.weight",
    "tokenizer.norm.bias",
    "tokenizer.blocks.0.conv.weight",
    "tokenizer.blocks.0.conv.bias",
    "head.weight",
    "head.bias",
]


@pytest.fixture
def needs_hub():
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")


@pytest.fixture
def saved(needs_hub, tmp_path):
    ByteLM(16, dilations=(1,)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_there_and_back(make, dtype, needs_hub, tmp_path):
    model = make().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    model.save_pretrained(tmp_path / "deep" / "folder")
    assert torch.equal(torch.get_rng_state(), drawn), "a save in the middle of a training changes it"
    loaded = type(model).from_pretrained(tmp_path / "deep" / "folder")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, before[name])
        assert torch.equal(model.state_dict()[name], before[name])
    layouts = [[block.conv.weight.stride() for block in getattr(m, "tokenizer", m).blocks] for m in (model, loaded)]
    assert layouts[0] == layouts[1]
    assert not getattr(loaded, "tokenizer", loaded).blocks[0].conv.weight.is_contiguous(), "the kernels' own layout"
    if getattr(model, "config", {}).get("tied"):
        assert loaded.head.weight is loaded.tokenizer.embedding.weight


def test_what_lies_in_the_folder(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((saved / "config.json").read_text()) == {
        "model_type": "fuzzytok_byte_lm",
        "format": 1,
        "dtype": "float32",
        "dim": 16,
        "kernel_size": 3,
        "dilations": [1],
        "activation": "gelu",
        "num_special": 0,
        "tied": False,
    }


def test_the_keys_are_stable(saved):
    from safetensors.torch import load_file

    assert list(ByteLM(16, dilations=(1,)).state_dict()) == KEYS
    assert sorted(load_file(saved / "model.safetensors")) == sorted(KEYS)
    tokenizer = FuzzyTokenizer(16, dilations=(1,), embedding_dim=8)
    assert list(tokenizer.state_dict()) == [
        *(key.removeprefix("tokenizer.") for key in KEYS if key.startswith("tokenizer.")),
        "projection.weight",
        "projection.bias",
    ]
    assert hub.FORMAT == 1, "a change of the keys is a new format"
    assert {part["version"] for part in tokenizer.state_dict()._metadata.values()} == {1}, "and a new version of the module"


def test_saved_again_in_the_same_folder(saved):
    model = ByteLM(8, dilations=(1,))
    model.save_pretrained(saved)
    assert torch.equal(ByteLM.from_pretrained(saved).head.weight, model.head.weight)


def test_from_the_hub(saved, monkeypatch):
    """What would be downloaded: the two files, nothing that is unpickled."""
    import huggingface_hub

    asked = []

    def download(repo_id: str, filename: str, **options) -> str:
        asked.append((repo_id, filename))
        return str(saved / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", lambda **options: download(**options))
    hub._with_hub.cache_clear()
    model = ByteLM.from_pretrained("someone/a-model", revision="main")
    hub._with_hub.cache_clear()
    assert model.config["dim"] == 16
    assert set(asked) == {("someone/a-model", "config.json"), ("someone/a-model", "model.safetensors")}


# ---- what is refused


def config_with(**changes):
    def change(folder) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def weights_of(model):
    def change(folder) -> None:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")

    return change


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config.json cannot be read: .*No such file"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config.json cannot be read: Expecting"),
    "no UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff"), r"config.json cannot be read: .*utf-8"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), r"model_type None; expected 'fuzzytok_byte_lm'"),
    "a foreign model": (
        config_with(model_type="bert"),
        r"config.json is of model_type 'bert'; expected 'fuzzytok_byte_lm', that of a ByteLM",
    ),
    "a tokenizer": (lambda folder: FuzzyTokenizer(16).save_pretrained(folder), r"model_type 'fuzzytok'; expected 'fuzzytok_byte_lm'"),
    "a newer format": (config_with(format=2), r"config.json is of format 2; expected 1, which this version"),
    "an unknown argument": (config_with(depth=3), r"config.json makes no ByteLM: .*depth"),
    "a size out of range": (config_with(kernel_size=0), r"config.json makes no ByteLM: kernel_size is 0; expected at least 1"),
    "no number": (config_with(dim="wide"), r"config.json makes no ByteLM: "),
    "no dtype": (config_with(dtype="nn"), r"config.json makes no ByteLM: dtype is 'nn'; expected one of float16, "),
    "no dtype of a model": (config_with(dtype="complex64"), r"config.json makes no ByteLM: dtype is 'complex64'; expected one of "),
    "a list for a dtype": (config_with(dtype=["float32"]), r"config.json makes no ByteLM: dtype is \['float32'\]; expected one of "),
    "nested too deep": (lambda folder: (folder / "config.json").write_text("[" * 200_000), r"config.json cannot be read: "),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors cannot be read: "),
    "half the weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        r"model.safetensors cannot be read: ",
    ),
    "a pickle": (lambda folder: torch.save({}, folder / "model.safetensors"), r"model.safetensors cannot be read: "),
    "another size": (
        weights_of(ByteLM(8, dilations=(1,))),
        r"does not fit config.json: head.weight is \(256, 8\), expected \(256, 16\) \(6 such",
    ),
    "a layer less": (weights_of(ByteLM(16, dilations=())), r"tokenizer.blocks.0.conv.bias is missing, expected \(16,\) \(2 such weights"),
    "a layer more": (weights_of(ByteLM(16, dilations=(1, 1))), r"blocks.1.conv.bias is \(16,\), expected no such weight \(2 such"),
}


@pytest.mark.parametrize(("spoil", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder(spoil, says, saved):
    spoil(saved)
    with pytest.raises(ValueError, match=says) as caught:
        ByteLM.from_pretrained(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder(saved, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(**options) -> None:
        raise LocalEntryNotFoundError("the Hub does not answer")

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", unreachable)
    for folder in (saved / "none", str(saved / "none"), saved / "config.json", "someone/a-model"):
        with pytest.raises(ValueError, match=r"^folder is '.*', which is no folder; expected what ByteLM.save_pretrained wrote") as caught:
            ByteLM.from_pretrained(folder)
        assert str(folder) in str(caught.value)


def test_weights_of_two_dtypes_are_not_saved(needs_hub, tmp_path):
    model = ByteLM(16, dilations=())
    model.tokenizer.bfloat16()
    with pytest.raises(ValueError, match="the weights have the dtypes bfloat16, float32; expected one"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: setattr(model.head, "weight", model.tokenizer.embedding.weight), r"head.weight is missing, expected \(256, 16\)"),
        (
            lambda model: model.tokenizer.blocks.__setitem__(0, ResidualCausalBlock(16, 3, norm="layer")),
            r"blocks.0.norm.bias is \(16,\), expected no such weight",
        ),
    ],
    ids=["tied by hand", "a block with a norm"],
)
def test_what_could_not_be_loaded_is_not_saved(change, says, needs_hub, tmp_path):
    model = ByteLM(16, dilations=(1,))
    change(model)
    with pytest.raises(ValueError, match=f"^the weights are not those that config makes, and could not be loaded: .*{says}"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_option_that_nobody_would_see(saved):
    for options in (dict(dim=32), dict(torch_dtype=torch.bfloat16), dict(map_location="cpu")):
        with pytest.raises(TypeError, match=f"^{next(iter(options))} is no option of from_pretrained; expected one of revision, token, "):
            ByteLM.from_pretrained(saved, **options)
    assert ByteLM.from_pretrained(saved, local_files_only=True).config["dim"] == 16


@pytest.mark.parametrize("missing", ["huggingface_hub", "safetensors"])
def test_without_the_extra(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    hub._with_hub.cache_clear()
    for call in (lambda: ByteLM(16, dilations=()).save_pretrained(tmp_path), lambda: ByteLM.from_pretrained(tmp_path)):
        with pytest.raises(ImportError, match=r"pip install 'fuzzytok_kernels\[hub\]'"):
            call()
    hub._with_hub.cache_clear()


# ---- `fuzzytok bits-per-byte`


def test_bits_per_byte_of_a_file(saved, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(b"a text, \xff and more\x00" * 50)
    assert main(["bits-per-byte", str(saved), str(file), "--device", "cpu"]) == 0
    ids = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    bits = ByteLM.from_pretrained(saved).loss(ids[None]).item()
    said = capsys.readouterr().out
    assert float(said.split()[0]) == pytest.approx(bits, abs=2e-3)
    assert said.endswith(f"bits per byte of {file} (950 bytes)\n")


def test_bits_per_byte_refuses(saved, tmp_path, capsys):
    short, good = tmp_path / "short", tmp_path / "good"
    short.write_bytes(b"a")
    good.write_bytes(b"ab")
    cases = {
        "none is no folder": [str(tmp_path / "none"), str(good)],
        "short has 1 bytes; expected at least 2": [str(saved), str(short)],
        "No such file": [str(saved), str(tmp_path / "none")],
        "config.json cannot be read": [str(tmp_path), str(good)],
    }
    for says, arguments in cases.items():
        with pytest.raises(SystemExit) as exited:
            main(["bits-per-byte", *arguments])
        assert exited.value.code == 2
        assert says in capsys.readouterr().err.splitlines()[-1]


# ---- in front of a Hugging Face model


def test_z_feeds_a_transformer(device):
    """inputs_embeds, by bytes and by words; gradients reach the tokenizer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=1, n_embd=24, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2Model(config).to(device).eval()
    tokenizer = FuzzyTokenizer(16, dilations=(1, 2), embedding_dim=24, num_special=1).to(device)
    ids, lengths = tokenizer.encode(["some words of a text", "and more"])
    steps = torch.arange(ids.shape[1], device=device)
    z = tokenizer(ids)
    h = model(inputs_embeds=z, attention_mask=(steps < lengths[:, None]).long()).last_hidden_state
    assert h.shape == (2, 20, 24)
    alone = model(inputs_embeds=tokenizer(ids[1:, :8])).last_hidden_state
    torch.testing.assert_close(h[1:, :8], alone, atol=1e-3, rtol=1e-3)

    segments = segments_from_starts(ids == ord(" "), lengths)
    words = model(inputs_embeds=pool(z, segments)).last_hidden_state
    assert words.shape == (2, 5, 24)
    logits = F.linear(z + unpool(words, segments - 1), tokenizer.projection.weight.T)
    logits.square().sum().backward()
    assert tokenizer.embedding.weight.grad.norm() > 0
