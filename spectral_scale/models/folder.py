"""A local transformers folder: what it must hold to be trained from, and how it is loaded.

Nothing in a folder is trusted: weights are safetensors, shipped code is never run, and nothing is
downloaded.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from spectral_scale.errors import ConfigError
from spectral_scale.files.json_text import parse_json
from spectral_scale.models.weights import FolderWeights

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_ADAPTER_NAME = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """The weights of a folder that holds every one its model needs."""

    parameters: int
    """Elements of the model, tied ones once."""
    dtypes: list[str]
    """safetensors dtype codes of the stored tensors, sorted."""
    unused: list[str]
    """Stored tensors that the model has no place for, sorted."""


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder holds config.json, as save_pretrained writes it."""
    return (path / CONFIG_NAME).is_file()


def check_folder(folder: Path, model: PreTrainedModel) -> FolderReport:
    """Hold a folder's weights against the dense model built from its config.json (meta is enough).

    Raises ConfigError for adapters, quantised or pickled weights, a missing weight or one of
    another shape (all of them are listed), and for weights that differ though the configuration
    ties them: loaders disagree on what such a folder means. `read_generation_config` adds its own.
    """
    _refuse_unsupported(folder)
    read_generation_config(folder)  # an export writes it again
    weights = FolderWeights(folder)
    used: set[str] = set()
    problems: list[str] = []
    elements = 0
    for fqns, shape in _logical_weights(model).items():
        stored = [name for name in map(weights.stored_name, fqns) if name is not None]
        problem = _problem(weights, fqns, stored, shape)
        problems += [problem] if problem else []
        used.update(stored)
        elements += torch.Size(shape).numel()
    if problems:
        raise ConfigError(f"{folder} cannot be used:\n  - " + "\n  - ".join(problems))
    unused = sorted(set(weights.names) - used)
    if unused:
        logger.warning("%s: %d stored tensors are not used: %s", folder, len(unused), unused[:5])
    dtypes = sorted({weights.shape_and_dtype(name)[1] for name in used})
    return FolderReport(parameters=elements, dtypes=dtypes, unused=unused)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation settings of a folder, fit to be exported again; None if it has none.

    Many published folders give sampling values without `do_sample`, which transformers reads but
    refuses to write: sampling is then switched on, with a warning. Raises ConfigError for others
    that it refuses.
    """
    file = folder / GENERATION_CONFIG_NAME
    if not file.is_file():
        return None
    try:
        with quiet_transformers():
            found: GenerationConfig = GenerationConfig.from_pretrained(
                str(folder), local_files_only=True
            )
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); correct it, or remove it and start again"
        ) from None
    problem = _refusal(found)
    if problem is not None and not found.do_sample:
        found.do_sample = True
        problem = _refusal(found)
        if problem is None:
            logger.warning(
                "%s gives sampling values without do_sample; exports set do_sample=true, as "
                "transformers requires",
                file,
            )
    if problem is not None:
        raise ConfigError(
            f"{file}: transformers would refuse to export it ({problem}); correct it, or remove "
            "it and start again"
        )
    return found


def _refusal(config: GenerationConfig) -> str | None:
    """Why transformers refuses to write these settings, in one line."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def load_folder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers itself loads it, in evaluation mode.

    Raises ConfigError if transformers would leave a weight at a random value.
    """
    _refuse_unsupported(folder)
    FolderWeights(folder)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it: {error}") from error
    model, info = loaded
    lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lacking:
        raise ConfigError(
            f"{folder}: transformers finds no fitting weight for {', '.join(lacking[:5])}"
            f"{' ...' if len(lacking) > 5 else ''}; the folder is incomplete"
        )
    found: PreTrainedModel = model.to(device).eval()
    return found


def _logical_weights(model: PreTrainedModel) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every parameter by all the names it has."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(fqn)
        shapes[id(parameter)] = tuple(parameter.shape)
    return {tuple(fqns): shapes[key] for key, fqns in names.items()}


def _problem(
    weights: FolderWeights, fqns: tuple[str, ...], stored: list[str], shape: tuple[int, ...]
) -> str | None:
    """What is wrong with one parameter, which may be stored under any of its names."""
    if not stored:
        return f"no weight {fqns[0]}"
    if weights.stored_name(fqns[0]) is None:
        return f"no weight {fqns[0]}, only {stored[0]} which is tied to it; store it as {fqns[0]}"
    for name in stored:
        found = weights.shape_and_dtype(name)[0]
        if found != shape:
            return f"{name} has shape {found}, {CONFIG_NAME} asks for {shape}"
    if len(stored) > 1 and not torch.equal(weights.read(stored[0]), weights.read(stored[1])):
        return (
            f"{stored[0]} and {stored[1]} differ, but {CONFIG_NAME} ties them; set "
            "tie_word_embeddings to false there if they are meant to differ"
        )
    return None


def _refuse_unsupported(folder: Path) -> None:
    if (folder / _ADAPTER_NAME).exists():
        raise ConfigError(
            f"{folder} holds {_ADAPTER_NAME}: an adapter, not a model; merge it into its base "
            "model first (peft: merge_and_unload), then save that"
        )
    try:
        raw = parse_json((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: {CONFIG_NAME} cannot be read ({error}); give a folder written by "
            "save_pretrained"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{folder}: {CONFIG_NAME} must hold an object, not {type(raw).__name__}")
    if raw.get("quantization_config") is not None:
        raise ConfigError(f"{folder} holds quantised weights; give the unquantised model")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports: what they would say is checked here, and raised."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
