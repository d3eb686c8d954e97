#!/usr/bin/env bash
# Kvasir beside Mooncake Store, LMCache and Redis, in a network namespace of its own: Mooncake listens on every address
# whatever it is told. Installs the peers first (6 GB, minutes, once). Arguments go to compare.py; --help lists them.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(cd "$here/../.." && pwd)"
target="${CARGO_TARGET_DIR:-$repository/target}"

for argument in "$@"; do
    case "$argument" in
    -h | --help | --dry-run | --summarise | --summarise=*) exec python3 "$here/compare.py" "$@" ;;
    esac
done

"$repository/deploy/bootstrap.sh" stores
# Root makes a network namespace at once; anyone else within a user namespace, where the system lets them.
if unshare --net true 2>/dev/null; then
    alone=(unshare --net)
elif unshare --map-root-user --net true 2>/dev/null; then
    alone=(unshare --map-root-user --net)
else
    echo "peers: error: a network namespace is needed, since Mooncake listens on all addresses, and 'unshare --net' is refused: run this as root" >&2
    exit 1
fi
exec "${alone[@]}" sh -c 'ip link set lo up && exec "$@"' peers \
    python3 "$here/compare.py" --kvasir "$target/debug/kvasir" --out "$target/peers" "$@"
