#!/usr/bin/env bash
# Every index on the same arrays: dumps of a real text by SmolLM2 and, where it is installed, by Gemma 3, then a recording made up for
# a length that they do not reach; beside faiss and hnswlib. Leaves arrays and results in $CARGO_TARGET_DIR (or target)/recall.
#
#   tests/recall/run.sh             layers 0-2 and six others of 8,192 tokens; Gemma's three of 32,768; 131,072 made up (hours)
#   tests/recall/run.sh --quick     three layers, every 32nd of the last tokens asked; 32,768 made up
#   tests/recall/run.sh --continue  what has a result already is not measured again: goes on where a run was stopped, or measures
#                                   one index anew after its results (results/*-NAME.json) were removed
#   tests/recall/run.sh --stride N  every Nth of SmolLM2's last 256 tokens asked (8), and every 2 Nth of the others'
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(cd "$here/../.." && pwd)"
target="${CARGO_TARGET_DIR:-$repository/target}"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/kvasir"
kvasir="$target/debug/kvasir"
out="$target/recall"
python="$cache/recall/bin/python"

gemma="$cache/models/gemma-3-270m-q4_k_m.gguf"
layers=0,1,2,4,8,13,18,22,28
tokens=131072
seed=2
stride=8
continue=
while [ "$#" -gt 0 ]; do
    case "$1" in
    --quick)
        layers=1,8,22
        tokens=32768
        seed=1
        stride=32
        ;;
    --continue) continue=1 ;;
    --stride)
        stride="${2:?--stride needs a number}"
        shift
        ;;
    *)
        sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
        exit 2
        ;;
    esac
    shift
done

[ -x "$kvasir" ] || {
    echo "recall: error: $kvasir is not there: run \`make build\`, or \`make recall\`, which does" >&2
    exit 1
}
"$repository/deploy/bootstrap.sh" model recall
[ -n "$continue" ] || rm -rf "$out/results"
mkdir -p "$out/results"

results=()
# step FILE COMMAND..: what the command prints becomes the file, at once and when it is whole.
step() {
    local file="$1"
    shift
    results+=("$file")
    [ -s "$file" ] && return
    "$@" >"$file.partial"
    mv "$file.partial" "$file"
}

# measure NAME ARGUMENT..: each of ours with the arguments, then each of the peers on the arrays in the folder of that name.
measure() {
    local name="$1" index
    shift
    for index in flat sketch roar roar-seen wave quest ivf hnsw; do
        step "$out/results/$name-$index.json" "$kvasir" "$@" --indexes "$index" --json
    done
    for index in faiss-flat faiss-ivf faiss-hnsw hnswlib; do
        step "$out/results/$name-$index.json" "$python" "$here/peers.py" "$out/$name" --setting "$out/results/$name-flat.json" --index "$index"
    done
}

[ -f "$out/real/meta.json" ] || "$kvasir" bench dump "$out/real" --layers "$layers"
measure real bench index "$out/real" --layers "$layers" --stride "$stride"

if [ -f "$gemma" ]; then
    # On another text than the one that is measured, if there is one: it comes with the source of a dependency.
    text="$(find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -path '*/snappy/testdata/lcet10.txt' -print -quit 2>/dev/null)" || text=
    [ -f "$gemma.basis" ] || "$kvasir" --model "$gemma" calibrate ${text:+--text "$text" --tokens 32768}
    [ -f "$out/gemma/meta.json" ] || "$kvasir" --model "$gemma" bench dump "$out/gemma"
    measure gemma --model "$gemma" bench index "$out/gemma" --stride "$((2 * stride))"
else
    echo "recall: Gemma 3 is left out; \`make gemma\` fetches it under its own terms" >&2
fi

made_up=(bench index --synthetic "$tokens" --seed "$seed" --stride "$((2 * stride))")
[ -f "$out/made-up/meta.json" ] || "$kvasir" "${made_up[@]}" --indexes flat --write "$out/made-up"
measure made-up "${made_up[@]}"

"$python" "$here/join.py" "${results[@]}" --out "$out"
