"""One optimizer step of the training loop on a fake CUDA device, counted; see `fake_cuda`.

Everything is the product's but what has no values there: nothing is drawn, decomposed, read from
data or sent. Process groups of several ranks are torch's fake ones.
"""

import logging
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from spectral_scale.backends.base import Backend
from spectral_scale.config.load import load_config
from spectral_scale.config.methods import method_name
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.data.loader import Batch, StepBatch
from spectral_scale.engine.backends import autocast_dtype, open_backend
from spectral_scale.engine.build import MASTER_DTYPES, frozen_dtype
from spectral_scale.engine.loop import TrainingLoop
from spectral_scale.engine.methods import METHODS, convert_model, open_controller
from spectral_scale.engine.run import Run
from spectral_scale.methods.layer import factored_layers
from spectral_scale.metrics.sinks import NullLog
from spectral_scale.models.attention import choose_attention
from spectral_scale.models.build import build_model
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.dtensor_layout import DTensorLayouts
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.parallel.table import parameter_table
from spectral_scale.testing.launches import Launches


def count_step(changes: dict[str, Any], world_size: int = 1) -> dict[str, Any]:
    """What an ordinary step asks of the GPU: one that is not logged and swaps nothing.

    Args:
        changes: configuration keys (`model.name`, `parallel.backend`, ...) and their values.
        world_size: ranks of the run, of which this is the first.

    Returns `Launches.figures` of `forward`, `backward` and the whole `step`.
    """
    loop, batch = build_fake_loop(changes, world_size)
    found: dict[str, Any] = {}
    backward = loop.run.backend.backward
    with Launches() as step:
        marks = []

        def marked(loss: torch.Tensor) -> None:
            marks.append(step.figures())
            backward(loss)
            marks.append(step.figures())

        with patch.object(loop.run.backend, "backward", marked):
            loop._one_step(batch)
    found["forward"] = marks[0]
    found["backward"] = _difference(marks[1], marks[0])
    found["step"] = step.figures() | {"largest": step.largest}
    return found


def build_fake_loop(changes: dict[str, Any], world_size: int = 1) -> tuple[TrainingLoop, StepBatch]:
    """A training loop whose second step is about to be taken, and a batch for it."""
    logging.disable(logging.WARNING)
    run = _build(_resolve(changes, world_size), world_size)
    config = run.config
    loop = TrainingLoop(run, NullLog(), None)
    loop.step = 1
    shape = config.train.micro_batch_size, config.model.sequence_length
    micro = [
        Batch(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
        for _ in range(run.resolved.gradient_accumulation_steps)
    ]
    return loop, StepBatch(step=1, micro_batches=micro)


def _resolve(changes: dict[str, Any], world_size: int) -> ResolvedRun:
    values = {
        "data.train": "none",
        "train.run_dir": tempfile.mkdtemp(),
        "train.device": "cuda",
        "train.precision": "bf16",
        "train.steps": 1000,
        "train.eval_interval": 900,
        "metrics.log_interval": 900,
        "checkpoint.interval": 900,
        "health.replica_interval": 0,
    } | changes
    with unset_fake_temporarily():
        config = load_config([], [f"--{key}={value}" for key, value in values.items()]).config
        return resolve(config, world_size=world_size)


def _build(resolved: ResolvedRun, world_size: int) -> Run:
    """Build a run as `engine.build.build_run` does, but without data, weights and checkpoints."""
    config, architecture = resolved.config, resolved.architecture
    method = METHODS[method_name(config.spectral)]
    backend = _open(resolved, world_size)
    model = build_model(architecture, config.model, eos_token_id=0)
    precision = config.train.precision
    choose_attention(model, config.model, device=backend.device, precision=precision)
    convert_model(model, config.spectral, frozen_dtype(config), method)
    table = parameter_table(model)
    _give_memory(model, backend.device)
    backend.shard(model)
    optimizer = backend.own_optimizer(method.optimizer(model, config, backend.collective))
    forward = backend.attach(optimizer)
    controller = open_controller(
        method,
        model=model,
        optimizer=optimizer,
        config=config,
        collective=backend.collective,
        store=backend.store(),
        weights=None,  # type: ignore[arg-type]  # nothing is decomposed
        dtype=MASTER_DTYPES[precision],
        fresh=False,
    )
    for layer in factored_layers(model).values():
        layer.ready = True
    nothing: Any = SimpleNamespace(
        tokens_per_step=config.train.global_batch_size * config.model.sequence_length
    )
    return Run(
        resolved=resolved,
        backend=backend,
        model=model,
        forward=forward,
        table=table,
        optimizer=optimizer,
        controller=controller,
        gradient_filter=None,
        loader=nothing,
        validation=None,
        checkpoints=nothing,
        identity={},
        autocast=autocast_dtype(config),
    )


def _open(resolved: ResolvedRun, world_size: int) -> Backend:
    """The backend, in a group whose other ranks do not exist."""
    collective = SingleProcess()
    collective.world_size = world_size
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    folder = f"spectral_scale.backends.{resolved.config.parallel.backend}.backend"
    with patch(f"{folder}.join_group", lambda *_: collective), unset_fake_temporarily():
        backend = open_backend(resolved, RankInfo(world_size=world_size))
    of = DTensorLayouts.of

    def real(self: DTensorLayouts, tensor: Any) -> Any:
        with unset_fake_temporarily():  # reads the ranks of a mesh
            return of(self, tensor)

    patch.object(DTensorLayouts, "of", real).start()
    patch("transformers.masking_utils.find_packed_sequence_indices", _one_sequence).start()
    return backend


def _one_sequence(position_ids: torch.Tensor) -> None:
    """What transformers does with values: the host looks whether rows hold one sequence each."""
    bool((position_ids.diff(dim=-1) == 1).all())


def _give_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Fake parameters in the place of the meta ones, trained ones in float32."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for leaf, old in list(module._parameters.items()):
            if old is not None and id(old) not in made:
                dtype = torch.float32 if old.requires_grad else old.dtype
                new = torch.empty(old.shape, dtype=dtype, device=device)
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad), old
            if old is not None:
                module._parameters[leaf] = made[id(old)][0]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    model.tie_weights()


def _difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    keys = ("launches", "megabytes", "waits")
    return {key: round(after[key] - before[key], 1) for key in keys}
