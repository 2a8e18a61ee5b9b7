"""From a configuration to a run that is ready to train: the parts in order, nothing else."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectral_scale.backends.base import Backend
from spectral_scale.backends.limits import wait_limits
from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.config.methods import method_name
from spectral_scale.config.methods.rules import converted_shapes
from spectral_scale.config.presets import Architecture
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.data.loader import TrainLoader, ValidationLoader, count_examples
from spectral_scale.data.packing import count_samples
from spectral_scale.data.tokenizer_match import check_folder_tokenizer
from spectral_scale.data.tokens import TokenFolder
from spectral_scale.engine.backends import (
    autocast_dtype,
    open_backend,
    require_backend,
    require_backend_model,
)
from spectral_scale.engine.data import check_vocabulary, open_data, with_vocabulary
from spectral_scale.engine.identity import base_identity, check_identity, run_identity
from spectral_scale.engine.methods import METHODS, convert_model, open_controller, open_filter
from spectral_scale.engine.numerics import set_numerics
from spectral_scale.engine.run import Run
from spectral_scale.errors import SpectralError
from spectral_scale.methods.base import Method
from spectral_scale.methods.layer import factored_layers
from spectral_scale.models.attention import choose_attention
from spectral_scale.models.build import (
    build_model,
    compile_blocks,
)
from spectral_scale.models.folder import check_folder
from spectral_scale.models.weights import FolderWeights, InitialWeights, KeyedWeights
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.group import limit_waits, separate
from spectral_scale.parallel.rank_info import RankInfo, require_rendezvous
from spectral_scale.parallel.table import ParameterTable, parameter_table

logger = logging.getLogger(__name__)

MASTER_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
    "fp64": torch.float64,
}
"""Precision -> dtype of trained weights, moments and the bank."""
PRODUCT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> dtype of products and frozen weights, where it is another one."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run starts from on this rank, checked to fit together."""

    run: ResolvedRun
    """The settings, with the vocabulary that the data has."""
    rank_info: RankInfo
    """Which rank this process is."""
    train: TokenFolder
    """Training tokens."""
    validation: TokenFolder | None
    """Validation tokens."""
    weights: InitialWeights
    """Initial dense weights."""


def check_inputs(run: ResolvedRun, rank_info: RankInfo) -> Inputs:
    """Find everything that can be wrong before anything is written or allocated.

    Raises ConfigError or DataError.
    """
    require_rendezvous(rank_info)
    config = run.config
    require_backend(config)
    pick_device(config.train.device, rank_info.local_rank)
    train, validation = open_data(config)
    run = with_vocabulary(run, train)
    require_backend_model(run)
    check_vocabulary(run.architecture.vocab_size, train)
    count_examples(train, config.model.sequence_length, config.data.examples)
    if validation is not None:
        count_samples(validation, config.model.sequence_length, keep_tail=True)
    return Inputs(
        run=run,
        rank_info=rank_info,
        train=train,
        validation=validation,
        weights=initial_weights(config),
    )


def build_run(inputs: Inputs, methods: Mapping[str, Method] = METHODS) -> Run:
    """Build, and resume if the run folder holds a good checkpoint. Collective.

    Args:
        inputs: from `check_inputs`.
        methods: implementation by name; by default the shipped ones.

    Raises ConfigError, DataError or CheckpointError on all ranks alike.
    """
    resolved, config = inputs.run, inputs.run.config
    backend = open_backend(resolved, inputs.rank_info)
    set_numerics(config.train, backend.device)
    loader, validation = _build_loaders(config, backend, inputs.train, inputs.validation)
    identity = run_identity(resolved, loader)
    identity |= base_identity(config, resolved.method, inputs.weights, backend.collective)
    checkpoints = _open_checkpoints(config, backend)
    reader = _checkpoint_to_resume(checkpoints, identity, config)
    fresh = reader is None

    method = methods[method_name(config.spectral)]
    model = _shape_model(inputs, backend, method, fresh=fresh)
    table = parameter_table(model)
    _give_memory(model, table, inputs, backend, fresh=fresh)
    optimizer = backend.own_optimizer(method.optimizer(model, config, backend.collective))
    forward = backend.attach(optimizer)
    # The first decompositions come next; all groups of the backend are there.
    limit_waits(wait_limits(resolved, backend.device.type).collective)
    controller = open_controller(
        method,
        model=model,
        optimizer=optimizer,
        config=config,
        collective=backend.collective,
        store=backend.store(),
        weights=inputs.weights,
        dtype=MASTER_DTYPES[config.train.precision],
        fresh=fresh,
    )
    saved_state = {} if reader is None else reader.state
    run = Run(
        resolved=resolved,
        backend=backend,
        model=model,
        forward=forward,
        table=table,
        optimizer=optimizer,
        controller=controller,
        gradient_filter=open_filter(config, resolved.architecture, table, backend.store()),
        loader=loader,
        validation=validation,
        checkpoints=checkpoints,
        identity=identity,
        start_step=saved_state.get("step", 0),
        skipped_steps=saved_state.get("skipped_steps", 0),
        autocast=autocast_dtype(config),
        saved_state=saved_state,
    )
    if reader is not None:
        run.load(reader)
        logger.info("resuming from %s at step %d", reader.path.name, run.start_step)
    return run


def _checkpoint_to_resume(
    checkpoints: CheckpointManager, identity: Mapping[str, Any], config: RunConfig
) -> CheckpointReader | None:
    """The latest good checkpoint, which must be of this run; None: it begins. Collective."""
    reader = checkpoints.latest_good()
    if reader is not None:
        allowed = config.train.allow_changed
        check_identity(reader.identity, identity, allowed=allowed, run_dir=config.train.run_dir)
    return reader


def _shape_model(
    inputs: Inputs, backend: Backend, method: Method, *, fresh: bool
) -> PreTrainedModel:
    """The model on the meta device, its linears converted by the method: shapes without memory.

    A folder of weights is compared with it only if the run is `fresh`, since a checkpoint holds
    what is trained otherwise.
    """
    config, architecture = inputs.run.config, inputs.run.architecture
    model = build_model(architecture, config.model, eos_token_id=inputs.train.eos_token_id)
    attention = choose_attention(
        model, config.model, device=backend.device, precision=config.train.precision
    )
    logger.info("attention: %s", attention)
    if fresh and config.model.path is not None:
        check_folder(Path(config.model.path), model)
        check_folder_tokenizer(Path(config.model.path), inputs.train)
    convert_model(model, config.spectral, frozen_dtype(config), method)
    check_converted(model, config.spectral, architecture)
    return model


def _give_memory(
    model: PreTrainedModel,
    table: ParameterTable,
    inputs: Inputs,
    backend: Backend,
    *,
    fresh: bool,
) -> None:
    """Let the backend put parameters with memory in the place of the meta model's. Collective."""
    config = inputs.run.config
    if config.model.compile:
        compile_blocks(model)
    backend.make(
        model,
        table,
        inputs.weights,
        dtype=MASTER_DTYPES[config.train.precision],
        frozen_dtype=frozen_dtype(config),
        fresh=fresh,
    )


def check_converted(model: nn.Module, spectral: SpectralConfig, architecture: Architecture) -> None:
    """Raise SpectralError unless every targeted linear of every block was converted, or none."""
    converted = len(factored_layers(model))
    expected = architecture.num_layers * len(converted_shapes(spectral, architecture))
    if converted not in (0, expected):
        raise SpectralError(
            f"{converted} linear layers were converted, the model's blocks hold {expected}; "
            "the installed transformers may name or fuse them differently"
        )


def _open_checkpoints(config: RunConfig, backend: Backend) -> CheckpointManager:
    """The run folder's checkpoints; saves beside training need a process group of their own."""
    background = config.checkpoint.async_save
    return CheckpointManager(
        Path(config.train.run_dir) / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        collective=separate(backend.collective) if background else backend.collective,
    )


def frozen_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of frozen weights in training."""
    precision = config.train.precision
    return PRODUCT_DTYPES.get(precision) or MASTER_DTYPES[precision]


def _build_loaders(
    config: RunConfig, backend: Backend, train: TokenFolder, held_out: TokenFolder | None
) -> tuple[TrainLoader, ValidationLoader | None]:
    loader = TrainLoader(
        train,
        sequence_length=config.model.sequence_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.train.seed,
        data_rank=backend.data_rank,
        data_world_size=backend.data_world_size,
        num_workers=config.data.num_workers,
        examples=config.data.examples,
    )
    if held_out is None:
        return loader, None
    validation = ValidationLoader(
        held_out,
        sequence_length=config.model.sequence_length,
        num_sequences=config.data.validation_sequences,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=backend.data_rank,
        data_world_size=backend.data_world_size,
    )
    return loader, validation


def initial_weights(config: RunConfig) -> InitialWeights:
    """Initial weights from the folder of `model.path`, or drawn by the seed. Raises ConfigError."""
    if config.model.path is not None:
        return FolderWeights(Path(config.model.path))
    return KeyedWeights(config.train.seed)
