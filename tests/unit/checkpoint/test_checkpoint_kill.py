"""SIGKILL at any instant of a save: the newest good checkpoint is one that was committed."""

import io
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest

from spectral_scale.checkpoint.reader import CheckpointReader

CONTEXT = multiprocessing.get_context("fork")
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}


def kill_before_file_event(checkpoints, nth, action):
    """Run `action` in a child that dies before its nth file operation; True if it got through."""

    def child():
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in FILE_EVENTS:
                count += 1
                if count == nth:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()

    process = CONTEXT.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


SWEEPS = {
    "next step, older one pruned": (2, {1, 2}),
    "same step again": (1, {1}),
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_killed_before_each_file_operation_in_turn(checkpoints, kind):
    """keep_last=1 is the hardest: at no instant may the only good checkpoint be gone."""
    step, allowed = SWEEPS[kind]
    checkpoints.save(1)
    seen = set()
    for nth in range(1, 200):
        through = kill_before_file_event(
            checkpoints, nth, lambda: checkpoints.save(step, checkpoints.manager(keep_last=1))
        )
        found = checkpoints.check(checkpoints.manager().latest_good())
        assert found in allowed
        for path in checkpoints.root.glob("step_*"):
            checkpoints.check(CheckpointReader.open(path))
        seen.add(found)
        if through:
            break
        if found != 1:
            checkpoints.save(1)
            os.rename(checkpoints.root / "step_00000002", checkpoints.root.parent / f"old{nth}")
    else:
        pytest.fail("the save never got through")
    assert nth > 10 and seen == allowed
    checkpoints.save(3, checkpoints.manager(keep_last=1))
    assert checkpoints.names() == ["step_00000003"]


class SlowFile(io.FileIO):
    def write(self, data):
        time.sleep(0.0005)
        return super().write(data[:64])


def save_for_ever(checkpoints, progress):
    manager = checkpoints.manager(keep_last=1, open_new=lambda path: SlowFile(path, "xb"))
    reader = manager.latest_good()
    step = 1 if reader is None else reader.step + 1
    while True:
        checkpoints.save(step, manager)
        os.write(progress, b"%08d" % step)
        step += 1


@pytest.mark.parametrize("seed", range(15))
def test_killed_at_random_again_and_again(checkpoints, seed):
    chance = random.Random(seed)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    checkpoints.save(1)
    for _ in range(2):
        process = CONTEXT.Process(target=save_for_ever, args=(checkpoints, writer))
        process.start()
        time.sleep(chance.uniform(0.01, 0.12))
        process.kill()
        process.join()
        found = checkpoints.check(checkpoints.manager().latest_good())
        assert found >= last_reported(reader)
        for path in checkpoints.root.glob("step_*"):
            checkpoints.check(CheckpointReader.open(path))
    os.close(reader)
    os.close(writer)


def last_reported(reader):
    try:
        return int(os.read(reader, 2**20)[-8:])
    except BlockingIOError:
        return 1
