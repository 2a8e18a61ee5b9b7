"""A method that is not shipped trains, resumes and is planned: what the project asks of one.

The toy keeps a frozen weight and trains one factor a row, which it folds into the weight every T3
steps. Its specification, its implementation and its capability row are arguments; nothing of the
package is edited, registered or patched.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectral_scale.config.capability import CAPABILITIES
from spectral_scale.config.methods import METHOD_SPECS
from spectral_scale.config.methods.spec import (
    MethodMemory,
    MethodSpec,
    MethodTraffic,
    PlannedModel,
)
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.config.support import Support, Yes
from spectral_scale.engine.build import Run, build_run, check_inputs
from spectral_scale.errors import ConfigError
from spectral_scale.methods.base import ControllerParts, Method, target_patterns
from spectral_scale.methods.convert import replace_linears
from spectral_scale.methods.layer import FactoredLinear, factored_layers
from spectral_scale.parallel.rank_info import detect_rank_info
from spectral_scale.parallel.table import Role
from spectral_scale.plan.build import plan_run
from spectral_scale.testing.tiny import tiny_config, train_tiny

NEW_FILES = (
    "spectral_scale/config/methods/toy.py",  # SPEC
    "spectral_scale/methods/toy/__init__.py",
    "spectral_scale/methods/toy/layer.py",  # ToyLinear
    "spectral_scale/methods/toy/controller.py",  # ToyController
    "spectral_scale/methods/toy/method.py",  # METHOD
)
"""The files that a method such as this one consists of; docs/architecture.md counts them."""
FILES_WITH_A_LINE = (
    "spectral_scale/config/methods/__init__.py",  # METHOD_SPECS
    "spectral_scale/config/schema.py",  # the choices of spectral.method, for --help-config
    "spectral_scale/config/support_torch.py",  # what is proved on a backend; one file a backend
    "spectral_scale/engine/methods.py",  # METHODS
)
"""Files that name the method once, so that it is shipped."""


# -- what would be config/methods/toy.py ------------------------------------------------------


def _memory(_: SpectralConfig, model: PlannedModel) -> MethodMemory:
    return MethodMemory(saved=sum(model.itemsize * m * n for m, n in model.matrices.values()))


def _traffic(_: SpectralConfig, model: PlannedModel) -> MethodTraffic:
    return MethodTraffic(swap=model.frozen_bytes)


SPEC = MethodSpec(
    name="toy",
    title="Toy",
    converts=True,
    keys=frozenset({"spectral.steps_per_iteration"}),
    tensor_parallel=False,
    swaps=True,
    memory=_memory,
    traffic=_traffic,
)
CAPABILITY: dict[str, Support] = {"method=toy": Yes("tests/unit/methods/test_methods_toy.py")}


# -- what would be methods/toy/ ---------------------------------------------------------------


class ToyLinear(FactoredLinear):
    """y = (x base^T) scale + bias; scale (out,) trains."""

    parameter_roles: ClassVar[dict[str, Role]] = {"scale": "factor", "base": "base"}

    def __init__(self, linear: nn.Linear, frozen_dtype: torch.dtype | None) -> None:
        super().__init__(linear.in_features, linear.out_features)
        device, dtype = linear.weight.device, linear.weight.dtype
        self.scale = nn.Parameter(torch.ones(linear.out_features, device=device, dtype=dtype))
        base = torch.zeros(linear.weight.shape, device=device, dtype=frozen_dtype or dtype)
        self.base = nn.Parameter(base, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base) * self.scale
        return y if self.bias is None else y + self.bias

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"scale": (self.out_features,)}

    def effective_weight(self) -> Tensor:
        return self.base * self.scale[:, None]


@dataclass(kw_only=True)
class Fold:
    """What one fold touched."""

    layers: int

    def metrics(self) -> dict[str, Any]:
        return {"toy/layers": self.layers}


class ToyController:
    """Gives layers their weight, and folds their factors into it."""

    def __init__(self, parts: ControllerParts) -> None:
        self.store, self.collective = parts.store, parts.collective
        self.every = parts.config.spectral.steps_per_iteration
        self.applied_steps = 0
        self.layers = {n: m for n, m in factored_layers(parts.model).items()}
        if parts.fresh:
            for name in self.layers:
                self._give(name, parts.dense_weight(name))

    def _give(self, name: str, base: Tensor) -> None:
        layer: Any = self.layers[name]
        self.store.scatter(
            {f"{name}.base": base, f"{name}.scale": torch.ones(layer.out_features)}, owner=0
        )
        layer.ready = True

    def after_step(self) -> Fold | None:
        self.applied_steps += 1
        if self.applied_steps % self.every:
            return None
        for name, layer in self.layers.items():
            self._give(name, layer.effective_weight().detach().clone())
        self.store.reset_moments([f"{name}.scale" for name in self.layers])
        return Fold(layers=len(self.layers))

    def lr_factor(self) -> float:
        return 1.0

    def nbytes(self) -> int:
        return 0

    def describe(self) -> str:
        return f"toy: {len(self.layers)} matrices"

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self.layers.items():
            yield f"toy/{name}", layer.get_parameter("base")

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        self.applied_steps = applied_steps
        for name, layer in self.layers.items():
            self.store.scatter({f"{name}.base": read(f"toy/{name}")}, owner=0)
            layer.ready = True


def _convert(model: nn.Module, config: SpectralConfig, frozen_dtype: torch.dtype) -> object:
    targets = target_patterns(config)
    return replace_linears(
        model, 1, lambda linear: ToyLinear(linear, frozen_dtype), targets=targets
    )


METHOD = Method(convert=_convert, controller=ToyController)


# -- the tests --------------------------------------------------------------------------------

SPECS = {**METHOD_SPECS, "toy": SPEC}
METHODS: Mapping[str, Method] = {"toy": METHOD}
TABLES = {**CAPABILITIES, "torch": {**CAPABILITIES["torch"], **CAPABILITY}}


def toy_config(corpus: Path, run_dir: Path, **changes: Any) -> RunConfig:
    config = tiny_config(corpus, run_dir, **changes)
    spectral: Any = replace(config.spectral, method="toy")  # type: ignore[arg-type]
    return replace(config, spectral=spectral)


def resolved(config: RunConfig) -> ResolvedRun:
    return resolve(config, world_size=1, methods=SPECS, capabilities=TABLES)


def build(config: RunConfig) -> Run:
    return build_run(check_inputs(resolved(config), detect_rank_info()), METHODS)


def test_it_trains_and_resumes_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    straight = train_tiny(toy_config(corpus, tmp_path / "straight"), build=build)
    losses = straight["losses"]
    assert losses[12] < losses[1]
    folds = [step for step, values in straight["lines"] if values.get("toy/layers") == 12]
    assert folds == [4, 8, 12]
    first = train_tiny(toy_config(corpus, tmp_path / "parts"), stop_after=6, build=build)
    assert first["step"] == 6
    second = train_tiny(toy_config(corpus, tmp_path / "parts"), build=build)
    assert first["losses"] | second["losses"] == losses
    assert straight["tensors"].keys() == second["tensors"].keys()
    assert any(name.startswith("toy/") for name in straight["tensors"])
    for name, tensor in straight["tensors"].items():
        np.testing.assert_array_equal(second["tensors"][name], tensor, err_msg=name)


def test_it_is_planned(corpus: Path, tmp_path: Path) -> None:
    run = resolved(toy_config(corpus, tmp_path))
    plan = plan_run(run, gpu_memory_bytes=80e9, methods=METHODS)
    elements = plan.parameters_frozen  # every base, and nothing else, is frozen
    assert elements == 2 * 12 * 32**2
    assert plan.boundary_every_steps == 4
    assert plan.boundary_traffic_bytes == 4 * elements
    assert plan.checkpoint_bytes == 4 * (3 * plan.parameters_trained + elements)


def test_it_is_unknown_to_whoever_was_not_handed_it(corpus: Path, tmp_path: Path) -> None:
    config = toy_config(corpus, tmp_path)
    with pytest.raises(ConfigError, match=r"method=toy is not known; it must be one of \['full'"):
        resolve(config, world_size=1)
    with pytest.raises(ConfigError, match=r"Toy \(method=toy\) does not run on torch"):
        resolve(config, world_size=1, methods=SPECS)


def test_its_specification_decides_whether_it_is_tensor_parallel(
    corpus: Path, tmp_path: Path
) -> None:
    """A row of the capability table that promises more is not believed."""
    proved = {**CAPABILITIES["fsdp2+tp"], **CAPABILITY}
    config = toy_config(corpus, tmp_path, parallel__backend="fsdp2", parallel__tensor_parallel=2)

    def resolve_with(spec: MethodSpec) -> None:
        tables = {**TABLES, "fsdp2+tp": proved}
        resolve(config, world_size=2, methods={**SPECS, "toy": spec}, capabilities=tables)

    resolve_with(replace(SPEC, tensor_parallel=True))
    with pytest.raises(ConfigError, match=r"on fsdp2\+tp: its layers have no tensor-parallel form"):
        resolve_with(SPEC)


def test_what_a_new_method_touches() -> None:
    """The files that name a shipped method but are not its own are those that are listed."""
    root = Path(__file__).parents[3]
    assert all((root / name).is_file() for name in FILES_WITH_A_LINE)
    assert len(NEW_FILES) == 5 and len(FILES_WITH_A_LINE) == 4
