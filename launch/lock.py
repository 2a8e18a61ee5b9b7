"""Turn pip's installation report into a file for `pip install --require-hashes`.

    pip install --dry-run --ignore-installed --report report.json --constraint constraints.txt \\
        --extra-index-url https://download.pytorch.org/whl/cpu .
    python launch/lock.py report.json > requirements-linux-x86_64-py311-cpu.lock

Without that index the report, and the lock, are those of PyPI's CUDA build. A lock file holds for
the platform, Python and build of torch with which the report was made. pip's
`--use-feature=fast-deps` reads metadata by range requests instead of downloading gigabytes.
"""

import json
import sys
from pathlib import Path


def lock(report: dict) -> str:
    """The text of the lock file: every package except this one, pinned with its hashes."""
    facts = report["environment"]
    labels = {item["metadata"]["version"].partition("+")[2] for item in report["install"]}
    lines = [
        f"# Python {facts['python_full_version']}, {facts['sys_platform']}, "
        f"{facts['platform_machine']}; made by launch/lock.py.",
        *(f"--extra-index-url https://download.pytorch.org/whl/{b}" for b in sorted(labels) if b),
    ]
    for item in sorted(report["install"], key=lambda i: i["metadata"]["name"].lower()):
        hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
        if "sha256" in hashes:
            name, version = item["metadata"]["name"], item["metadata"]["version"]
            lines.append(f"{name}=={version} --hash=sha256:{hashes['sha256']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(lock(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
