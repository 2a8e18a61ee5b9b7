"""Variants of one model that are tuned with the same budget, and the runs of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from study.results import Result
from study.settings import TUNING_RUNS, Settings, Variant
from study.trial import Trial
from study.tuning import best_rate, next_rate

TUNE = "tune"
"""The stage of tuning runs."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """What variants have in common: their model, and how they are tuned."""

    full: Variant
    """Dense training, whose tuned rate the dense parameters of all others take."""
    common: Settings
    """Settings of every run."""
    tune_steps: int
    """Of a tuning run, with the first seed."""
    tune_changes: Settings = field(default_factory=dict)
    """Settings of tuning runs alone."""
    most: int = TUNING_RUNS
    """Rates tried at most, where the best one lies at the edge of fewer; see `next_rate`."""

    def tuned_rates(self, results: Mapping[str, Result], variant: Variant) -> dict[float, float]:
        """Validation loss by learning rate of the variant's tuning runs so far, as tried."""
        losses: dict[float, float] = {}
        while (rate := self._next(losses, variant)) is not None:
            result = results.get(tune_name(variant, rate))
            if result is None:
                break
            losses[rate] = result.loss
        return losses

    def chosen_rate(self, results: Mapping[str, Result], variant: Variant) -> float | None:
        """The best learning rate once the variant's tuning is complete."""
        losses = self.tuned_rates(results, variant)
        return best_rate(losses) if self._next(losses, variant) is None else None

    def settings_of(self, variant: Variant, rate: float, dense_rate: float | None) -> Settings:
        """A variant's settings at one rate; `dense_rate` is that of embeddings and norms."""
        rates: Settings = {variant.rate_key: rate}
        if variant.rate_key != "optimizer.lr":
            rates["optimizer.lr"] = dense_rate
        return self.common | variant.settings | rates

    def tune(self, results: Mapping[str, Result], variant: Variant, turn: int) -> Trial | None:
        """The variant's tuning run of a turn, counted from 0; None if its tuning ends before."""
        losses = self.tuned_rates(results, variant)
        tried = list(losses)
        rate = tried[turn] if turn < len(tried) else None
        if turn == len(tried):
            rate = self._next(losses, variant)
        if rate is None:
            if turn >= TUNING_RUNS:
                return None  # whether the edge is passed shows with the tries before it
            name = f"{TUNE}-{variant.name}-try_{turn + 1}"
            return self._waiting(name, TUNE, self.tune_steps, "the tries before it")
        name, dense_rate = tune_name(variant, rate), self.chosen_rate(results, self.full)
        if variant is not self.full and dense_rate is None:
            waits = "the learning rate of full rank, which dense parameters take"
            return self._waiting(name, TUNE, self.tune_steps, waits)
        own = self.settings_of(variant, rate, dense_rate) | self.tune_changes
        settings = sized(own, self.tune_steps, seed=0)
        return Trial(name=name, stage=TUNE, steps=self.tune_steps, settings=settings)

    def after_tuning(
        self,
        results: Mapping[str, Result],
        name: str,
        stage: str,
        variant: Variant,
        changes: Settings,
        *,
        steps: int,
        seed: int = 0,
        rate_factor: float = 1.0,
    ) -> Trial:
        """A run at the variant's tuned rate times a factor, with some settings changed."""
        rate, dense_rate = (self.chosen_rate(results, v) for v in (variant, self.full))
        if rate is None or dense_rate is None:
            return self._waiting(name, stage, steps, f"the tuning of {variant.title}")
        own = self.settings_of(variant, float(f"{rate * rate_factor:.3g}"), dense_rate) | changes
        settings = sized(own, steps, seed=seed)
        return Trial(name=name, stage=stage, steps=steps, settings=settings)

    def _next(self, losses: Mapping[float, float], variant: Variant) -> float | None:
        return next_rate(losses, variant.first_rate, most=self.most)

    def _waiting(self, name: str, stage: str, steps: int, waits_for: str) -> Trial:
        return Trial(name=name, stage=stage, steps=steps, settings=None, waits_for=waits_for)


def tune_name(variant: Variant, rate: float) -> str:
    """The name of a variant's tuning run at a rate, which variants with one tuning share."""
    return f"{TUNE}-{variant.tuned_as or variant.name}-lr_{rate:g}"


def sized(own: Settings, steps: int, *, seed: int) -> Settings:
    """Settings with the length and the seed of a run."""
    return own | {"train.steps": steps, "train.seed": seed}
