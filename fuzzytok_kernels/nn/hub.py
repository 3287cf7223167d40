"""Models in folders: weights as safetensors and the config as JSON, by huggingface_hub's mixin (the extra `hub`). Nothing is unpickled."""

import functools
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

FORMAT = 1  # of the folder: the names in config.json and in model.safetensors
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_Model = TypeVar("_Model", bound="Pretrained")


class Pretrained:
    """`save_pretrained` and `from_pretrained` for an nn.Module whose `config` are the arguments that make it anew, all of them JSON."""

    model_type: str
    config: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike, **options: Any) -> None:
        """Write the weights, in the one dtype that they have, the config, and a README.md if there is none to `folder`, which is made if
        need be.

        `options` are those of `huggingface_hub.PyTorchModelHubMixin.save_pretrained`: push_to_hub, repo_id, model_card_kwargs.

        Raises:
            ValueError: weights of several dtypes, or others than those of a model that `config` makes: it could not be loaded.
            ImportError: huggingface_hub or safetensors is not installed.
        """
        kind: Any = type(self)
        saver = object.__new__(_with_hub(kind))  # this very model, with the mixin's methods
        saver.__dict__ = self.__dict__
        saver.save_pretrained(folder, **options)

    @classmethod
    def from_pretrained(cls: type[_Model], folder: str | os.PathLike, **options: Any) -> _Model:
        """The model that `save_pretrained` wrote to `folder`, in its dtype, on the CPU, in eval mode; or one from the Hugging Face Hub.

        `options` are for the Hub, see `huggingface_hub.PyTorchModelHubMixin.from_pretrained`: revision, token, cache_dir, force_download
        and local_files_only. The model's own arguments are those in the folder.

        Raises:
            TypeError: another option.
            ValueError: a folder that lacks a file, or holds a broken one, or another model's, or one of a newer format; no folder, and no
                repository that the Hub has or can be asked for.
            ImportError: huggingface_hub or safetensors is not installed.
        """
        for name in options.keys() - set(_OPTIONS):  # the mixin would take it for an argument of the model, and nobody would see it
            raise TypeError(f"{name} is no option of from_pretrained; expected one of {', '.join(_OPTIONS)}")
        kind: Any = cls
        return _with_hub(kind).from_pretrained(folder, **options)


@functools.cache
def _with_hub(cls: type) -> Any:
    """`cls` with huggingface_hub's mixin, which takes most of a second to import: not before it is asked for."""
    try:
        import safetensors  # noqa: F401  # the mixin imports it late
        from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{error}; saving and loading need the extra `hub`: pip install 'fuzzytok_kernels[hub]', or '.[hub]' in its own folder"
        ) from error

    class WithHub(PyTorchModelHubMixin, cls, library_name="fuzzytok_kernels"):  # type: ignore[misc,call-arg]
        def _save_pretrained(self, save_directory: Path) -> None:
            _save(self, save_directory)

        @classmethod
        def _from_pretrained(cls_with_hub, *, model_id: str, revision: Any, cache_dir: Any, force_download: bool, local_files_only: bool,
                             token: Any, **_: Any) -> Any:  # fmt: skip
            if os.path.isdir(model_id):
                return _load(cls, Path(model_id))
            download = functools.partial(
                hf_hub_download, model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, token=token,
            )  # fmt: skip
            folders = {Path(download(filename=name)).parent for name in (_CONFIG, _WEIGHTS)}
            return _load(cls, folders.pop())

        @classmethod
        def from_pretrained(cls_with_hub, folder: Any, **options: Any) -> Any:  # type: ignore[override]
            if os.path.isdir(folder):  # the mixin reads the config before it asks us
                return _load(cls, Path(folder))
            try:
                if isinstance(folder, os.PathLike):
                    raise HFValidationError("a path names none")
                return super().from_pretrained(folder, **options)
            except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
                raise ValueError(
                    f"folder is {os.fspath(folder)!r}, which is no folder; expected what {cls.__name__}.save_pretrained wrote, "
                    f"or the name of a repository on the Hugging Face Hub ({_first_line(error)})"
                ) from error

    return WithHub


def _save(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: value.detach().contiguous() for name, value in _own_weights(model).items()}  # a tap-major weight is not contiguous
    dtypes = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    if len(dtypes) != 1:
        raise ValueError(f"the weights have the dtypes {', '.join(sorted(dtypes))}; expected one, which the model has when it is loaded")
    (dtype,) = dtypes
    with torch.device("meta"):  # shapes alone
        wrong = _misfit(weights, _own_weights(type(model)(**model.config)))
    if wrong:
        raise ValueError(f"the weights are not those that config makes, and could not be loaded: {wrong}")
    config = {"model_type": model.model_type, "format": FORMAT, "dtype": dtype, **model.config}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _load(cls: Any, folder: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _read_config(cls, folder)
    dtype = config.pop("dtype", "float32")
    try:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
        model = cls(**config).to(getattr(torch, dtype))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / _CONFIG} makes no {cls.__name__}: {_first_line(error)}") from error
    try:
        weights = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / _WEIGHTS} cannot be read: {_first_line(error)}") from error
    wrong = _misfit(weights, _own_weights(model))
    if wrong:
        raise ValueError(f"{folder / _WEIGHTS} does not fit {_CONFIG}: {wrong}")
    model.load_state_dict(weights, strict=False)  # copies into what is there, tap-major as it lies; all but tied names were compared
    return model.eval()


def _read_config(cls: Any, folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: nested too deep
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error
    found = config.pop("model_type", None) if isinstance(config, dict) else None
    if found != cls.model_type:
        raise ValueError(f"{path} is of model_type {found!r}; expected {cls.model_type!r}, that of a {cls.__name__}")
    version = config.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version!r}; expected {FORMAT}, which this version of fuzzytok_kernels reads and writes")
    return config


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the second name of a tied weight."""
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if all(value is not other for other in weights.values()):
            weights[name] = value
    return weights


def _misfit(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The first name, and how many, of which one has no weight or another shape than the other; None if there is none."""
    wrong = sorted({name for name in expected.keys() | weights.keys() if _shape(expected.get(name)) != _shape(weights.get(name))})
    if not wrong:
        return None
    had, wanted = _shape(weights.get(wrong[0])), _shape(expected.get(wrong[0]))
    return f"{wrong[0]} is {had or 'missing'}, expected {wanted or 'no such weight'} ({len(wrong)} such weights)"


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
