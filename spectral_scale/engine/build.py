"""From a configuration to a run that is ready to train: the parts in order, nothing else."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from spectral_scale.errors import SpectralError
from spectral_scale.methods.base import Method, MethodController
from spectral_scale.methods.layer import factored_layers
from spectral_scale.models.attention import choose_attention
from spectral_scale.models.build import (
    build_model,
    compile_blocks,
)
from spectral_scale.models.folder import check_folder
from spectral_scale.models.weights import FolderWeights, InitialWeights, KeyedWeights
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.parallel.chunks import TensorChunk, whole
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


@dataclass(kw_only=True)
class Run:
    """Everything the loop needs."""

    resolved: ResolvedRun
    """The settings and what follows from them, vocabulary included."""
    backend: Backend
    """What holds the model and takes the training step."""
    model: PreTrainedModel
    """The model itself, for evaluation and state."""
    forward: nn.Module
    """The module that the training forward pass calls."""
    table: ParameterTable
    """Logical parameters."""
    optimizer: torch.optim.Optimizer
    """The optimizer; its groups carry `name`, `fqns`, `base_lr`, `spectral`."""
    controller: MethodController | None
    """The method's actions between steps; None for dense training."""
    gradient_filter: SpectralFilter | None
    """Filter of gradients before they are clipped; None: there is none."""
    loader: TrainLoader
    """Training batches by step."""
    validation: ValidationLoader | None
    """Fixed validation batches."""
    checkpoints: CheckpointManager
    """Saves and finds checkpoints."""
    identity: dict[str, Any]
    """Settings that must be equal in a resumed run; see `engine.identity`."""
    start_step: int = 0
    """Steps already taken."""
    skipped_steps: int = 0
    """Steps among them that updated nothing, because fp16 gradients overflowed."""
    autocast: torch.dtype | None = None
    """Compute dtype of the forward pass, if it differs from the weights'."""
    saved_state: Mapping[str, Any] = field(default_factory=dict)
    """Counters of the checkpoint it goes on from; empty at step 0."""

    @property
    def config(self) -> RunConfig:
        """The settings, as resolved."""
        return self.resolved.config

    @property
    def architecture(self) -> Architecture:
        """The model's shapes."""
        return self.resolved.architecture

    def state_chunks(self) -> list[TensorChunk]:
        """The tensors that this rank saves, as views that are valid until the next step."""
        chunks = list(self.backend.state_chunks())
        if self.controller is not None:
            chunks += [whole(name, tensor) for name, tensor in self.controller.state_tensors()]
        if self.gradient_filter is not None:
            chunks += self.gradient_filter.state_chunks()
        return chunks

    def load(self, reader: CheckpointReader) -> None:
        """Take the tensors of a checkpoint, in place. Collective."""
        self.backend.load_state(reader.read)
        if self.controller is not None:
            self.controller.load_state(reader.read, reader.state["applied_steps"])
        if self.gradient_filter is not None:
            self.gradient_filter.load_state(reader.read)


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
    resolved, weights = inputs.run, inputs.weights
    config, architecture = resolved.config, resolved.architecture
    train_tokens, validation_tokens = inputs.train, inputs.validation

    backend = open_backend(resolved, inputs.rank_info)
    set_numerics(config.train, backend.device)
    loader, validation = _build_loaders(config, backend, train_tokens, validation_tokens)
    identity = run_identity(resolved, loader)
    identity |= base_identity(resolved.config, resolved.method, weights, backend.collective)
    checkpoints = _open_checkpoints(config, backend)
    reader = checkpoints.latest_good()
    if reader is not None:
        allowed = config.train.allow_changed
        check_identity(reader.identity, identity, allowed=allowed, run_dir=config.train.run_dir)

    model = build_model(architecture, config.model, eos_token_id=train_tokens.eos_token_id)
    precision = config.train.precision
    attention = choose_attention(model, config.model, device=backend.device, precision=precision)
    logger.info("attention: %s", attention)
    if reader is None and config.model.path is not None:
        check_folder(Path(config.model.path), model)
        check_folder_tokenizer(Path(config.model.path), train_tokens)
    method = methods[method_name(config.spectral)]
    convert_model(model, config.spectral, frozen_dtype(config), method)
    check_converted(model, config.spectral, architecture)
    table = parameter_table(model)
    if config.model.compile:
        compile_blocks(model)
    backend.make(
        model,
        table,
        weights,
        dtype=MASTER_DTYPES[precision],
        frozen_dtype=frozen_dtype(config),
        fresh=reader is None,
    )
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
        weights=weights,
        dtype=MASTER_DTYPES[precision],
        fresh=reader is None,
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
        gradient_filter=open_filter(config, architecture, table, backend.store()),
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
