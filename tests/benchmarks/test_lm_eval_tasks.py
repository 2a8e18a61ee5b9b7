"""The lm-eval tasks made from local text ask what they claim to ask."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lm_eval" / "make_task.py"


def test_each_question_has_its_own_continuation_at_the_answer(tmp_path) -> None:
    texts = [" ".join(f"w{document}.{n}" for n in range(200)) for document in range(5)]
    source = tmp_path / "valid.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(SCRIPT), "--input", str(source), "--output", str(tmp_path)]
    subprocess.run(command, check=True)

    lines = (tmp_path / "local_continuation.jsonl").read_text().splitlines()
    assert len(lines) == 15
    for question in map(json.loads, lines):
        right = question["choices"][question["answer"]]
        assert any(f"{question['context']} {right}" in text for text in texts)
        assert len(set(question["choices"])) == 4

    for name in ("local_continuation", "local_perplexity"):
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task["task"] == name
        assert Path(task["dataset_kwargs"]["data_files"]["test"]).is_file()


def test_too_little_text_is_refused(tmp_path) -> None:
    source = tmp_path / "valid.jsonl"
    source.write_text(json.dumps({"text": "a few words"}) + "\n")
    command = [sys.executable, str(SCRIPT), "--input", str(source), "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "holds 0 passages; 4 are needed" in run.stderr
