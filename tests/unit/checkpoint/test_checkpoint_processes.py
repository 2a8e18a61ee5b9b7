"""Real processes over gloo: two write, three read, one fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_scale.checkpoint.reader import CheckpointReader

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import TensorChunk
from spectral_scale.parallel.collective import ProcessGroup

rank, world_size, store, root, broken = sys.argv[1:]
rank, world_size = int(rank), int(world_size)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
manager = CheckpointManager(root, 2, ProcessGroup(torch.device("cpu")))
rows = torch.arange(12.0).reshape(4, 3)[2 * rank : 2 * rank + 2]
chunk = TensorChunk("w", rows, (4, 3), (2 * rank, 0))
manager.save(1, [chunk], state={"k": 1}, identity={})
if rank == 1 and broken == "yes":
    chunk = TensorChunk("w", rows.clone().to("meta"), (4, 3), (2, 0))
try:
    manager.save(2, [chunk], state={"k": 2}, identity={})
except CheckpointError as error:
    print("failed:", error)
print("latest:", manager.latest_good().step)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("broken", ["no", "yes"])
def test_two_processes_save_together_or_not_at_all(tmp_path: Path, broken: str):
    root = tmp_path / "checkpoints"
    arguments = [[str(rank), "2", str(tmp_path / "store"), str(root), broken] for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *each],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in arguments
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    step = 1 if broken == "yes" else 2
    for output in outputs:
        assert f"latest: {step}" in output
        assert ("failed: step 2 was not saved: rank 1: plan: w: a meta" in output) == (step == 1)
    reader = CheckpointReader.open(root / f"step_{step:08d}")
    assert torch.equal(reader.read("w", (1, 1), (2, 2)), torch.tensor([[4.0, 5.0], [7.0, 8.0]]))
    assert reader.state == {"k": step}
    assert sorted(path.name for path in root.iterdir()) == ["step_00000001", "step_00000002"][:step]
