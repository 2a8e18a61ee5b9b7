"""Initial values of logical weights by name: drawn from a key, or read from a local folder.

Both are pure functions of (name, shape), so no value depends on world size, backend or order.
"""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectral_scale.errors import ConfigError
from spectral_scale.ops.keyed_random import keyed_generator

INIT_STD = 0.02
"""Standard deviation of matrices and embeddings, as transformers initialises OPT and LLaMA."""


class InitialWeights(Protocol):
    """Where a run's initial dense weights come from."""

    def get(self, fqn: str, shape: tuple[int, ...]) -> Tensor:
        """The float32 CPU value of one dense weight."""


class KeyedWeights:
    """Freshly drawn: N(0, 0.02) for matrices, ones for norms, zeros for biases."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def get(self, fqn: str, shape: tuple[int, ...]) -> Tensor:
        """A function of (seed, fqn, shape) alone."""
        if fqn.endswith(".bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        generator = keyed_generator(self.seed, "initial weight", fqn)
        return torch.empty(shape).normal_(0.0, INIT_STD, generator=generator)


class FolderWeights:
    """Read from a transformers folder of safetensors files; pickled weights are refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _weight_map(folder)

    def get(self, fqn: str, shape: tuple[int, ...]) -> Tensor:
        """The stored tensor in float32. Raises ConfigError if it is missing or of another shape."""
        name = next((n for n in (fqn, fqn.removeprefix("model.")) if n in self._file_of), None)
        if name is None:
            raise ConfigError(f"model.path={self.folder} holds no weight {fqn}; check the folder")
        with safe_open(self._file_of[name], framework="pt") as file:
            value: Tensor = file.get_tensor(name)
        if tuple(value.shape) != shape:
            raise ConfigError(
                f"model.path={self.folder}: {name} has shape {tuple(value.shape)}, "
                f"the configuration asks for {shape}"
            )
        return value.float()


def _weight_map(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: _confined(folder, file) for name, file in names.items()}
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"model.path={folder}: weights cannot be read: {error}") from None
    raise ConfigError(
        f"model.path={folder} holds no model.safetensors; pickled weights are not loaded, "
        "convert them with save_pretrained(safe_serialization=True)"
    )


def _confined(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if path.parent != folder.resolve() or not path.is_file():
        raise ConfigError(f"{folder}: the weight index names {name!r}, not a file of this folder")
    return path
