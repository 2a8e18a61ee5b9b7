"""Sparse Spectral Training in the stock Trainer of transformers: one line, `attach`."""

from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from spectral_scale import SpectralConfig
from spectral_scale.integrations.transformers import attach


def main(model: str | PreTrainedModel, dataset: object, **settings: object) -> Trainer:
    """Train a model, given as it is or by its path, on a dataset of input_ids and labels."""
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model)
    arguments = TrainingArguments(**settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    attach(trainer, SpectralConfig(spectral_rank=8, steps_per_iteration=5))
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()  # an ordinary dense model
    return trainer
