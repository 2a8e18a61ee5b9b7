"""What a tensor-parallel run is refused for, before any process group is made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spectral_scale.config.capability import variant
from spectral_scale.config.check import check_config, gradient_accumulation_steps
from spectral_scale.config.load import load_config
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.testing.tiny import build_from_config

LLAMA = {
    **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96},
    **{"max_position_embeddings": 256},
}


def config_with(**changes: Any) -> RunConfig:
    words = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return load_config([], words).config


def tensor_parallel(parts: int, **changes: Any) -> RunConfig:
    return config_with(parallel__backend="fsdp2", parallel__tensor_parallel=parts, **changes)


def test_ranks_that_share_a_matrix_see_the_same_data() -> None:
    config = tensor_parallel(2, train__global_batch_size=24, train__micro_batch_size=3)
    check_config(config, world_size=8)
    assert variant(config.parallel, world_size=8) == "fsdp2+tp"
    assert gradient_accumulation_steps(config, world_size=8) == 2


@pytest.mark.parametrize(
    ("parts", "world", "changes", "words"),
    [
        (3, 4, {}, ["tensor_parallel=3 must divide the 4 ranks; one of [1, 2, 4]"]),
        (0, 4, {}, ["parallel.tensor_parallel=0 must be at least 1"]),
        (8, 8, {}, ["does not divide the 4 attention heads", "one of [1, 2, 4]"]),
        (2, 4, {"model__name": "llama-1b"}, ["5461 feed-forward features", "5460 or 5462"]),
        (2, 4, {"model__vocab_size": 515}, ["515 rows of the vocabulary", "514 or 516"]),
        (2, 4, {"parallel__shard_group": 2}, ["shard_group=2 with", "leave shard_group out"]),
        (2, 4, {"spectral__method": "lora"}, ["LoRA (method=lora) does not run on fsdp2+tp: its"]),
        (2, 4, {"train__global_batch_size": 9}, ["2 data-parallel ranks"]),
    ],
    ids=str,
)
def test_refused_by_name(parts: int, world: int, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(tensor_parallel(parts, **changes), world_size=world)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_other_backends_refuse_the_key() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel=2 has no effect on .*=torch"):
        check_config(config_with(parallel__tensor_parallel=2), world_size=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_key_value_heads": 1}, "does not divide the 1 key and value heads"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='linear'",
        ),
    ],
    ids=str,
)
def test_a_folder_that_megatron_has_no_place_for(
    changes: dict[str, Any], words: str, corpus: Path, tmp_path: Path
) -> None:
    """Refused though a group of this size could never meet: none is made."""
    pytest.importorskip("megatron.core")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    config = config_with(
        model__name="null",
        model__path=tmp_path,
        data__train=corpus / "train",
        data__validation=corpus / "valid",
        parallel__backend="megatron",
        parallel__tensor_parallel=2,
        train__device="cpu",
    )
    rank_info = RankInfo(rank=0, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "1")
        patch.setattr(torch.cuda, "current_device", lambda: 0)  # as if there were a GPU
        with pytest.raises(ConfigError, match=words):
            build_from_config(config, rank_info)
    assert not dist.is_initialized()
