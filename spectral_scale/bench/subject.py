"""One variant of the step: a model, its optimizer and controller, as training composes them."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from spectral_scale.backends.torch.backend import TorchBackend
from spectral_scale.bench.settings import StepSettings, Variant, run_config
from spectral_scale.bench.workload import Workload, build_on_meta, give_memory
from spectral_scale.config.methods import method_name
from spectral_scale.config.presets import Architecture
from spectral_scale.engine.build import frozen_dtype
from spectral_scale.engine.methods import METHODS, open_controller
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.tangent.controller import TangentController
from spectral_scale.metrics.measures import StepTimer, tensor_bytes
from spectral_scale.models.weights import KeyedWeights, initialise_dense
from spectral_scale.ops.precision import set_product_precision
from spectral_scale.optim.build import state_tensors
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.parallel.table import parameter_table


class Subject:
    """Takes steps and swaps with the parts and defaults that a training run has.

    Args:
        settings: the model and the method's settings.
        variant: what this subject is.
        architecture: shapes of the whole model.
        workload: its batch.
    """

    def __init__(
        self,
        settings: StepSettings,
        variant: Variant,
        architecture: Architecture,
        workload: Workload,
    ) -> None:
        self.variant, self.workload = variant, workload
        self._config = config = run_config(settings, variant)
        self._backend = TorchBackend(RankInfo(), config.train.device)
        set_product_precision(tf32=config.train.tf32)
        self._autocast = config.train.precision == "bf16"
        method = METHODS[method_name(config.spectral)]
        self.model = build_on_meta(settings, architecture)
        method.convert(self.model, config.spectral, frozen_dtype(config))
        give_memory(self.model, self._backend.device)
        weights = KeyedWeights(config.train.seed)
        initialise_dense(self.model, parameter_table(self.model), weights)
        self._backend.shard(self.model)
        self.optimizer = method.optimizer(self.model, config, self._backend.collective)
        self._backend.attach(self.optimizer)
        controller = open_controller(
            method,
            model=self.model,
            optimizer=self.optimizer,
            config=config,
            collective=self._backend.collective,
            store=self._backend.store(),
            weights=weights,
            dtype=torch.float32,
            fresh=True,
        )
        self.controller = (
            controller if isinstance(controller, SpectralController | TangentController) else None
        )

    @property
    def synchronize(self) -> Callable[[], None] | None:
        """The function that waits for the device; None if the device is the CPU."""
        return torch.cuda.synchronize if self._backend.device.type == "cuda" else None

    def forward_backward(self, timer: StepTimer) -> None:
        """Gradients of one batch on the parameters; times `forward` and `backward`."""
        device = self._backend.device.type
        autocast = torch.autocast(device, torch.bfloat16) if self._autocast else nullcontext()
        with timer.phase("forward"), autocast:
            output = self.workload.forward(self.model)
        with timer.phase("backward"):
            self.workload.backward(output)

    def step(self, timer: StepTimer) -> None:
        """One training step without a swap: forward, backward, then clip, update, retract."""
        self.forward_backward(timer)
        with timer.phase("optimizer"):
            self._backend.step(clip_grad_norm=self._config.optimizer.clip_grad_norm)
            if self.controller is not None and self.controller.after_step() is not None:
                raise RuntimeError("a swap fell among the timed steps")

    def swap(self, timer: StepTimer, *, iteration: int) -> int:
        """Begin `iteration` as training does, timed as `swap`; the number of matrices that were
        decomposed again."""
        controller = self.controller
        if controller is None:
            raise RuntimeError(f"{self.variant} has no swaps")
        controller.applied_steps = iteration * controller.schedule.steps_per_iteration - 1
        with timer.phase("swap"):
            report = controller.after_step()
        if report is None or report.iteration != iteration:
            raise RuntimeError(f"iteration {iteration} did not begin")
        return report.redecomposed

    def state_bytes(self) -> dict[str, int]:
        """Counted bytes by use; call it while the parameters hold their gradients."""
        parameters = list(self.model.parameters())
        return {
            "weights": tensor_bytes(parameters),
            "gradients": tensor_bytes(p.grad for p in parameters),
            "moments": tensor_bytes(state_tensors(self.optimizer)),
            "bank": tensor_bytes(self._bank_tensors()),
        }

    def _bank_tensors(self) -> list[Tensor]:
        if self.controller is None:
            return []
        return [tensor for _, tensor in self.controller.state_tensors()]
