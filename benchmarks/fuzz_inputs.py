"""Mutated inputs: each must be refused by name or read as what it says, within 20 seconds.

    python benchmarks/fuzz_inputs.py --cases 500 --seed 0

Exit code 1 if any case ended in another exception than the package's own, hung, or succeeded with
content that an independent reader does not find in it.
"""

import argparse
import gzip
import io
import json
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spectral_scale.config.deepspeed_json import read_deepspeed_json
from spectral_scale.config.load import load_config
from spectral_scale.data.prepare import prepare
from spectral_scale.data.records import BadDocument, extract_text
from spectral_scale.data.sources import find_sources, read_records
from spectral_scale.data.tokens import open_tokens
from spectral_scale.errors import SpectralScaleError

LIMIT_SECONDS = 20
YAML = (
    b"train: {run_dir: runs/x, steps: 20, seed: 7}\noptimizer: {lr: 1.0e-3, betas: [0.9, 0.95]}\n"
)
DEEPSPEED = b'{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "x": [1, null, 2.5]}'
LINES = b"".join(b'{"text": "document %d of words", "n": [1]}\n' % i for i in range(20))
SIGNS = b"{}[]\":,\n\0\xff0-~$#&*!|>%@`'\\ \t"


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, inserted, removed, repeated, or the end cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(found) + 1), rng.randint(1, 12)
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at:at] = bytes([rng.choice(SIGNS)])
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[at : at + length] * rng.randint(1, 3)
        elif kind == 4:
            del found[at:]
        elif at < len(found):
            found[at] = rng.choice(SIGNS)
    return bytes(found)


def read_yaml(file: Path, tokens: Path) -> None:
    load_config([file])


def read_json(file: Path, tokens: Path) -> None:
    found = read_deepspeed_json(str(file))
    if not isinstance(json.loads(file.read_text()), dict):
        raise AssertionError(f"not an object, read as {found}")


def texts(file: Path) -> list[str]:
    """What `prepare` would take from a file; raises the package's own errors."""
    return [
        extract_text(record, "text")
        for source in find_sources([file])
        for record in read_records(source, text_field="text")
    ]


def read_lines(file: Path, tokens: Path) -> None:
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    expected = [json.loads(line)["text"] for line in data.split(b"\n") if line.strip()]
    if texts(file) != expected:
        raise AssertionError("other texts than the json module finds")


def lines(file: Path, tokens: Path) -> None:
    found = texts(file)  # the package's own refusal comes first
    read_lines(file, tokens)
    assert isinstance(found, list)


def read_parquet(file: Path, tokens: Path) -> None:
    found = texts(file)
    if found != pq.read_table(file, columns=["text"]).column(0).to_pylist():
        raise AssertionError("other texts than pyarrow finds")


def read_tokens(file: Path, tokens: Path) -> None:
    """`file` replaces a file of a sound token folder; verification must notice any change."""
    part = tokens / file.name
    sound = part.read_bytes()
    fingerprint = open_tokens(tokens).fingerprint
    try:
        part.write_bytes(file.read_bytes())
        folder = open_tokens(tokens)
        folder.verify()
        if folder.fingerprint != fingerprint:
            raise AssertionError("another token stream passed verification")
    finally:
        part.write_bytes(sound)


def on_alarm(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {LIMIT_SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, on_alarm)
    rng, outcomes, bad = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "sound.jsonl").write_bytes(LINES)
        tokens = root / "tokens"
        prepare([root / "sound.jsonl"], tokens, train_bpe=300, progress=False)
        table = io.BytesIO()
        pq.write_table(pa.table({"text": [f"document {i}" for i in range(50)]}), table)
        kinds: list[tuple[str, bytes, Callable[[Path, Path], None]]] = [
            ("a.yaml", YAML, read_yaml),
            ("ds.json", DEEPSPEED, read_json),
            ("a.jsonl", LINES, lines),
            ("a.jsonl.gz", gzip.compress(LINES), lines),
            ("a.parquet", table.getvalue(), read_parquet),
            *(
                (part, (tokens / part).read_bytes(), read_tokens)
                for part in ("index.json", "shard_00000.bin", "shard_00000.docs.bin")
            ),
        ]
        for case in range(options.cases):
            file_name, data, read = kinds[case % len(kinds)]
            file = root / file_name
            file.write_bytes(mutate(data, rng))
            signal.alarm(LIMIT_SECONDS)
            try:
                read(file, tokens)
                outcome = "read"
            except (SpectralScaleError, BadDocument):
                outcome = "refused"
            except Exception:
                outcome, bad = "BAD", bad + 1
                print(f"case {case}, {file_name}: {file.read_bytes()[:300]!r}", file=sys.stderr)
                traceback.print_exc(limit=-3)
            finally:
                signal.alarm(0)
            outcomes[f"{file_name} {outcome}"] += 1
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:5d}  {outcome}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
