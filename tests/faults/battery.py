"""The forty faults, and what holds each: tests, or a written reason. docs/faults.md shows them."""

from dataclasses import dataclass

CHECKPOINT = "tests/unit/checkpoint/"
ENGINE = "tests/unit/engine/"
SUPERVISION = "tests/unit/supervision/"
FAULTS = "tests/faults/"
RUNS = "tests/integration/"
DATA = "tests/unit/data/"


@dataclass(frozen=True)
class Scenario:
    """One fault."""

    fault: str
    """What happens."""
    outcome: str
    """What becomes of the run; for one without a test, why."""
    tests: tuple[str, ...] = ()
    """Tests that show it; evidence scripts, too."""


SECTIONS: dict[str, list[Scenario]] = {
    "Writing checkpoints": [
        Scenario(
            "SIGKILL at a random instant of a save",
            "what was being written has no checkpoint's name; resume from the one before, bit "
            "for bit",
            (
                f"{CHECKPOINT}test_checkpoint_kill.py::test_killed_at_random_again_and_again",
                f"{FAULTS}test_kills_and_soak.py::test_kills_during_saves",
                "benchmarks/kill_during_save.py",
            ),
        ),
        Scenario(
            "SIGKILL of one rank amid a save",
            "the others leave, name it, and the previous checkpoint is intact",
            (
                f"{FAULTS}test_kills_and_soak.py::test_kills_during_saves",
                f"{FAULTS}test_lost_ranks.py::test_a_killed_rank_is_named_at_once",
            ),
        ),
        Scenario(
            "a kill between any two file operations of a save",
            "there is always a good checkpoint; there is no `latest` pointer that could dangle",
            (
                f"{CHECKPOINT}test_checkpoint_kill.py::test_killed_before_each_file_operation_in_turn",
            ),
        ),
        Scenario(
            "the disk is full",
            "space needed and present are named, nothing partial is left, older checkpoints stay; "
            "the run ends and can be resumed",
            (
                f"{CHECKPOINT}test_checkpoint_failure.py::test_a_write_that_fails_leaves_nothing_behind",
                f"{CHECKPOINT}test_checkpoint_failure.py::test_the_kernels_own_refusal_to_write_more",
                f"{RUNS}test_bad_input.py::test_a_disk_that_is_full_while_saving",
            ),
        ),
        Scenario(
            "too little space, known before the save",
            "refused before a byte is written",
            (
                f"{CHECKPOINT}test_checkpoint_failure.py"
                "::test_a_full_disk_is_predicted_before_a_byte_is_written",
            ),
        ),
        Scenario(
            "EIO or EDQUOT when the pointer to the newest is replaced",
            "there is no pointer: committed folders are found by their names",
            (f"{CHECKPOINT}test_checkpoint_failure.py::test_every_fsync_that_fails_is_an_error",),
        ),
        Scenario(
            "a folder that cannot be written",
            "refused at the start (a file is written and removed), exit code 78",
            (f"{RUNS}test_bad_input.py::test_a_run_folder_that_cannot_be_made",),
        ),
        Scenario(
            "a signal, or a fault, while a save runs in the background",
            "the save is waited for and committed, then the stop; its fault ends the run on all "
            "ranks",
            (
                f"{ENGINE}test_saver_background.py::test_a_stop_waits_for_the_save_under_way",
                f"{ENGINE}test_saver_background.py::test_a_fault_in_the_background_ends_the_run",
            ),
        ),
        Scenario(
            "saving takes longer than its interval",
            "one save at a time: training waits, with a warning; none is dropped",
            (
                f"{ENGINE}test_saver_background.py"
                "::test_a_snapshot_is_of_one_step_however_late_it_is_written",
            ),
        ),
        Scenario(
            "two jobs in one run folder",
            "the second is refused with host, process and job of the first; a dead one's lock is "
            "taken over",
            (
                f"{CHECKPOINT}test_lock.py::test_a_second_process_is_told_who_runs_there",
                f"{CHECKPOINT}test_lock.py::test_a_killed_holder_is_taken_over_with_a_warning",
            ),
        ),
        Scenario(
            "pruning while newer checkpoints are damaged",
            "only verified ones count; the last good one stays",
            (
                f"{CHECKPOINT}test_checkpoint_retention.py"
                "::test_damaged_newer_ones_never_push_out_the_last_good_one",
            ),
        ),
    ],
    "Reading checkpoints": [
        Scenario(
            "one bit flipped in any file",
            "named, and the checkpoint before is used, with a warning",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_no_byte_of_any_file_can_change_unnoticed",
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_damage_is_named_and_the_previous_checkpoint_is_used",
            ),
        ),
        Scenario(
            "a file truncated, empty or missing, seen by one rank only",
            "all ranks pass over that checkpoint together",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_damage_seen_by_one_rank_only_is_passed_over_by_all",
                f"{FAULTS}test_kills_and_soak.py::test_damage_that_one_real_rank_sees",
            ),
        ),
        Scenario(
            "no pointer to the newest, or one that dangles",
            "there is none; if checkpoints exist and none is good, the run refuses to start at 0",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_all_bad_is_an_error_and_not_a_start_from_zero",
            ),
        ),
        Scenario(
            "malicious pickles in a checkpoint",
            "never opened",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py::test_pickles_are_never_opened",
                f"{FAULTS}test_security.py::test_nothing_in_a_run_folder_executes",
            ),
        ),
        Scenario(
            "resuming with another model, method, data set or tokenizer",
            "refused with the differences, unless allowed by name",
            (
                f"{RUNS}test_bad_input.py::test_resuming_as_another_run",
                f"{RUNS}test_bad_input.py::test_resuming_on_other_data",
                f"{RUNS}test_bad_input.py::test_one_allowed_change_does_not_allow_another",
            ),
        ),
        Scenario(
            "a checkpoint of another format version",
            "refused with the versions that can be read; version 1 is the first, so that there is "
            "none to migrate from yet",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_a_hostile_manifest_is_refused_before_anything_is_read",
            ),
        ),
        Scenario(
            "another world size or backend on resume",
            "the same tensors, data order and, within rounding, losses",
            (
                f"{RUNS}test_resume.py::test_resume_at_another_world_size",
                "tests/distributed/test_deepspeed_state.py::test_reshard_and_migrate",
            ),
        ),
        Scenario(
            "resume anywhere: amid an iteration, around swaps and SVDs, with dropout and workers, "
            "in a second epoch",
            "bit for bit",
            (
                f"{RUNS}test_resume.py::test_resume_is_bit_exact",
                f"{RUNS}test_resume.py::test_ddp_resume_is_bit_exact",
            ),
        ),
    ],
    "Processes and network": [
        Scenario(
            "SIGKILL of a rank",
            "the others end within seconds and name rank, host and process",
            (f"{FAULTS}test_lost_ranks.py::test_a_killed_rank_is_named_at_once",),
        ),
        Scenario(
            "a rank stopped, or looping, with and without the GIL",
            "ended after `health.hang_timeout_seconds` (45) with rank, host and stack traces of "
            "all ranks; what hangs on the same host is ended, too",
            (
                f"{FAULTS}test_lost_ranks.py::test_a_stopped_rank_ends_the_run",
                f"{FAULTS}test_lost_ranks.py::test_a_rank_that_loops_is_found",
            ),
        ),
        Scenario(
            "an exception on one rank only",
            "its own error is in its log and in what every other rank reports",
            (f"{FAULTS}test_lost_ranks.py::test_one_rank_s_own_error_is_what_all_report",),
        ),
        Scenario(
            "a slow rank",
            "named with its host in a warning and in metrics.jsonl (`ranks/slowest`)",
            (f"{FAULTS}test_lost_ranks.py::test_a_slow_rank_is_named",),
        ),
        Scenario(
            "ranks that call collectives in another order or with other shapes",
            "no test: the run's own calls have one order on all ranks by construction, and torch "
            "finds others with TORCH_DISTRIBUTED_DEBUG=DETAIL; a hang that results is ended as "
            "any other",
        ),
        Scenario(
            "a meeting place that is taken, cannot be resolved, or where a rank is missing",
            "contradictions and missing facts are refused at once; after a minute every rank says "
            "which ones are missing, or why the place cannot be used",
            (
                "tests/unit/parallel/test_rendezvous_store.py::test_missing_ranks_are_named",
                "tests/unit/parallel/test_rendezvous_store.py::test_a_port_that_is_taken",
                "tests/unit/parallel/test_rendezvous_store.py::test_an_address_that_leads_nowhere",
                "tests/unit/cluster/test_detect.py::test_contradictions",
            ),
        ),
        Scenario(
            "a copy of a tensor made different on one rank",
            "tensor and rank are named at the next comparison (`health.replica_interval`)",
            (
                f"{SUPERVISION}test_replica_check.py"
                "::test_a_flipped_bit_on_one_rank_is_found_on_every_backend",
                f"{SUPERVISION}test_replica_check.py::test_the_odd_rank_out_is_named",
            ),
        ),
        Scenario(
            "`torchrun --max-restarts` and a rank that dies once",
            "the ranks go on from the last checkpoint; the losses are those of a run left alone",
            (f"{FAULTS}test_torchrun_restart.py::test_a_rank_that_dies_once",),
        ),
        Scenario(
            "a crash loop",
            "exit code 93 at the third start that saved nothing new, so that no scheduler goes on",
            (
                f"{SUPERVISION}test_supervision_stopping.py::test_a_crash_loop_ends_in_93",
                f"{SUPERVISION}test_supervision_stopping.py"
                "::test_killed_starts_count_and_progress_or_order_begins_anew",
            ),
        ),
        Scenario(
            "memory that runs out on a rank",
            "an exception (torch's, naming the allocation) ends as any other; the kernel's "
            "OOM killer is a SIGKILL, which is named as one, since nothing in the job can tell "
            "them apart. `spectral-scale plan` estimates memory beforehand",
            (f"{FAULTS}test_lost_ranks.py::test_a_killed_rank_is_named_at_once",),
        ),
    ],
    "Schedulers": [
        Scenario(
            "SLURM: time limit, preemption, requeue, arrays, failing jobs",
            "a real SLURM on one machine; skipped with the reason where it cannot be installed",
            (
                "tests/slurm/test_slurm.py::test_torchrun_saves_before_the_time_limit_and_goes_on",
                "tests/slurm/test_slurm.py::test_a_submitted_job_that_fails_is_not_requeued",
            ),
        ),
        Scenario(
            "signals: once, twice, to one rank, to the launcher",
            "once: saved, exit code 75; twice: at once, the previous checkpoint valid; a launcher "
            "that dies of it leaves no orphan",
            (
                f"{RUNS}test_signals.py::test_the_step_is_finished_saved_and_continued",
                f"{RUNS}test_signals.py::test_a_second_signal_ends_at_once",
                f"{RUNS}test_signals.py::test_one_rank_s_signal_stops_all",
                "benchmarks/launchers.py",
            ),
        ),
        Scenario(
            "the files STOP and SAVE",
            "honoured after the step in progress, evaluation or save included; SAVE is removed",
            (
                f"{SUPERVISION}test_supervision_stopping.py::test_the_stop_command_stops_within_the_step",
                f"{SUPERVISION}test_supervision_stopping.py"
                "::test_save_saves_and_goes_on_and_a_touched_stop_may_be_requeued",
            ),
        ),
        Scenario(
            "the job's time runs out",
            "saved with a margin from the run's own steps and saves; not started if nothing could "
            "be saved",
            (
                f"{SUPERVISION}test_supervision_stopping.py::test_the_time_limit_leaves_time_to_save",
            ),
        ),
    ],
    "Numbers and data": [
        Scenario(
            "NaN in loss or gradient on one rank",
            "all ranks leave the step out; after `health.rollback_after` in a row they go back and "
            "pass over the data; then the run ends with the samples named",
            (
                f"{SUPERVISION}test_health.py::test_one_rank_s_nan_leaves_the_step_out_on_all_backends",
                f"{SUPERVISION}test_health.py::test_a_step_left_out_touches_nothing_but_the_data",
                f"{SUPERVISION}test_health.py::test_going_back_passes_over_the_data_and_is_exact",
                f"{SUPERVISION}test_health.py::test_what_does_not_help_ends_with_the_samples",
            ),
        ),
        Scenario(
            "a spike of loss or gradient norm",
            "left out with `health.spike_sigmas` set (off by default); incidents.jsonl names "
            "samples, token offsets and documents",
            (
                f"{SUPERVISION}test_health.py::test_spikes_stand_out_of_the_healthy_steps_before",
                f"{FAULTS}test_spikes.py::test_one_rank_s_spike_is_left_out_by_both",
            ),
        ),
        Scenario(
            "corrupt or missing token files, ids beyond the vocabulary, empty or undecodable text",
            "an error that names file and offset, or skipped and counted if asked for",
            (
                f"{DATA}test_tokens_folder.py::test_verify_names_the_file_of_one_flipped_bit",
                f"{DATA}test_loader_train.py::test_corrupt_shard_stops_with_its_own_message",
                f"{DATA}test_prepare_folders.py::test_bad_documents_stop_or_are_counted",
            ),
        ),
        Scenario(
            "preparing data killed half-way, or by two at once",
            "a half-made folder is recognised; the second process is refused or waits",
            (
                f"{DATA}test_tokens_folder.py::test_interrupted_folder_is_recognised",
                f"{DATA}test_prepare_folders.py::test_two_at_once_are_refused",
                f"{DATA}test_embedded_corpus.py::test_processes_at_once_make_it_together",
            ),
        ),
        Scenario(
            "no network",
            "training never downloads; `prepare hf:…` says what to do offline",
            (f"{DATA}test_sources.py::test_offline_error_says_what_to_do",),
        ),
        Scenario(
            "a clock that jumps, a metrics folder that cannot be written",
            "heartbeats and time limits use clocks that nobody sets; a failing sink never stops a "
            "run",
            (
                f"{SUPERVISION}test_watchdog.py::test_silence_is_measured_by_the_listener_s_own_clock",
                "tests/unit/metrics/test_sinks.py::test_full_disk_loses_lines_only_while_full",
            ),
        ),
        Scenario(
            "a long run under random faults",
            "ends with the bits of a run that was left alone",
            (f"{FAULTS}test_kills_and_soak.py::test_a_short_soak", "benchmarks/soak.py"),
        ),
    ],
}
COUNT = 40

PAGE = """# Faults

What clusters do to a run, and what becomes of it. Each line is held by the tests it names, or says
why there is none. Written from `tests/faults/battery.py`, which a test compares with this page.

{tables}

## At length

`python benchmarks/kill_during_save.py --seeds 100` killed 100 runs with SIGKILL at a random
instant of a random save (50 saving in the background, 20 with two ranks, of which one or both were
killed); 64 times half a checkpoint lay on the disk. All 100 resumed and ended with the same bits as
a run that was left alone: every tensor of the last checkpoint and every loss.

`python benchmarks/soak.py --mean-seconds 25 --seed 3` (2,000 steps, 2 ranks) met eight faults:
a rank killed (twice), all ranks killed, a rank stopped, a byte of the newest checkpoint flipped, a
full disk, the file STOP and SIGTERM, besides the steps whose loss was NaN by design and one return
to an earlier step. Ten starts; every loss and every tensor of the last checkpoint equal to the
undisturbed run's; 88 % of all steps taken were kept. Its goodput says nothing, since the machine
had much other work during the undisturbed run only (447 s, and 215 s disturbed). Of a run of 3,000
steps with six faults (all but SIGTERM) it was 0.52: 276 s undisturbed, 529 s disturbed, 92 % of the
steps kept, the same bits; there each start loaded all modules anew, as it no longer does.

What each launcher does with signals and lost ranks: [launchers.md](launchers.md).
"""


def render() -> str:
    """docs/faults.md."""
    parts, number = [], 0
    for title, scenarios in SECTIONS.items():
        lines = [
            f"## {title}",
            "",
            "| | fault | what becomes of it | shown by |",
            "|---|---|---|---|",
        ]
        for each in scenarios:
            number += 1
            shown = "<br>".join(f"`{test}`" for test in each.tests) or "-"
            lines.append(f"| {number} | {each.fault} | {each.outcome} | {shown} |")
        parts.append("\n".join(lines))
    return PAGE.format(tables="\n\n".join(parts))
