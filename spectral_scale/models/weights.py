"""Initial values of logical weights by name: drawn from a key, or read from a local folder.

Both are pure functions of (name, shape), so no value depends on world size, backend or order.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spectral_scale.errors import ConfigError
from spectral_scale.files.json_text import parse_json
from spectral_scale.ops.keyed_random import keyed_generator
from spectral_scale.parallel.shard_geometry import Rectangle
from spectral_scale.parallel.table import ParameterTable

INIT_STD = 0.02
"""Standard deviation of matrices and embeddings, as transformers initialises OPT and LLaMA."""


class InitialWeights(Protocol):
    """Source of a run's initial dense weights."""

    def get(self, fqn: str, shape: tuple[int, ...]) -> Tensor:
        """The float32 CPU value of one dense weight."""

    def part(self, fqn: str, shape: tuple[int, ...], box: Rectangle) -> Tensor:
        """A rectangle of it: the same values as in the whole."""

    def fingerprint(self) -> str:
        """A digest that is equal for equal weights, wherever they are stored."""


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

    def part(self, fqn: str, shape: tuple[int, ...], box: Rectangle) -> Tensor:
        """A rectangle of the whole, which is drawn each time: no value depends on the parts."""
        return self.get(fqn, shape)[box.slices_in(Rectangle((0,) * len(shape), shape))]

    def fingerprint(self) -> str:
        """The seed."""
        return f"seed {self.seed}"


class FolderWeights:
    """Weights read from a transformers folder of safetensors files; pickled weights are refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _weight_map(folder)

    @property
    def names(self) -> list[str]:
        """Names of the stored tensors, as the files have them."""
        return list(self._file_of)

    def stored_name(self, fqn: str) -> str | None:
        """The file's name of a weight, which may lack the base model's prefix; None if absent."""
        return next((n for n in (fqn, fqn.removeprefix("model.")) if n in self._file_of), None)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype code of a stored tensor, without reading it."""
        with self._open(name) as file:
            stored = file.get_slice(name)
            return tuple(stored.get_shape()), stored.get_dtype()

    def read(self, name: str) -> Tensor:
        """A stored tensor in its own dtype."""
        with self._open(name) as file:
            value: Tensor = file.get_tensor(name)
            return value

    def get(self, fqn: str, shape: tuple[int, ...]) -> Tensor:
        """The stored tensor in float32. Raises ConfigError if it is missing or of another shape."""
        return self.part(fqn, shape, Rectangle((0,) * len(shape), shape))

    def part(self, fqn: str, shape: tuple[int, ...], box: Rectangle) -> Tensor:
        """A rectangle of the stored tensor, of which nothing else is read. Raises as `get`."""
        name = self.stored_name(fqn)
        if name is None:
            raise ConfigError(f"{self.folder} holds no weight {fqn}; check the folder")
        found = self.shape_and_dtype(name)[0]
        if found != shape:
            raise ConfigError(
                f"{self.folder}: {name} has shape {found}, the configuration asks for {shape}"
            )
        if box.shape == shape:
            return self.read(name).float()
        with self._open(name) as file:
            value: Tensor = file.get_slice(name)[box.slices_in(Rectangle((0,) * len(shape), shape))]
        return value.float()

    def fingerprint(self) -> str:
        """SHA-256 of the files' contents."""
        digest = hashlib.sha256()
        for path in sorted(set(self._file_of.values())):
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error}") from None
        return digest.hexdigest()

    def _open(self, name: str) -> Any:
        path = self._file_of[name]
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None


def initialise_dense(
    model: nn.Module,
    table: ParameterTable,
    weights: InitialWeights,
    *,
    frozen_only: bool = False,
) -> None:
    """Fill every dense parameter, or those that never train, from its key or file entry."""
    with torch.no_grad():
        for fqn in dense_names(table, frozen_only=frozen_only):
            model.get_parameter(fqn).copy_(weights.get(fqn, table[fqn].global_shape))


def dense_names(table: ParameterTable, *, frozen_only: bool) -> list[str]:
    """The parameters that no method holds, or those among them that never train."""
    return [
        fqn
        for fqn, info in table.items()
        if info.layer is None and not (frozen_only and info.trainable)
    ]


def _weight_map(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    try:
        if index.is_file():
            names = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: _confined(folder, file) for name, file in names.items()}
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: weights cannot be read: {error}") from None
    raise ConfigError(_why_no_weights(folder))


def _why_no_weights(folder: Path) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    if not pickled:
        return f"{folder} holds no model.safetensors; give a folder written by save_pretrained"
    return (
        f"{folder} holds its weights only as a pickle ({pickled[0]}), which could run code and is "
        "never loaded; convert it with transformers on a machine you can spare: "
        "from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    )


def _confined(folder: Path, name: str) -> Path:
    """A file directly in the folder; as in the hub's cache, it may be a link."""
    path = folder / str(name)
    if path.name != name or not path.is_file():
        raise ConfigError(f"{folder}: the weight index names {name!r}, not a file of this folder")
    return path
