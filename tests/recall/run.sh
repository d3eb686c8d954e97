#!/usr/bin/env bash
# Every index on the same arrays: a dump of a real text by SmolLM2, then a recording made up for a length that it does not
# reach; beside faiss and hnswlib. Leaves arrays and results in $CARGO_TARGET_DIR (or target)/recall.
#
#   tests/recall/run.sh             layers 0-2 and six others of 8,192 tokens; 131,072 made up (an hour on two cores)
#   tests/recall/run.sh --quick     three layers; 32,768 made up (minutes)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(cd "$here/../.." && pwd)"
target="${CARGO_TARGET_DIR:-$repository/target}"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/kvasir"
kvasir="$target/debug/kvasir"
out="$target/recall"
python="$cache/recall/bin/python"

layers=0,1,2,4,8,13,18,22,28
tokens=131072
case "${1-}" in
--quick)
    layers=1,8,22
    tokens=32768
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

[ -f "$out/real/meta.json" ] || "$kvasir" bench dump "$out/real" --layers "$layers"
"$kvasir" bench index "$out/real" --layers "$layers" --json >"$out/real.json"
"$python" "$here/peers.py" "$out/real" --setting "$out/real.json" --out "$out/real-peers.json"

"$kvasir" bench index --synthetic "$tokens" --write "$out/made-up" --stride 16 --json >"$out/made-up.json"
"$python" "$here/peers.py" "$out/made-up" --setting "$out/made-up.json" --out "$out/made-up-peers.json"

"$python" "$here/join.py" "$out/real.json" "$out/real-peers.json" "$out/made-up.json" "$out/made-up-peers.json" --out "$out"
