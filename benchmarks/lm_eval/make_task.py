"""Two lm-eval tasks from local text: perplexity, and which of four continuations is the right one.

    python benchmarks/lm_eval/make_task.py --input valid.jsonl --output tasks
    lm_eval --model hf --model_args pretrained=exported --include_path tasks \\
        --tasks local_perplexity,local_continuation --device cpu --batch_size 8

Needs the `eval` extra for the second command; nothing is downloaded.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

CHOICES = 4
WORDS = 48
"""Of a context; a continuation has a third of that."""

PERPLEXITY = """\
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
CONTINUATION = """\
task: local_continuation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def passages(file: Path) -> Iterator[list[str]]:
    """Runs of words of every document, long enough for a context and its continuation."""
    length = WORDS + WORDS // 3
    for line in file.read_text(encoding="utf-8").splitlines():
        words = json.loads(line)["text"].split()
        yield from (words[i : i + length] for i in range(0, len(words) - length, length))


def questions(found: list[list[str]], chance: random.Random) -> Iterator[dict[str, object]]:
    """One question a passage; the wrong continuations are those of other passages."""
    for words in found:
        others = chance.sample([other for other in found if other is not words], CHOICES - 1)
        answer = chance.randrange(CHOICES)
        ends = [" ".join(other[WORDS:]) for other in others]
        ends.insert(answer, " ".join(words[WORDS:]))
        yield {"context": " ".join(words[:WORDS]), "choices": ends, "answer": answer}


def write(folder: Path, name: str, template: str, rows: list[dict[str, object]]) -> None:
    """The rows as NAME.jsonl and the task that reads them as NAME.yaml."""
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(template.format(file=data), encoding="utf-8")


def main() -> None:
    """Write the two tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with a `text`")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--passages", type=int, default=200, help="how many are used (200)")
    arguments = parser.parse_args()
    chance = random.Random(0)
    everything = list(passages(arguments.input))
    if len(everything) < CHOICES:
        parser.error(f"{arguments.input} holds {len(everything)} passages; {CHOICES} are needed")
    found = chance.sample(everything, min(arguments.passages, len(everything)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    texts: list[dict[str, object]] = [{"text": " ".join(words)} for words in found]
    write(arguments.output, "local_perplexity", PERPLEXITY, texts)
    write(arguments.output, "local_continuation", CONTINUATION, list(questions(found, chance)))


if __name__ == "__main__":
    main()
