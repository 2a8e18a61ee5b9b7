"""A configuration and the number of ranks, resolved once into everything that follows from them.

`train`, `plan`, `slurm` and `doctor` resolve a configuration when they start and hand the result
on: nothing behind them checks it again or reads its files again. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spectral_scale.config.capability import CAPABILITIES, data_parallel_size, variant
from spectral_scale.config.check import check_config, gradient_accumulation_steps
from spectral_scale.config.deepspeed_json import (
    DeepSpeedSettings,
    read_deepspeed_json,
    resolve_deepspeed,
    with_deepspeed_json,
)
from spectral_scale.config.methods import METHOD_SPECS, chosen_spec
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.presets import Architecture, resolve_architecture
from spectral_scale.config.rules_tensor_parallel import tensor_parallel_problems
from spectral_scale.config.schema import RunConfig
from spectral_scale.config.support import Support
from spectral_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A configuration that can run, and what follows from it on a given number of ranks."""

    config: RunConfig
    """The settings; the ZeRO stage and the offload of a DeepSpeed file are among them."""
    world_size: int
    """Ranks of the run."""
    architecture: Architecture
    """The model's shapes. The vocabulary is the preset's until `with_vocabulary` sets it."""
    method: MethodSpec
    """Specification of the training method."""
    capability_row: str
    """Row of the capability table that the run uses; see `capability.variant`."""
    data_parallel_size: int
    """Ranks that see different data."""
    gradient_accumulation_steps: int
    """Forward passes that each rank takes in an optimizer step."""
    deepspeed: DeepSpeedSettings | None
    """What DeepSpeed is started with; None on other backends."""

    def with_vocabulary(self, rows: int) -> "ResolvedRun":
        """Set `model.vocab_size` once the data has told it.

        Raises ConfigError if tensor parallelism cannot split that many rows.
        """
        config = replace(self.config, model=replace(self.config.model, vocab_size=rows))
        architecture = resolve_architecture(config.model)
        parts = config.parallel.tensor_parallel
        problems = tensor_parallel_problems(architecture, parts, world_size=self.world_size)
        if found := list(problems):
            raise ConfigError("the configuration cannot run:\n  - " + "\n  - ".join(found))
        return replace(self, config=config, architecture=architecture)


def resolve(
    config: RunConfig,
    *,
    world_size: int,
    methods: Mapping[str, MethodSpec] = METHOD_SPECS,
    capabilities: Mapping[str, Mapping[str, Support]] = CAPABILITIES,
) -> ResolvedRun:
    """Check a configuration for `world_size` ranks and derive what follows from it.

    Args:
        config: the settings.
        world_size: ranks of the run.
        methods: specification by name; by default the shipped ones.
        capabilities: what each backend can do; by default the shipped tables.

    Raises ConfigError, which lists everything that is wrong, or names a DeepSpeed file that cannot
    be read or does not fit the run.
    """
    given: dict[str, Any] = {}
    on_deepspeed = config.parallel.backend == "deepspeed"
    if on_deepspeed:
        given = read_deepspeed_json(config.parallel.deepspeed_config)
        config = with_deepspeed_json(config, given)
    architecture = check_config(
        config, world_size=world_size, methods=methods, capabilities=capabilities
    )
    deepspeed = None
    if on_deepspeed:
        deepspeed = resolve_deepspeed(config, given, architecture, world_size=world_size)
    return ResolvedRun(
        config=config,
        world_size=world_size,
        architecture=architecture,
        method=chosen_spec(config.spectral, methods),
        capability_row=variant(config.parallel, world_size=world_size),
        data_parallel_size=data_parallel_size(config.parallel, world_size),
        gradient_accumulation_steps=gradient_accumulation_steps(config, world_size=world_size),
        deepspeed=deepspeed,
    )
