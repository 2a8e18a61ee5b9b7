"""Where checks can run, and what is said where they cannot."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectral_scale.errors import ConfigError
from spectral_scale.gpu_checks import place as place_module
from spectral_scale.gpu_checks.catalogue import CHECKS, named
from spectral_scale.gpu_checks.place import Place, facts, find_place, no_gpu, unmet


def test_a_machine_without_a_gpu_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="build without CUDA; start it on a machine with one"):
        find_place(tmp_path, rehearsal=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert no_gpu() == "CUDA_VISIBLE_DEVICES is empty"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(place_module.shutil, "which", lambda _: None)
    assert "nvidia-smi is not here either" in str(no_gpu())
    monkeypatch.setattr(place_module.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert "its CUDA 13.0 needs a newer driver" in str(no_gpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert no_gpu() is None


def test_checks_of_two_gpus_and_of_large_ones_are_skipped_by_name(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    one = replace(place, device=torch.device("cuda", 0), gpus=1, rehearsal=False)
    skipped = {check.name for check in CHECKS if unmet(check, one)}
    assert skipped == {"backends-on-two-gpus", "lost-rank", "bench-1.3b"}
    (check,) = named(["lost-rank"])
    assert unmet(check, one) == "needs 2 GPUs, and 1 is here"
    (check,) = named(["bench-1.3b"])
    assert unmet(check, one) == "needs a GPU with 48 GB, and this one has 24 GB"
    assert not any(unmet(check, place) for check in CHECKS), "a rehearsal needs nothing"


def test_facts_name_versions_and_that_it_is_a_rehearsal(place: Place) -> None:
    found = facts(place)
    assert found["torch"] == torch.__version__ and "rehearsal" in found["device"]


def test_peaks_are_those_of_a_gpu_only(place: Place) -> None:
    place.reset_peak()
    place.synchronize()
    assert place.peak_bytes() is None
    assert place.choose(1, 2) == 2 and replace(place, rehearsal=False).choose(1, 2) == 1
