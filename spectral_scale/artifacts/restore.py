"""Restores a run's model from its folder and a checkpoint, without optimizer state or data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.names import CHECKPOINTS_NAME, step_of
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.config.load import load_config
from spectral_scale.config.methods import chosen_spec, method_name
from spectral_scale.config.presets import Architecture, resolve_architecture
from spectral_scale.config.schema import RunConfig
from spectral_scale.engine.build import MASTER_DTYPES, frozen_dtype, initial_weights
from spectral_scale.engine.identity import (
    base_identity,
    keeps_initial_weights,
    model_identity,
)
from spectral_scale.engine.methods import METHODS, convert_model, open_controller
from spectral_scale.errors import CheckpointError, ConfigError
from spectral_scale.methods.layer import factored_layers
from spectral_scale.models.attention import choose_attention
from spectral_scale.models.build import build_model, materialise
from spectral_scale.models.folder import read_generation_config
from spectral_scale.models.weights import InitialWeights, KeyedWeights, initialise_dense
from spectral_scale.optim.groups import param_groups
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.store import TorchStore
from spectral_scale.parallel.table import parameter_table

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run folder and one of its checkpoints, every byte of it verified."""

    folder: Path
    """The run folder."""
    config: RunConfig
    """The run's config.yaml."""
    architecture: Architecture
    """The model's shapes."""
    reader: CheckpointReader
    """The checkpoint."""

    @property
    def step(self) -> int:
        """The number of optimizer steps that the weights have taken."""
        return self.reader.step

    @property
    def tokenizer_sha256(self) -> str | None:
        """The checksum of the tokenizer that the run was trained with."""
        found = self.reader.identity.get("data.tokenizer")
        return None if found is None else str(found)


def open_run(target: Path) -> SavedRun:
    """Open a run folder or its `checkpoints` (the newest good one is taken), or one checkpoint.

    Raises:
        ConfigError: no run folder, or a config.yaml that cannot be used.
        CheckpointError: no checkpoint, none that is undamaged, or one of another run.
    """
    folder = find_run_folder(target)
    config = load_config([folder / CONFIG_NAME]).config
    architecture = resolve_architecture(config.model)
    reader = _open_checkpoint(target, folder)
    _refuse_foreign(
        reader, folder, model_identity(config, architecture, chosen_spec(config.spectral))
    )
    return SavedRun(folder=folder, config=config, architecture=architecture, reader=reader)


def find_run_folder(target: Path) -> Path:
    """The run folder that `target` is or lies in. Raises ConfigError if there is none."""
    if not target.is_dir():
        raise ConfigError(f"{target}: no such folder; give a run folder or one of its checkpoints")
    path = target.resolve()
    if step_of(path.name) is not None:
        path = path.parent
    if path.name == CHECKPOINTS_NAME:
        path = path.parent
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{target} is neither a run folder nor a checkpoint inside one: {path.name} holds no "
            f"{CONFIG_NAME}; give RUN, or RUN/{CHECKPOINTS_NAME}/step_XXXXXXXX where it was written"
        )
    return path


def restore_model(
    run: SavedRun, *, device: torch.device, exact: bool, eos_token_id: int | None = None
) -> PreTrainedModel:
    """The run's model with its checkpoint's weights, in evaluation mode.

    Args:
        run: from `open_run`.
        device: where the model is to be.
        exact: hold frozen weights in the precision of the trained ones, not rounded as in training
            (they differ for bf16 and fp16 runs only).
        eos_token_id: the end-of-text token, for the model's configuration.

    Raises CheckpointError if the checkpoint lacks a weight or has one of another shape.
    """
    config, precision = run.config, run.config.train.precision
    dtype = MASTER_DTYPES[precision]
    plain = replace(config.model, activation_checkpointing=False)
    model = build_model(run.architecture, plain, eos_token_id=eos_token_id)
    choose_attention(model, plain, device=device, precision=precision)
    spectral = replace(config.spectral, residual_dtype="auto") if exact else config.spectral
    convert_model(model, spectral, dtype if exact else frozen_dtype(config))
    table = parameter_table(model)
    materialise(model, device=device, dtype=dtype)
    weights = _initial_weights(run)
    initialise_dense(model, table, weights, frozen_only=True)
    _load_trained(model, run.reader)
    if factored_layers(model):
        _load_frozen(model, run, weights, dtype)
    _take_generation_config(model, config.model.path)
    return model.eval()


def _open_checkpoint(target: Path, folder: Path) -> CheckpointReader:
    if step_of(target.resolve().name) is not None:
        return CheckpointReader.open(target)
    root = folder / CHECKPOINTS_NAME
    reader = CheckpointManager(root, keep_last=1, collective=SingleProcess()).latest_good()
    if reader is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train it first")
    return reader


def _refuse_foreign(reader: CheckpointReader, folder: Path, expected: dict[str, Any]) -> None:
    differing = [
        f"{key}: the checkpoint has {reader.identity[key]!r}, {CONFIG_NAME} {value!r}"
        for key, value in expected.items()
        if key in reader.identity and reader.identity[key] != value
    ]
    if differing:
        raise CheckpointError(
            f"{reader.path.name} is not a checkpoint of the run in {folder}:\n  - "
            + "\n  - ".join(differing)
            + f"\nuse it with the {CONFIG_NAME} of the run that wrote it"
        )


@torch.no_grad()
def _load_trained(model: nn.Module, reader: CheckpointReader) -> None:
    for fqn, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value = reader.read(f"model/{fqn}")
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"{reader.path.name}: {fqn} has shape {tuple(value.shape)}, the model needs "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(value)


def _initial_weights(run: SavedRun) -> InitialWeights:
    """The weights that the run started from, if its checkpoints need them.

    Raises CheckpointError if they have changed and ConfigError if they are gone.
    """
    method = chosen_spec(run.config.spectral)
    if not keeps_initial_weights(run.config, method):
        return KeyedWeights(run.config.train.seed)
    weights = initial_weights(run.config)
    current = base_identity(run.config, method, weights, SingleProcess())
    _refuse_foreign(run.reader, run.folder, current)
    return weights


def _load_frozen(
    model: nn.Module, run: SavedRun, weights: InitialWeights, dtype: torch.dtype
) -> None:
    """Let the method's own controller rebuild what does not train, as it does on resume."""
    # Controllers read the optimizer's groups; this one holds no state and never steps.
    optimizer = torch.optim.SGD(param_groups(model, lr=0.0, spectral_lr=0.0), lr=0.0)
    collective = SingleProcess()
    controller = open_controller(
        METHODS[method_name(run.config.spectral)],
        model=model,
        optimizer=optimizer,
        config=run.config,
        collective=collective,
        store=TorchStore(model, optimizer, collective),
        weights=weights,
        dtype=dtype,
        fresh=False,
    )
    if controller is not None:
        controller.load_state(run.reader.read, run.reader.state["applied_steps"])


def _take_generation_config(model: PreTrainedModel, path: str | None) -> None:
    """Take over the generation settings of the model that the run started from."""
    found = None if path is None else read_generation_config(Path(path))
    if found is not None:
        model.generation_config = found
