"""Which tests only `pytest --exhaustive` runs: what others show as well, at greater length.

Each repeats a behaviour that the suite shows elsewhere: at another world size, under another
launcher, on larger models, or for longer. They run before a release.
"""

EXHAUSTIVE = frozenset(
    {
        # Kills at random moments, for minutes; tests/unit/checkpoint has those of single saves.
        "faults/test_kills_and_soak.py::test_kills_during_saves",
        "faults/test_kills_and_soak.py::test_a_short_soak",
        # Rehearsals on the CPU of what `doctor --gpu` trains. Others stay, and all judgements.
        *(
            f"integration/test_gpu_rehearsal.py::test_the_check_passes_in_a_rehearsal[{name}]"
            for name in ("determinism", "async-save", "out-of-memory", "lost-rank", "start-peak")
        ),
        "integration/test_gpu_rehearsal.py::test_the_check_passes_in_a_rehearsal[bench-125m]",
        "integration/test_gpu_rehearsal.py::test_the_check_passes_in_a_rehearsal[bench-1.3b]",
        "integration/test_gpu_rehearsal.py::test_backends_are_compared_through_the_command",
        # Launchers by way of other launchers.
        "integration/test_launchers.py::test_deepspeed_over_mpich",
        "integration/test_deepspeed_launch.py::test_torchrun",
        "integration/test_deepspeed_launch.py::test_one_process_with_a_file_behind_the_flag",
        "slurm/test_slurm.py::test_mpirun_is_requeued_by_hand",
        "slurm/test_slurm.py::test_deepspeed_s_own_slurm_launcher",
        # Further layouts and world sizes.
        "distributed/test_filter_equivalence.py::test_equals_one_process"
        "[3-('zero1', 'zero2', 'zero3')]",
        "distributed/test_filter_equivalence.py::test_equals_one_process"
        "[4-('fsdp2', 'hsdp', 'zero3+offload')]",
        "distributed/test_filter_tensor_parallel.py::test_state_moves",
        "distributed/test_deepspeed_state.py::test_resume_is_bit_exact"
        "[3-{'parallel__offload': 'cpu', 'train__precision': 'bf16'}]",
        "distributed/test_deepspeed_state.py::test_state_is_bit_identical_after_load[ZeRO-2 on 4]",
        "distributed/test_deepspeed_fp16.py::test_a_step_that_overflows_advances_nothing_but_data"
        "[2]",
        "distributed/test_fsdp2_resume.py::test_same_ranks_resume_bit_exactly[3]",
        "distributed/test_galore_backends.py::test_half_precision",
        "distributed/test_galore_backends.py::test_costs[4-('zero2', 'zero3', 'hsdp')]",
        "distributed/test_swap_failures.py::test_a_rank_dies_in_each_phase[FSDP2]",
    }
)
"""Tests by their path below `tests`, with parameters."""


def stale(collected: set[str]) -> set[str]:
    """Entries whose file was collected whole but which name none of its tests."""
    files = {name.partition("::")[0] for name in collected}
    return {name for name in EXHAUSTIVE - collected if name.partition("::")[0] in files}
