#!/usr/bin/env bash
# Every index on the same arrays: dumps of a real text by SmolLM2 and, where it is installed, by Gemma 3, then a recording made up for
# a length that they do not reach; beside faiss and hnswlib. Leaves arrays and results in $CARGO_TARGET_DIR (or target)/recall.
#
#   tests/recall/run.sh             layers 0-2 and six others of 8,192 tokens; Gemma's three of 32,768; 131,072 made up (hours)
#   tests/recall/run.sh --quick     three layers, every 32nd of the last tokens asked; 32,768 made up
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
stride=8
case "${1-}" in
--quick)
    layers=1,8,22
    tokens=32768
    stride=32
    ;;
"") ;;
*)
    sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
    ;;
esac

[ -x "$kvasir" ] || {
    echo "recall: error: $kvasir is not there: run \`make build\`, or \`make recall\`, which does" >&2
    exit 1
}
"$repository/deploy/bootstrap.sh" model recall
mkdir -p "$out"

pairs=()
# measure NAME ARGUMENT..: ours with the arguments, then the peers on the arrays in the folder of that name.
measure() {
    local name="$1"
    shift
    "$kvasir" "$@" --json >"$out/$name.json"
    "$python" "$here/peers.py" "$out/$name" --setting "$out/$name.json" --out "$out/$name-peers.json"
    pairs+=("$out/$name.json" "$out/$name-peers.json")
}

[ -f "$out/real/meta.json" ] || "$kvasir" bench dump "$out/real" --layers "$layers"
measure real bench index "$out/real" --layers "$layers" --stride "$stride"

if [ -f "$gemma" ]; then
    [ -f "$gemma.basis" ] || "$kvasir" --model "$gemma" calibrate
    [ -f "$out/gemma/meta.json" ] || "$kvasir" --model "$gemma" bench dump "$out/gemma"
    measure gemma --model "$gemma" bench index "$out/gemma" --stride "$((2 * stride))"
else
    echo "recall: Gemma 3 is left out; \`make gemma\` fetches it under its own terms" >&2
fi

measure made-up bench index --synthetic "$tokens" --write "$out/made-up" --stride "$((2 * stride))"

"$python" "$here/join.py" "${pairs[@]}" --out "$out"
