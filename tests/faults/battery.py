"""Fifty-seven faults, their outcomes and the tests that hold them; rendered as docs/faults.md."""

from dataclasses import dataclass

CHECKPOINT = "tests/unit/checkpoint/"
ENGINE = "tests/unit/engine/"
SUPERVISION = "tests/unit/supervision/"
FAULTS = "tests/faults/"
RUNS = "tests/integration/"
DATA = "tests/unit/data/"


@dataclass(frozen=True)
class Scenario:
    """A fault, its outcome and the tests that show it."""

    fault: str
    """The fault, as the page names it."""
    outcome: str
    """How the run responds; for a fault without a test, `no test: ` and the reason."""
    tests: tuple[str, ...] = ()
    """Tests and benchmark scripts that show the outcome."""


SECTIONS: dict[str, list[Scenario]] = {
    "Writing checkpoints": [
        Scenario(
            "SIGKILL at a random instant of a save",
            "The unfinished save never gets a checkpoint's name; the run resumes bit for bit from "
            "the previous checkpoint.",
            (
                f"{CHECKPOINT}test_checkpoint_kill.py::test_killed_at_random_again_and_again",
                f"{FAULTS}test_kills_and_soak.py::test_kills_during_saves",
                "benchmarks/kill_during_save.py",
            ),
        ),
        Scenario(
            "SIGKILL of one rank during a save",
            "The other ranks exit and name the lost one; the previous checkpoint is intact.",
            (
                f"{FAULTS}test_kills_and_soak.py::test_kills_during_saves",
                f"{FAULTS}test_lost_ranks.py::test_a_killed_rank_is_named_at_once",
            ),
        ),
        Scenario(
            "a kill between any two file operations of a save",
            "A good checkpoint always exists; there is no `latest` pointer that could dangle.",
            (
                f"{CHECKPOINT}test_checkpoint_kill.py::test_killed_before_each_file_operation_in_turn",
            ),
        ),
        Scenario(
            "the disk is full",
            "The error states the space needed and the space available, nothing partial is left "
            "behind, and older checkpoints stay; the run exits and can be resumed.",
            (
                f"{CHECKPOINT}test_checkpoint_failure.py::test_a_write_that_fails_leaves_nothing_behind",
                f"{CHECKPOINT}test_checkpoint_failure.py::test_the_kernels_own_refusal_to_write_more",
                f"{RUNS}test_bad_input.py::test_a_disk_that_is_full_while_saving",
            ),
        ),
        Scenario(
            "too little disk space, predicted before the save",
            "The save is refused before a byte is written.",
            (
                f"{CHECKPOINT}test_checkpoint_failure.py"
                "::test_a_full_disk_is_predicted_before_a_byte_is_written",
            ),
        ),
        Scenario(
            "EIO or EDQUOT while replacing the pointer to the newest checkpoint",
            "There is no such pointer: committed checkpoints are found by their folder names.",
            (f"{CHECKPOINT}test_checkpoint_failure.py::test_every_fsync_that_fails_is_an_error",),
        ),
        Scenario(
            "a run folder that cannot be written",
            "The run refuses to start, after trying to write and remove a file, and exits with code"
            " 78.",
            (f"{RUNS}test_bad_input.py::test_a_run_folder_that_cannot_be_made",),
        ),
        Scenario(
            "a report that cannot be written, or a run folder whose name is not UTF-8",
            "The outcome of the run stands, with exit code 0; a report that cannot be written is a "
            "warning, and leaves no temporary file.",
            (
                "tests/unit/cli/test_train_command.py"
                "::test_a_report_that_cannot_be_written_costs_only_the_report",
                "tests/unit/metrics/report/test_report_page.py"
                "::test_a_run_folder_whose_name_is_no_utf8_gets_its_page",
            ),
        ),
        Scenario(
            "a signal or an error during a background save",
            "After a signal, the run waits for the save to commit and then stops; an error in the "
            "save ends the run on all ranks.",
            (
                f"{ENGINE}test_saver_background.py::test_a_stop_waits_for_the_save_under_way",
                f"{ENGINE}test_saver_background.py::test_a_fault_in_the_background_ends_the_run",
            ),
        ),
        Scenario(
            "a save that takes longer than the checkpoint interval",
            "Only one save runs at a time: training waits for it, with a warning, and no save is "
            "dropped.",
            (
                f"{ENGINE}test_saver_background.py"
                "::test_a_snapshot_is_of_one_step_however_late_it_is_written",
            ),
        ),
        Scenario(
            "two jobs in one run folder",
            "The second job is refused with the host, process and job id of the first; the lock of "
            "a dead job is taken over.",
            (
                f"{CHECKPOINT}test_lock.py::test_a_second_process_is_told_who_runs_there",
                f"{CHECKPOINT}test_lock.py::test_a_killed_holder_is_taken_over_with_a_warning",
            ),
        ),
        Scenario(
            "pruning while newer checkpoints are damaged",
            "Only verified checkpoints count towards the number kept; the last good one stays.",
            (
                f"{CHECKPOINT}test_checkpoint_retention.py"
                "::test_damaged_newer_ones_never_push_out_the_last_good_one",
            ),
        ),
    ],
    "Reading checkpoints": [
        Scenario(
            "one bit flipped in any file of a checkpoint",
            "A warning names the damaged file, and the previous checkpoint is loaded.",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_no_byte_of_any_file_can_change_unnoticed",
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_damage_is_named_and_the_previous_checkpoint_is_used",
            ),
        ),
        Scenario(
            "a file truncated, empty or missing, seen by one rank only",
            "All ranks skip that checkpoint together.",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_damage_seen_by_one_rank_only_is_passed_over_by_all",
                f"{FAULTS}test_kills_and_soak.py::test_damage_that_one_real_rank_sees",
            ),
        ),
        Scenario(
            "a missing or dangling pointer to the newest checkpoint",
            "No pointer exists. If there are checkpoints but none is good, the run refuses to start"
            " from step 0.",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_all_bad_is_an_error_and_not_a_start_from_zero",
            ),
        ),
        Scenario(
            "malicious pickles in a checkpoint",
            "Pickles are never opened.",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py::test_pickles_are_never_opened",
                f"{FAULTS}test_security.py::test_nothing_in_a_run_folder_executes",
            ),
        ),
        Scenario(
            "resuming with another model, method, data set or tokenizer",
            "The run refuses to resume and lists the differences, unless each is allowed by name.",
            (
                f"{RUNS}test_bad_input.py::test_resuming_as_another_run",
                f"{RUNS}test_bad_input.py::test_resuming_on_other_data",
                f"{RUNS}test_bad_input.py::test_one_allowed_change_does_not_allow_another",
            ),
        ),
        Scenario(
            "a checkpoint of another format version",
            "The checkpoint is refused and the readable versions are listed. Version 1 is the "
            "first, so there is nothing to migrate yet.",
            (
                f"{CHECKPOINT}test_checkpoint_damage.py"
                "::test_a_hostile_manifest_is_refused_before_anything_is_read",
            ),
        ),
        Scenario(
            "resuming at another world size or on another backend",
            "Tensors and data order are the same, and losses agree within rounding.",
            (
                f"{RUNS}test_resume.py::test_resume_at_another_world_size",
                "tests/distributed/test_deepspeed_state.py::test_reshard_and_migrate",
            ),
        ),
        Scenario(
            "resuming with a longer schedule",
            "The run says by how much its learning rates jump.",
            (f"{RUNS}test_learning_rate_jump.py::test_a_longer_cosine_is_said_on_resume",),
        ),
        Scenario(
            "resuming at any step: within an iteration, around swaps and SVDs, with dropout and "
            "data workers, in a second epoch",
            "The run continues bit for bit.",
            (
                f"{RUNS}test_resume.py::test_resume_is_bit_exact",
                f"{RUNS}test_resume.py::test_ddp_resume_is_bit_exact",
            ),
        ),
    ],
    "Processes and network": [
        Scenario(
            "SIGKILL of a rank",
            "The other ranks exit within seconds and name the rank, its host and its process.",
            (f"{FAULTS}test_lost_ranks.py::test_a_killed_rank_is_named_at_once",),
        ),
        Scenario(
            "a rank that is stopped or loops forever, holding the GIL or not",
            "The run ends after `health.hang_timeout_seconds` (45) and reports rank, host and the "
            "stack traces of all ranks; hung processes on the same host are killed.",
            (
                f"{FAULTS}test_lost_ranks.py::test_a_stopped_rank_ends_the_run",
                f"{FAULTS}test_lost_ranks.py::test_a_rank_that_loops_is_found",
            ),
        ),
        Scenario(
            "an exception on one rank only",
            "That rank's error appears in its own log and in the report of every other rank.",
            (f"{FAULTS}test_lost_ranks.py::test_one_rank_s_own_error_is_what_all_report",),
        ),
        Scenario(
            "a slow rank",
            "A warning and metrics.jsonl (`ranks/slowest`) name the rank and its host.",
            (f"{FAULTS}test_lost_ranks.py::test_a_slow_rank_is_named",),
        ),
        Scenario(
            "ranks that call collectives in different orders or with different shapes",
            "no test: by construction, all ranks issue the run's collectives in one order; torch "
            "reports mismatches in other code with TORCH_DISTRIBUTED_DEBUG=DETAIL, and a resulting "
            "hang is ended like any other.",
        ),
        Scenario(
            "a rendezvous address that is in use or does not resolve, or a rank that never arrives",
            "Contradictory or missing rank information is refused at once; after one minute every "
            "rank reports which ranks are missing, or why the address cannot be used.",
            (
                "tests/unit/parallel/test_rendezvous_store.py::test_missing_ranks_are_named",
                "tests/unit/parallel/test_rendezvous_store.py::test_a_port_that_is_taken",
                "tests/unit/parallel/test_rendezvous_store.py::test_an_address_that_leads_nowhere",
                "tests/unit/cluster/test_detect.py::test_contradictions",
            ),
        ),
        Scenario(
            "a replicated tensor that differs on one rank",
            "The next comparison (`health.replica_interval`) names the tensor and the rank.",
            (
                f"{SUPERVISION}test_replica_check.py"
                "::test_a_flipped_bit_on_one_rank_is_found_on_every_backend",
                f"{SUPERVISION}test_replica_check.py::test_the_odd_rank_out_is_named",
            ),
        ),
        Scenario(
            "`torchrun --max-restarts` and a rank that dies once",
            "The ranks resume from the last checkpoint, and the losses equal those of an "
            "undisturbed run.",
            (f"{FAULTS}test_torchrun_restart.py::test_a_rank_that_dies_once",),
        ),
        Scenario(
            "a crash loop",
            "The third consecutive start without a new checkpoint exits with code 93, so that no "
            "scheduler restarts the run.",
            (
                f"{SUPERVISION}test_supervision_stopping.py::test_a_crash_loop_ends_in_93",
                f"{SUPERVISION}test_supervision_stopping.py"
                "::test_killed_starts_count_and_progress_or_order_begins_anew",
            ),
        ),
        Scenario(
            "a rank that runs out of memory",
            "torch's exception, which names the allocation, ends the run like any other. The "
            "kernel's OOM killer sends SIGKILL and is reported as such, since nothing inside the "
            "job can tell them apart. `spectral-scale plan` estimates memory beforehand.",
            (f"{FAULTS}test_lost_ranks.py::test_a_killed_rank_is_named_at_once",),
        ),
    ],
    "Schedulers": [
        Scenario(
            "SLURM: time limit, preemption, requeue, arrays, failing jobs",
            "The tests run on a real SLURM on one machine; where it cannot be installed, they are "
            "skipped with the reason.",
            (
                "tests/slurm/test_slurm.py::test_torchrun_saves_before_the_time_limit_and_goes_on",
                "tests/slurm/test_slurm.py::test_a_submitted_job_that_fails_is_not_requeued",
            ),
        ),
        Scenario(
            "signals, sent once or twice, to one rank or to the launcher",
            "The first signal saves and exits with code 75; the second exits at once and leaves the"
            " previous checkpoint valid. A launcher that dies of a signal leaves no orphans.",
            (
                f"{RUNS}test_signals.py::test_the_step_is_finished_saved_and_continued",
                f"{RUNS}test_signals.py::test_a_second_signal_ends_at_once",
                f"{RUNS}test_signals.py::test_one_rank_s_signal_stops_all",
                "benchmarks/launchers.py",
            ),
        ),
        Scenario(
            "SIGHUP, SIGUSR2, SIGXCPU or SIGPWR: a closed terminal, a warning before a limit, a "
            "host that goes down",
            "Each stops and saves as SIGTERM does. Under `nohup` a closed terminal changes nothing;"
            " torchrun hands SIGHUP to its ranks even then, and they save.",
            (
                f"{RUNS}test_signals.py::test_the_step_is_finished_saved_and_continued",
                f"{RUNS}test_signals.py::test_a_closed_terminal_does_not_end_what_nohup_started",
                f"{RUNS}test_signals.py::test_a_closed_terminal_under_nohup_torchrun_saves",
            ),
        ),
        Scenario(
            "the shell script that started a rank in the background ends",
            "The rank goes on: only the end of a launcher stops its ranks.",
            (f"{SUPERVISION}test_launcher_watch.py::test_only_the_end_of_a_launcher_counts",),
        ),
        Scenario(
            "the files STOP and SAVE",
            "They are honoured after the step in progress, including its evaluation or save; SAVE "
            "is then removed.",
            (
                f"{SUPERVISION}test_supervision_stopping.py::test_the_stop_command_stops_within_the_step",
                f"{SUPERVISION}test_supervision_stopping.py"
                "::test_save_saves_and_goes_on_and_a_touched_stop_may_be_requeued",
            ),
        ),
        Scenario(
            "the job's time limit approaches",
            "The run saves in time, with a margin derived from its own step and save durations; it "
            "does not start if nothing could be saved.",
            (
                f"{SUPERVISION}test_supervision_stopping.py::test_the_time_limit_leaves_time_to_save",
            ),
        ),
    ],
    "Numbers and data": [
        Scenario(
            "NaN in loss or gradient on one rank",
            "All ranks skip the step. After `health.rollback_after` consecutive bad steps they "
            "return to the last checkpoint and skip that data; if this does not help, the run ends "
            "and names the samples.",
            (
                f"{SUPERVISION}test_health.py::test_one_rank_s_nan_leaves_the_step_out_on_all_backends",
                f"{SUPERVISION}test_health.py::test_a_step_left_out_touches_nothing_but_the_data",
                f"{SUPERVISION}test_health.py::test_going_back_passes_over_the_data_and_is_exact",
                f"{SUPERVISION}test_health.py::test_what_does_not_help_ends_with_the_samples",
            ),
        ),
        Scenario(
            "a spike in loss or gradient norm",
            "The step is skipped if `health.spike_sigmas` is set (off by default); incidents.jsonl "
            "names samples, token offsets and documents.",
            (
                f"{SUPERVISION}test_health.py::test_spikes_stand_out_of_the_healthy_steps_before",
                f"{FAULTS}test_spikes.py::test_one_rank_s_spike_is_left_out_by_both",
            ),
        ),
        Scenario(
            "corrupt or missing token files, ids beyond the vocabulary, empty or undecodable text",
            "An error names file and offset; on request, bad documents are skipped and counted "
            "instead.",
            (
                f"{DATA}test_tokens_folder.py::test_verify_names_the_file_of_one_flipped_bit",
                f"{DATA}test_loader_train.py::test_corrupt_shard_stops_with_its_own_message",
                f"{DATA}test_prepare_folders.py::test_bad_documents_stop_or_are_counted",
            ),
        ),
        Scenario(
            "data preparation that is killed half-way, or started twice at once",
            "A partial folder is recognised; the second process is refused or waits.",
            (
                f"{DATA}test_tokens_folder.py::test_interrupted_folder_is_recognised",
                f"{DATA}test_prepare_folders.py::test_two_at_once_are_refused",
                f"{DATA}test_embedded_corpus.py::test_processes_at_once_make_it_together",
            ),
        ),
        Scenario(
            "no network",
            "Training never downloads anything; `prepare hf:…` explains what to do offline.",
            (f"{DATA}test_sources.py::test_offline_error_says_what_to_do",),
        ),
        Scenario(
            "a clock that jumps; a metrics folder that cannot be written",
            "Heartbeats and time limits use monotonic clocks; a failing metrics sink never stops a "
            "run.",
            (
                f"{SUPERVISION}test_watchdog.py::test_silence_is_measured_by_the_listener_s_own_clock",
                "tests/unit/metrics/test_sinks.py::test_full_disk_loses_lines_only_while_full",
            ),
        ),
        Scenario(
            "a long run under random faults",
            "The run ends with the same bits as an undisturbed run.",
            (f"{FAULTS}test_kills_and_soak.py::test_a_short_soak", "benchmarks/soak.py"),
        ),
    ],
    "What users hand over": [
        Scenario(
            "a folder of inputs with links, compressed files and files of unknown kinds",
            "Links are followed, .gz, .bz2, .xz, .zst and .lz4 are read, unknown files are refused "
            "or, with `--on-unknown skip`, named and counted. Two files of one content are named.",
            (
                f"{DATA}test_sources.py::test_links_to_folders_are_followed_but_not_in_a_circle",
                f"{DATA}test_sources.py::test_files_of_an_unknown_kind_are_refused_or_counted",
                f"{DATA}test_sources.py"
                "::test_compressed_files_may_have_several_frames_and_are_read_to_the_end",
                f"{DATA}test_prepare_folders.py::test_the_same_shard_under_two_names_is_said",
            ),
        ),
        Scenario(
            "an input that is a named pipe, a socket or a device",
            "It is refused by name before anything is read.",
            (f"{DATA}test_sources.py::test_inputs_that_are_no_regular_files_are_refused_by_name",),
        ),
        Scenario(
            "Parquet with two columns of one name, or text of another string type",
            "Two columns are refused with their places; every string type is text.",
            (
                f"{DATA}test_sources.py::test_parquet_with_two_columns_of_one_name",
                f"{DATA}test_sources.py::test_parquet_rows",
            ),
        ),
        Scenario(
            "a JSON key that is given twice",
            "It is named and refused in every JSON that a user hands over.",
            ("tests/unit/files/test_json_text.py::test_a_key_that_is_given_twice_is_named",),
        ),
        Scenario(
            "a document of many megabytes on one line",
            "It is tokenised in pieces, a few megabytes at once, to the same ids; a "
            "tokenizer of another kind than byte-level BPE is asked where a line may be cut.",
            (
                f"{DATA}test_encode.py::test_a_long_line_is_cut_into_short_pieces_of_the_same_ids",
                f"{DATA}test_encode.py::test_other_tokenizers_are_asked_where_a_line_may_be_cut",
                f"{DATA}test_encode.py::test_the_tokenizer_gets_few_characters_at_once",
            ),
        ),
        Scenario(
            "a number that YAML reads otherwise (0100 is 64), or a key of DeepSpeed's JSON that "
            "DeepSpeed has given up",
            "It is refused with what to write instead.",
            (
                "tests/unit/files/test_paths.py"
                "::test_numbers_that_yaml_would_read_otherwise_are_refused",
                "tests/unit/config/test_deepspeed_json.py::test_what_breaks_the_method_is_refused",
            ),
        ),
        Scenario(
            "a model folder whose generation_config.json transformers would refuse to write",
            "Sampling values without `do_sample` are exported with `do_sample: true`, after a "
            "warning; anything else is refused at `import` and before the first step.",
            (
                "tests/unit/models/test_folder_generation_config.py"
                "::test_sampling_values_without_do_sample_can_be_exported",
                "tests/unit/models/test_folder_generation_config.py"
                "::test_others_are_refused_before_training",
            ),
        ),
        Scenario(
            "a model whose own code reads the weight of its linears, or that keeps matrices "
            "outside linears",
            "A converted layer answers for its weight's dtype, device and shape; what stays dense "
            "inside the blocks is logged with its share.",
            (
                "tests/unit/methods/test_layer_facts.py"
                "::test_models_that_peek_at_their_linears_train_swap_and_merge",
                "tests/unit/methods/test_layer_facts.py"
                "::test_experts_that_stay_dense_are_named_with_their_share",
            ),
        ),
        Scenario(
            "an own loop under `torch.autocast`, in bf16 or fp16",
            "Layers of every method and those on megatron-core have the dtypes of `nn.Linear`, and "
            "its values within rounding; trained weights stay fp32.",
            (
                "tests/unit/methods/test_layer_autocast.py"
                "::test_output_and_gradients_are_those_of_a_linear",
                "tests/distributed/test_megatron_layers.py"
                "::test_autocast_trains_them_as_it_trains_a_linear",
            ),
        ),
        Scenario(
            "`~` or `$NAME` in a path",
            "`~` is the home folder in every key and argument; `$NAME` is refused by name.",
            (
                "tests/unit/files/test_paths.py"
                "::test_every_path_key_is_expanded_in_files_and_on_the_command_line",
            ),
        ),
        Scenario(
            "a loader worker that cannot start, is killed, stopped or has no room in TMPDIR or "
            "/dev/shm",
            "Batches travel through pipes, which need neither; a worker that dies is named, one "
            "that is stopped is warned of, and none outlives the run.",
            (
                f"{DATA}test_loader_train.py"
                "::test_workers_need_no_temporary_folder_and_no_shared_memory",
                f"{DATA}test_loader_train.py::test_a_worker_that_is_killed_is_named",
                f"{DATA}test_loader_train.py::test_workers_end_with_a_parent_that_is_killed",
            ),
        ),
        Scenario(
            "a request to stop while data is waited for",
            "One process saves and stops with exit code 75; one of several ranks ends the run with "
            "75 and is named, and the last checkpoint is intact.",
            (
                f"{RUNS}test_waiting_for_data.py::test_one_process_saves_and_stops",
                f"{RUNS}test_waiting_for_data.py::test_several_ranks_end_and_name_it",
                "benchmarks/launchers.py",
            ),
        ),
        Scenario(
            "a file system without locks, without fsync of folders, or that tells no free space",
            "A warning before the first step; a marker file stands for the lock, and saves go on.",
            (
                "tests/unit/files/test_durable_limits.py::test_a_marker_stands_for_a_lock",
                "tests/unit/files/test_durable_limits.py::test_folders_that_cannot_be_flushed",
                "tests/unit/files/test_durable_limits.py"
                "::test_free_space_that_is_unknown_stops_no_save",
            ),
        ),
    ],
}
COUNT = 57

PAGE = """# Faults

Fifty-seven faults that clusters, file systems and inputs inflict on a training run, the outcome
of each, and the tests that hold it; a fault without a test says why. This page is rendered from
`tests/faults/battery.py`, and a test compares the two.

{tables}

## Fuzzed inputs

`python benchmarks/fuzz_inputs.py --cases 2000 --seed 1` reads mutated YAML, DeepSpeed JSON, JSON
lines, gzip, Parquet and files of token folders. One of 2,500 cases (seeds 0 and 1) ended in a
traceback, a YAML key that is a list, which is refused since; none hung, and none was read as
anything but what it says.

## Endurance runs

**Kills during saves.** `python benchmarks/kill_during_save.py --seeds 100` killed 100 runs with
SIGKILL at a random instant of a random save: 50 runs saved in the background, and 20 had two ranks,
of which one or both were killed. In 64 cases half a checkpoint was left on the disk. All 100 runs
resumed and ended with the same bits as an undisturbed run: every tensor of the last checkpoint and
every loss.

**Soak.** `python benchmarks/soak.py --mean-seconds 25 --seed 3` (2,000 steps, 2 ranks) injected
eight faults: one rank killed (twice), all ranks killed, one rank stopped, one byte of the newest
checkpoint flipped, a full disk, the file STOP, and SIGTERM. In addition, some steps had a NaN loss
by design, and the run returned once to an earlier step. It took ten starts. Every loss and every
tensor of the last checkpoint equalled those of the undisturbed run, and 88 % of all steps taken
were kept. The goodput of this run is not meaningful, because the machine was busy with other work
during the undisturbed run only (447 s, against 215 s disturbed).

A run of 3,000 steps with six faults (all but SIGTERM) had a goodput of 0.52: 276 s undisturbed,
529 s disturbed, 92 % of the steps kept, the same bits. In that run each start loaded all modules
again, which is no longer the case.

## See also

[launchers.md](launchers.md): what each launcher does with signals and lost ranks.
"""


def render() -> str:
    """The text of docs/faults.md."""
    parts, number = [], 0
    for title, scenarios in SECTIONS.items():
        lines = [
            f"## {title}",
            "",
            "| | Fault | Outcome | Shown by |",
            "|---|---|---|---|",
        ]
        for each in scenarios:
            number += 1
            shown = "<br>".join(f"`{test}`" for test in each.tests) or "-"
            lines.append(f"| {number} | {each.fault} | {each.outcome} | {shown} |")
        parts.append("\n".join(lines))
    return PAGE.format(tables="\n\n".join(parts))
