# shellcheck shell=bash
# Functions common to all job scripts: prepare, check, run the ranks, stop in time, and requeue only
# after progress. Site-specific values are in env.sh.

# Ask the ranks to stop: a file in the run folder works under every launcher, a signal does not.
# Ranks discard a STOP file that is older than their start, so the file is recreated as long as they
# run.
stop_requested=0
request_stop() {
    stop_requested=1
    echo "$(date '+%F %T') $1: asking the ranks to save and stop"
}

# prepare TRAIN_ARGUMENTS...: sets run_dir, master_addr, master_port, ranks_per_node, started.
prepare() {
    trap 'request_stop "SIGUSR1 (the time limit is near)"' USR1
    trap 'request_stop SIGTERM' TERM
    cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
    started=$(date +%s)
    # Ranks per node, for launchers that start them: one per requested GPU ("a100:8" or "8").
    ranks_per_node=${SPECTRAL_SCALE_RANKS_PER_NODE:-${SLURM_GPUS_PER_NODE:-0}}
    ranks_per_node=${ranks_per_node##*:}
    if ((ranks_per_node == 0)); then ranks_per_node=1; fi
    # Older versions of SLURM do not set the job's end time, which the ranks need to save in time.
    if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
        SLURM_JOB_END_TIME=$(date -d "$(squeue --noheader --job "$SLURM_JOB_ID" --format %e)" +%s) ||
            SLURM_JOB_END_TIME=
        export SLURM_JOB_END_TIME
    fi
    local facts
    facts=$("$SPECTRAL_SCALE_PYTHON" -m spectral_scale slurm --facts "$@") || exit 78
    eval "$facts" # three assignments with quoted values
    echo "$(date '+%F %T') job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}," \
        "restart ${SLURM_RESTART_COUNT:-0}, run folder $run_dir"
}

# preflight LAUNCHER...: runs doctor on all ranks; SPECTRAL_SCALE_PREFLIGHT=0 skips it.
preflight() {
    if [[ ${SPECTRAL_SCALE_PREFLIGHT:-1} == 0 ]]; then return; fi
    run_ranks "$@"
    if ((code != 0)); then
        echo "the preflight found a fault (see above); the run was not started" >&2
        exit "$code"
    fi
}

# run_ranks LAUNCHER...: sets code to the launcher's exit code. Signals do not interrupt the wait.
run_ranks() {
    if ((stop_requested)); then
        code=75
        return
    fi
    "$@" &
    local child=$!
    while :; do
        wait "$child"
        code=$?
        if ((code <= 128)) || ! kill -0 "$child" 2>/dev/null; then break; fi
        keep_asking "$child" &
    done
    wait "$child"
    code=$?
}

keep_asking() {
    while kill -0 "$1" 2>/dev/null; do
        [[ -d $run_dir && ! -e $run_dir/STOP ]] && : >"$run_dir/STOP"
        sleep 1
    done
    rm -f "$run_dir/STOP"
}

# conclude TRAIN_ARGUMENTS...: requeues the job if it was stopped and can resume; exits with the
# run's own exit code, which torchrun does not pass on.
conclude() {
    "$SPECTRAL_SCALE_PYTHON" -m spectral_scale slurm --conclude "$code" --since "$started" "$@"
    exit $?
}
