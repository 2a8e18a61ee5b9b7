"""The settings of `prepare`: their checks, their names in the index, and the split into parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectral_scale.data.order import hash64
from spectral_scale.data.tokenizer import check_bpe_vocab, source_sha256
from spectral_scale.errors import ConfigError

OnBad = Literal["error", "skip"]
SHARD_TOKENS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The choices of one `prepare`; see there."""

    tokenizer: Path | None = None
    """Folder of the tokenizer; None to train one."""
    train_bpe: int | None = None
    """Vocabulary size of the tokenizer to train; None to use a given one."""
    text_field: str = "text"
    """Field or column that holds the text."""
    on_bad: OnBad = "error"
    """Treatment of a document that cannot be used."""
    shard_tokens: int = SHARD_TOKENS
    """A shard is closed once it holds this many tokens."""
    split_validation: float = 0.0
    """Share of the documents that goes to the `valid` folder."""
    seed: int = 0
    """Seed that chooses the documents of the `valid` folder."""

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            ConfigError: names the setting, what was given and what is required.
        """
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise ConfigError("exactly one of --tokenizer FOLDER and --train-bpe N is required")
        if self.train_bpe is not None:
            check_bpe_vocab(self.train_bpe)
        if self.on_bad not in ("error", "skip"):
            raise ConfigError(f"--on-bad {self.on_bad!r}: error or skip is required")
        if self.shard_tokens < 1:
            raise ConfigError(f"--shard-tokens {self.shard_tokens}: at least 1 is required")
        if not 0 <= self.split_validation < 1:
            raise ConfigError(
                f"--split-validation {self.split_validation}: a share from 0 to below 1 is required"
            )

    def parts(self, output: Path) -> dict[str, Path]:
        """The folders to write, by the part of the documents they get."""
        if not self.split_validation:
            return {"all": output}
        return {"train": output / "train", "valid": output / "valid"}

    def part_of(self, document: int) -> str:
        """The part that a document belongs to, by its number among all inputs' documents."""
        if not self.split_validation:
            return "all"
        held_out = hash64(self.seed, document) < self.split_validation * 2.0**64
        return "valid" if held_out else "train"

    def request(self) -> dict[str, Any]:
        """Everything the result depends on besides the inputs, as JSON; kept in the index."""
        tokenizer = (
            {"train_bpe": self.train_bpe}
            if self.tokenizer is None
            else {"sha256": source_sha256(self.tokenizer)}
        )
        return {
            "tokenizer": tokenizer,
            "text_field": self.text_field,
            "on_bad": self.on_bad,
            "shard_tokens": self.shard_tokens,
            "split_validation": self.split_validation,
            "seed": self.seed if self.split_validation else None,
        }
