"""Opens token folders for a saved run, and refuses those of another tokenizer."""

from pathlib import Path

from spectral_scale.artifacts.restore import SavedRun
from spectral_scale.config.schema import DataConfig
from spectral_scale.data.embedded import embedded_corpus
from spectral_scale.data.tokenizer_match import require_tokenizer
from spectral_scale.data.tokens import TOKENIZER_NAME, TokenFolder, file_sha256, open_tokens
from spectral_scale.engine.data import EMBEDDED, check_vocabulary
from spectral_scale.errors import DataError


def tokens_of_run(run: SavedRun, data: Path | None = None) -> TokenFolder:
    """Open the given token folder, else the run's validation data, else its training data.

    Raises:
        DataError: none of them can be opened; says why for each.
        ConfigError: the tokenizer is not the one the run was trained with.
    """
    candidates = [data] if data is not None else _folders_of(run.config.data)
    failures = []
    for folder in candidates:
        try:
            tokens = open_tokens(folder)
        except DataError as error:
            failures.append(str(error))
            continue
        require_tokenizer(tokens, run.tokenizer_sha256, owner=f"the run in {run.folder}")
        check_vocabulary(run.architecture.vocab_size, tokens)
        return tokens
    raise DataError(
        f"no data of the run in {run.folder} can be opened here:\n  - "
        + "\n  - ".join(failures)
        + "\nnames in its config.yaml count from the folder it was started in; "
        "or give --data FOLDER, prepared with the same tokenizer"
    )


def require_undamaged_tokenizer(tokens: TokenFolder) -> None:
    """Raise DataError if a token folder's tokenizer is not the one its index names."""
    file = tokens.tokenizer_path / TOKENIZER_NAME
    found = file_sha256(file)
    if found != tokens.tokenizer_sha256:
        raise DataError(
            f"{file}: checksum {found[:16]}..., the index has {tokens.tokenizer_sha256[:16]}...; "
            "it was changed after the data was prepared, prepare the folder again"
        )


def _folders_of(data: DataConfig) -> list[Path]:
    """The run's token folders, validation first; the embedded corpus is made if need be."""
    train, validation = data.train, data.validation
    if train == EMBEDDED:
        corpus, held_out = embedded_corpus()
        train, validation = str(corpus), validation or str(held_out)
    return [Path(name) for name in (validation, train) if name is not None]
