# Sourced by quickstart and selftest: installs this checkout and its dependencies into .venv.
# SPECTRAL_SCALE_TORCH=cpu, cu130 or cu126 chooses the build of torch instead of this machine's driver.
# Sets $root and $venv. Installs nothing while the stamp of the last installation matches.
# shellcheck shell=bash

TORCH_INDICES=https://download.pytorch.org/whl
CPU_INDEX=$TORCH_INDICES/cpu
# CUDA builds of the torch in constraints.txt, best first: the oldest NVIDIA driver that runs the
# build, and the lowest and highest compute capability it has code for (V100 is 7.0, H100 9.0, B200
# 10.0). Drivers run every CUDA of their own major version. The first build is that of PyPI.
CUDA_BUILDS=("cu130 580.65.06 7.5 99.0" "cu126 525.60.13 5.0 9.0")
CPU_NEED_MB=3000
CUDA_NEED_MB=10000

root="$(unset CDPATH && cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/.spectral_scale"
log="$venv/install.log"
pip_install=("$venv/bin/python" -m pip install --retries 2 --progress-bar off
    --constraint constraints.txt)
cd -- "$root"
# Packages of another Python or of pip's --user must not substitute for missing ones.
unset PYTHONHOME PYTHONPATH
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $1"
    shift
    if (($#)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}

# set_up base|test: the one entry point.
set_up() {
    local extra=$1 build
    trap 'say "interrupted; run the same command again to continue"; exit 130' INT TERM
    one_at_a_time
    build=$(wanted_build)
    is_ready "$extra" "$build" || install "$extra" "$build"
    trap - INT TERM
    exec 9<&-
}

# Commands started together take turns; closing the descriptor releases the lock.
one_at_a_time() {
    exec 9<"$root/launch/_setup.sh"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        say "another set-up of this checkout is running; waiting for it"
        flock 9
    fi
}

# The build of torch: the one asked for, or the one that this machine's GPUs and driver can run.
wanted_build() {
    local entry build
    if [[ -n ${SPECTRAL_SCALE_TORCH:-} ]]; then
        for entry in cpu "${CUDA_BUILDS[@]}"; do
            [[ ${entry%% *} != "$SPECTRAL_SCALE_TORCH" ]] || { echo "${entry%% *}"; return; }
        done
        die "SPECTRAL_SCALE_TORCH=$SPECTRAL_SCALE_TORCH is no build of torch $(torch_pin)" \
            "Give one of: cpu ${CUDA_BUILDS[*]%% *}; or leave it out."
    fi
    build=$(fitting_build)
    echo "${build:-cpu}"
}

# The best CUDA build that the driver and all GPUs run; nothing if there is none, or no GPU.
fitting_build() {
    local driver lowest highest entry build least from to
    has_gpu || return 0
    read_gpus
    for entry in "${CUDA_BUILDS[@]}"; do
        read -r build least from to <<<"$entry"
        if [[ -z $driver ]] || at_least "$driver" "$least"; then
            if at_least "$lowest" "$from" && at_least "$to" "$highest"; then
                echo "$build"
                return
            fi
        fi
    done
}

has_gpu() { [[ "$(nvidia-smi -L 2>/dev/null || true)" == *GPU\ [0-9]* ]]; }

# Sets the caller's driver (empty if unknown), lowest and highest (compute capabilities).
read_gpus() {
    local ask=(nvidia-smi --format=csv,noheader) line capability
    driver='' lowest='' highest=''
    while IFS=', ' read -r line capability; do
        [[ $line =~ ^[0-9]+(\.[0-9]+)+$ ]] || continue
        driver=$line
        [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || continue
        [[ -n $lowest ]] && at_least "$capability" "$lowest" || lowest=$capability
        [[ -n $highest ]] && at_least "$highest" "$capability" || highest=$capability
    done < <("${ask[@]}" --query-gpu=driver_version,compute_cap 2>/dev/null ||
        "${ask[@]}" --query-gpu=driver_version 2>/dev/null || true)
    # Where an old nvidia-smi does not tell, take the usual.
    lowest=${lowest:-8.0} highest=${highest:-8.0}
}

# at_least 570.10 525.60.13: whether a dotted version is as high as another one.
at_least() {
    local i have need
    IFS=. read -ra have <<<"$1"
    IFS=. read -ra need <<<"$2"
    for ((i = 0; i < ${#need[@]}; i++)); do
        if ((10#${have[i]:-0} != 10#${need[i]})); then
            ((10#${have[i]:-0} > 10#${need[i]}))
            return
        fi
    done
}

torch_pin() { sed -n 's/^torch==//p' constraints.txt; }

# Prints what an installation depends on as one line; fails if $venv has no Python >= 3.11.
fingerprint() {
    "$venv/bin/python" - "$root" pyproject.toml constraints.txt 2>/dev/null <<'PYTHON'
import hashlib, pathlib, sys
if sys.version_info < (3, 11):
    sys.exit(1)
inputs = [sys.version, sys.argv[1], *(pathlib.Path(name).read_text() for name in sys.argv[2:])]
print(hashlib.sha256("\0".join(inputs).encode()).hexdigest())
PYTHON
}

# A CUDA build also works without a GPU (login nodes), and `test` includes `base`.
is_ready() {
    local was_extra was_build was_fingerprint was_root
    read_stamp || return 1
    [[ $was_extra == "$1" || $was_extra == test ]] &&
        [[ $was_build == "$2" || ($2 == cpu && $was_build == cu*) ]] &&
        [[ $was_fingerprint == "$(fingerprint)" ]]
}

# Sets the caller's was_* variables; fails if there is no stamp.
read_stamp() {
    [[ -f $stamp ]] || return 1
    { read -r was_extra && read -r was_build && read -r was_fingerprint && read -r was_root; } <"$stamp"
}

install() {
    local extra=$1 build=$2 seconds=$SECONDS need=$CPU_NEED_MB torch_source=()
    if [[ $build != cpu ]]; then need=$CUDA_NEED_MB; fi
    require_space "$need"
    require_venv
    rm -f "$stamp"
    : >"$log"
    say "installing into $venv ($build build of torch; some minutes the first time)"
    if [[ $build != cpu ]]; then
        require_cuda_source "$build"
        remove_other_torch "$build"
    elif warn_of_old_driver && answers "$CPU_INDEX/torch/"; then
        torch_source=(--extra-index-url "$CPU_INDEX")
    else
        warn_of_cuda_packages
    fi
    local target=.
    if [[ $extra == test ]]; then target='.[test]'; fi
    "${pip_install[@]}" ${torch_source[@]+"${torch_source[@]}"} --editable "$target" \
        >>"$log" 2>&1 || explain_failed_install
    if [[ $build != cpu ]]; then warn_of_unusable_gpu; fi
    printf '%s\n' "$extra" "$build" "$(fingerprint)" "$root" >"$stamp.new"
    mv -- "$stamp.new" "$stamp"
    say "installed in $((SECONDS - seconds)) s"
}

require_space() {
    local free
    free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1024) }')
    ((free >= $1)) || die "not enough disk space in $root: $free MB are free, $1 MB are needed" \
        "Free some space, or move the checkout to a larger disk, and run the same command again."
}

# Keeps a working .venv that was made here; replaces an incomplete, moved or outdated one.
require_venv() {
    local base_python output was_extra was_build was_fingerprint was_root=$root
    read_stamp || true
    if [[ $was_root == "$root" ]] && fingerprint >/dev/null &&
        "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    find_python
    output=$("$base_python" -m venv --clear "$venv" 2>&1) ||
        die "$base_python could not make the virtual environment $venv:" "$output"
}

# Sets the caller's base_python: $PYTHON if given, otherwise the first Python that is new enough.
find_python() {
    local candidate seen=() names=(python3 python3.13 python3.12 python3.11 python3.14 python)
    if [[ -n ${PYTHON:-} ]]; then names=("$PYTHON"); fi
    for candidate in "${names[@]}"; do
        base_python=$candidate
        case "$(probe_python "$candidate")" in
            ready) return ;;
            no-venv) die_without_venv_module ;;
            "") ;;
            *) seen+=("$candidate is $(probe_python "$candidate")") ;;
        esac
    done
    die "no Python 3.11 or newer was found" \
        "Looked for: ${names[*]}${seen[*]+ (${seen[*]})}" \
        "Install one (https://www.python.org/downloads, or: apt install python3 python3-venv)," \
        "or name one: PYTHON=/path/to/python3.12 $0"
}

# Prints "ready", "no-venv", an older version, or nothing if the command does not run.
probe_python() {
    "$1" - 2>/dev/null <<'PYTHON' || true
import sys
if sys.version_info < (3, 11):
    print(".".join(str(part) for part in sys.version_info[:3]))
else:
    try:
        import ensurepip, venv
        print("ready")
    except ImportError:
        print("no-venv")
PYTHON
}

die_without_venv_module() {
    local version
    version=$("$base_python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    die "$base_python (Python $version) has no venv module" \
        "On Debian or Ubuntu: apt install python$version-venv" \
        "Or name another Python: PYTHON=/path/to/python3.12 $0"
}

answers() {
    "$venv/bin/python" - "$1" >/dev/null 2>&1 <<'PYTHON'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).close()
PYTHON
}

# Sets the caller's torch_source: where pip finds a CUDA build that PyPI does not have.
require_cuda_source() {
    [[ $1 != "${CUDA_BUILDS[0]%% *}" ]] || return 0
    answers "$TORCH_INDICES/$1/torch/" || die \
        "$TORCH_INDICES/$1, which has the build of torch for this driver, cannot be reached" \
        "PyPI has only ${CUDA_BUILDS[0]%% *}, which needs an NVIDIA driver and GPUs that this" \
        "machine does not have. Allow access to that address, or update the driver, or train on" \
        "the CPU: SPECTRAL_SCALE_TORCH=cpu $0"
    torch_source=(--extra-index-url "$TORCH_INDICES/$1")
}

# pip accepts 2.13.0+cpu for torch==2.13.0, so another build needs a forced reinstallation.
# PyPI's build has no label behind its version.
remove_other_torch() {
    local found label
    found=$(torch_version) label=+$1
    if [[ $1 == "${CUDA_BUILDS[0]%% *}" && $found != *+* ]]; then label=''; fi
    [[ -z $found || $found == *"$label" ]] ||
        "$venv/bin/python" -m pip uninstall --yes torch >>"$log" 2>&1
}

# Says before the download why a machine with a GPU gets the CPU build. Always succeeds.
warn_of_old_driver() {
    local driver lowest highest
    if [[ -n ${SPECTRAL_SCALE_TORCH:-} ]] || ! has_gpu; then return 0; fi
    read_gpus
    say "note: the NVIDIA driver ${driver:-} is too old for every CUDA build of torch $(torch_pin)" \
        "that has code for this GPU (compute capability $highest). Build and oldest driver:"
    printf '  %s\n' "${CUDA_BUILDS[@]% * *}" >&2
    say "The CPU build is installed; training will run on the CPU. Update the driver and run the" \
        "same command again."
}

torch_version() {
    "$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

# Without PyTorch's CPU index, pip's own sources decide; a download of gigabytes is announced.
warn_of_cuda_packages() {
    local count
    count=$("${pip_install[@]}" --dry-run --quiet --ignore-installed --report - torch 2>>"$log" |
        "$venv/bin/python" -c '
import json, sys
names = [item["metadata"]["name"] for item in json.load(sys.stdin)["install"]]
print(sum(name.startswith(("nvidia-", "cuda-")) for name in names))' 2>>"$log") || return 0
    ((count > 0)) || return 0
    require_space "$CUDA_NEED_MB"
    say "note: this machine has no NVIDIA GPU, but $CPU_INDEX cannot be reached," \
        "and pip's own sources offer only the CUDA build of torch: $count more packages," \
        "several GB. Installing it all the same; press Ctrl-C to stop."
}

warn_of_unusable_gpu() {
    if has_gpu && ! "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        >>"$log" 2>&1; then
        say "note: nvidia-smi lists a GPU, but torch $(torch_version) cannot use it (details: $log)." \
            "Training will run on the CPU."
    fi
}

explain_failed_install() {
    local what="installing failed"
    if grep -qi 'no space left' "$log"; then
        what="installing failed: no space left on the disk"
    elif grep -Eqi 'connection|timed out|name resolution|No matching distribution|proxy' "$log"; then
        what="installing failed: no package index could be reached, or it lacks a version"
    fi
    say "error: $what. The last lines of pip's log:"
    tail -n 12 -- "$log" | sed 's/^\(.\{200\}\).*/\1.../; s/^/  /' >&2
    say "The whole log: $log"
    say "Behind a proxy set HTTPS_PROXY; with a mirror set PIP_INDEX_URL. Then run the same command again."
    exit 1
}
