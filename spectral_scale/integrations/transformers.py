"""The methods in the `Trainer` of transformers, and in what derives from it.

`attach` is all that a script adds between building its trainer and `trainer.train()`:

    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    attach(trainer, SpectralConfig(spectral_rank=16, steps_per_iteration=200))
    trainer.train()

The trainer stays the stock one: accumulation, clipping, bf16, evaluation, checkpoints and resuming
are its own. Learning rates, betas, epsilon, weight decay and the seed are those of its arguments.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from spectral_scale.config.methods import method_name
from spectral_scale.config.schema import FilterConfig, RunConfig, SpectralConfig
from spectral_scale.engine.methods import METHODS, convert_model
from spectral_scale.errors import CheckpointError, SpectralError
from spectral_scale.integrations.checkpoint_files import (
    Facts,
    find_saved,
    fingerprint,
    require_settings,
    write_files,
)
from spectral_scale.integrations.trainer_rules import refuse, run_config
from spectral_scale.methods.base import ControllerParts, ControllerReport, MethodController
from spectral_scale.methods.convert import merge
from spectral_scale.methods.layer import factored_layers, weights_set_aside
from spectral_scale.methods.lr_ramp import ramp_learning_rates
from spectral_scale.optim.build import create_state
from spectral_scale.optim.filter.saved_chunks import SavedChunks
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.parallel.group import present_group
from spectral_scale.parallel.store import TorchStore
from spectral_scale.parallel.table import parameter_table

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    spectral: SpectralConfig,
    *,
    filter_config: FilterConfig | None = None,
    spectral_lr: float | None = None,
    merge_at_end: bool = True,
    resume_from: str | Path | None = None,
) -> "SpectralTrainerCallback":
    """Let a trainer train its model by a method; to be called before `trainer.train()`.

    Converts `trainer.model` in place, gives the trainer the method's optimizer, and adds a
    callback that opens the method's controller, follows every optimizer step and writes what the
    method must remember into each `checkpoint-N`. `trainer.train(resume_from_checkpoint=...)` works
    as ever. On several processes it runs under DistributedDataParallel.

    Args:
        trainer: not trained yet, without an optimizer of its own.
        spectral: the method and its settings.
        filter_config: filters gradients before the step; needs `max_grad_norm=0`, because the
            trainer clips before a callback can filter.
        spectral_lr: learning rate of what the method trains; by default `learning_rate`.
        merge_at_end: make the model dense again when training ends, so that `save_model()` writes
            an ordinary folder.
        resume_from: the folder that is resumed from, if it lies outside `output_dir`.

    Raises ConfigError for what is not supported, naming it, before anything is changed.
    """
    config = run_config(trainer.args, spectral, filter_config, spectral_lr)
    refuse(trainer, config)
    callback = SpectralTrainerCallback(
        trainer, config, merge_at_end=merge_at_end, resume_from=resume_from
    )
    trainer.optimizer = callback.optimizer
    trainer.add_callback(callback)
    return callback


class SpectralTrainerCallback(TrainerCallback):
    """Follows a trainer's steps for a method; `attach` makes it.

    `controller` is there once training has begun; `swaps` counts the swaps, merges or renewals
    of this process.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: RunConfig,
        *,
        merge_at_end: bool,
        resume_from: str | Path | None,
    ) -> None:
        self.config = config
        self.swaps = 0
        self.controller: MethodController | None = None
        self.filter: SpectralFilter | None = None
        self._trainer, self._merge_at_end, self._resume_from = trainer, merge_at_end, resume_from
        self._collective = present_group()
        self._method = METHODS[method_name(config.spectral)]
        frozen_dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        model: Any = trainer.model
        convert_model(model, config.spectral, frozen_dtype)
        self.optimizer = self._method.optimizer(model, config, self._collective)
        create_state(self.optimizer)
        self._applied = False
        self._applied_steps = 0
        self._open = self._merged = False
        self._reports: list[dict[str, float]] = []
        self.optimizer.register_step_post_hook(self._note_step)

    # -- what the trainer calls --------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the controller, and take the saved state over if training is resumed."""
        if self._merged:
            raise SpectralError(
                "the model was merged when training ended; build and attach a new trainer, or "
                "attach with merge_at_end=False"
            )
        saved: dict[str, Tensor] = {}
        if state.global_step:
            saved = self._find(list(_resumed_folders(args, state, self._resume_from)))
        if not self._open:
            self._start(fresh=not state.global_step)
            self._open = True
        if state.global_step:
            self._load(saved)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Filter the gradients, where a filter is configured."""
        if self.filter is not None:
            self.filter.apply(
                measure=(state.global_step + 1) % max(int(state.logging_steps), 1) == 0
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow a step that the optimizer took; a swap takes place here."""
        if not self._applied:
            return
        self._applied = False
        self._applied_steps += 1
        if self.filter is not None:
            self.filter.commit()
        report = None if self.controller is None else self.controller.after_step()
        if report is not None:
            self._swapped(report)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the step's swap as the trainer logs its own numbers."""
        values: dict[str, float] = {}
        while self._reports:
            values |= self._reports.pop(0)
        if self.filter is not None:
            found = self.filter.metrics()
            values |= _numbers(found) if control.should_log else {}
        if values:
            due = control.should_log
            self._trainer.log(values)
            control.should_log = due  # log() marks the step's own log as done

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write this rank's part of the method's state beside the trainer's files."""
        if args.save_only_model:
            return
        tensors = dict(self.controller.state_tensors()) if self.controller is not None else {}
        if self.filter is not None:
            tensors |= {chunk.key: chunk.tensor.clone() for chunk in self.filter.state_chunks()}
        model: Any = self._trainer.model
        facts = Facts(
            applied_steps=self._applied_steps,
            fingerprint=fingerprint(model),
            settings=self._settings(),
        )
        write_files(
            _folder(args, state.global_step),
            tensors,
            facts,
            rank=self._collective.rank,
            world_size=self._collective.world_size,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the model dense again."""
        model: Any = self._trainer.model
        if self._merge_at_end and factored_layers(model):
            merged = merge(model)
            self._merged = True
            logger.info("merged %d layers: the model is dense again", merged)

    # -- small parts -------------------------------------------------------------------------

    def _note_step(self, *_: object) -> None:
        self._applied = True

    def _find(self, folders: list[Path]) -> dict[str, Tensor]:
        """The saved tensors of the folder whose weights the model has."""
        model: Any = self._trainer.model
        folder, saved, facts = find_saved(folders, model)
        require_settings(folder, facts.settings, self._settings())
        self._applied_steps = facts.applied_steps
        return saved

    def _start(self, *, fresh: bool) -> None:
        """Open the controller and the filter. Collective."""
        model: Any = self._trainer.model
        store = TorchStore(model, self.optimizer, self._collective)
        self.controller = self._method.controller(
            ControllerParts(
                model=model,
                optimizer=self.optimizer,
                config=self.config,
                collective=self._collective,
                store=store,
                dense_weight=weights_set_aside(factored_layers(model)),
                dtype=torch.float32,
                fresh=fresh,
            )
        )
        if self.config.filter.enabled:
            table, shards = parameter_table(model), store.shards()
            self.filter = SpectralFilter(
                shards,
                {fqn: table[fqn].role for fqn in shards.shapes},
                self.config.filter,
                seed=self.config.train.seed,
                head_size=_head_size(model.config),
            )
        if self.controller is None:
            return
        if any(group.get("spectral") for group in self.optimizer.param_groups):
            ramp_learning_rates(self.optimizer, self.controller.lr_factor)
        logger.info("%s", self.controller.describe())

    def _load(self, saved: dict[str, Tensor]) -> None:
        """Take over what a checkpoint holds of the method. Collective."""
        if self.controller is not None:
            self.controller.load_state(_reader(saved), self._applied_steps)
        if self.filter is not None:
            self.filter.load_state(SavedChunks(saved).read)
        model: Any = self._trainer.model
        for layer in factored_layers(model).values():
            layer.initial_weight = None

    def _swapped(self, report: ControllerReport) -> None:
        self.swaps += 1
        if self.filter is not None:
            self.filter.after_swap()
        self._reports.append(_numbers(report.metrics()))

    def _settings(self) -> dict[str, Any]:
        sections: dict[str, Any] = {"spectral": self.config.spectral, "filter": self.config.filter}
        settings = {
            f"{name}.{key}": value
            for name, section in sections.items()
            for key, value in asdict(section).items()
        }
        del settings["spectral.bank_device"]  # where the same numbers lie
        return settings | {"seed": self.config.train.seed}


def _resumed_folders(
    args: TrainingArguments, state: TrainerState, given: str | Path | None
) -> Iterator[Path]:
    """Folders that training may be resumed from; the trainer tells a callback only the step."""
    if given is not None:
        yield Path(given)
        return
    if isinstance(args.resume_from_checkpoint, str) and Path(args.resume_from_checkpoint).is_dir():
        yield Path(args.resume_from_checkpoint)
    yield _folder(args, state.global_step)


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"


def _reader(saved: dict[str, Tensor]) -> Any:
    def read(name: str) -> Tensor:
        if name not in saved:
            raise CheckpointError(
                f"{name} is missing from the checkpoint; resume with the model that it was saved of"
            )
        return saved[name]

    return read


def _head_size(model_config: Any) -> int | None:
    """Rows of an attention head, as far as a model's configuration tells."""
    heads = getattr(model_config, "num_attention_heads", None)
    width = getattr(model_config, "hidden_size", None)
    size = getattr(model_config, "head_dim", None)
    return size or (width // heads if heads and width else None)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The entries that a trainer's loggers take."""
    return {k: v for k, v in values.items() if isinstance(v, int | float)}
