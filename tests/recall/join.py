"""Joins what Kvasir and the peers measured on the same arrays into one table and one page of plots.

    python3 join.py RESULT.json.. --out FOLDER

Each result is what `kvasir bench index --json` or `peers.py` said of some indexes on one source; those of a source become one table,
with indexes in the order in which they were given. Needs nothing but Python. A recall at a share of keys between two points of a
curve is read off the line between them, over the logarithm of the share; outside of a curve nothing is said.
"""

import argparse
import json
import sys
from math import log
from pathlib import Path

import svg

OUR_SCHEMA, PEER_SCHEMA = 1, 2
SHARES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
WANTED = 0.95
# Share of the keys at which recall@10 is said: 10 of 8K are as sparse as 100 of 80K.
TEN_AT = 0.02
# Scan everything: what the others are judged by.
EXACT = ("flat", "faiss-flat")


def between(points, x):
    """The value at `x` of a curve `[(x, y)]`, linear over the logarithm of x; `None` outside of it."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 < x < x1:
            return y0 + (y1 - y0) * log(x / x0) / log(x1 / x0)
    return next((y for at, y in points if at == x), None)


def first_above(points, y):
    """The least x at which a curve reaches `y`; `None` if it never does. Below its first point nothing is known."""
    points = sorted(points)
    if points and points[0][1] >= y:
        return points[0][0]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y0 < y <= y1:
            return x0 * (x1 / x0) ** ((y - y0) / (y1 - y0))
    return None


def curve(index, x, y):
    return [(at[x], y(at)) for at in index["curve"] if at[x] is not None]


def joined(results):
    """One run per source, layers and setting: a result of ours, whose groups have the indexes of all."""
    runs = {}
    for result in results:
        theirs = "peers" in result
        schema, whose = (PEER_SCHEMA, "peers.py") if theirs else (OUR_SCHEMA, "kvasir bench index")
        if result.get("schema") != schema:
            raise ValueError(f"{whose} recorded schema {result.get('schema')}; this reads {schema}")
        layers = [group["layers"] for group in result["groups"]]
        name = json.dumps([result["source"], layers, result["setting"]], sort_keys=True)
        if name not in runs and theirs:
            raise ValueError(f"a result of ours comes first, and none is there of {name}")
        run = runs.setdefault(name, result)
        for into, group in zip(run["groups"], result["groups"], strict=True):
            have = {index["name"] for index in into["indexes"]}
            into["indexes"] += [index for index in group["indexes"] if index["name"] not in have]
            into["served"] = into["served"] or group.get("served", [])
    return list(runs.values())


def counted(index):
    return any(at["keys_share"] is not None for at in index["curve"])


def title(run, group):
    source = run["source"]
    if source["kind"] == "synthetic":
        return f"made up, {source['tokens']:,} tokens, d {group['head_dim']}, {group['heads']} query heads, seed {source['seed']}"
    return f"{source['model']}, {source['tokens']:,} tokens, layers {', '.join(str(layer) for layer in group['layers'])}"


def cell(value, form):
    return "-" if value is None else format(value, form)


def share(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def table(group):
    """One line per index."""
    head = ["index", *(f"{100 * at:g} %" for at in SHARES), f"@10: {100 * TEN_AT:g} %", f"keys for {WANTED}", "bytes for .95 of the mass", "of all keys'",
            "build s", "bytes per token", "us"]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for index in group["indexes"]:
        if index["name"] in EXACT:
            continue
        recall = curve(index, "keys_share", lambda at: at["recall_100"])
        ten = curve(index, "keys_share", lambda at: at["recall_10"])
        mass = index["for_mass"]
        near = [at for at in index["curve"] if at["recall_100"] >= WANTED]
        rows.append(
            [
                index["name"],
                *(cell(between(recall, at), ".3f") for at in SHARES),
                cell(between(ten, TEN_AT), ".3f"),
                share(first_above(recall, WANTED)),
                f"{mass['bytes']['mean'] / 1024:,.0f} KiB" if mass and mass["reached"] == 1 else "-",
                share(mass["bytes_share"]["mean"]) if mass and mass["reached"] == 1 else "-",
                f"{index['build_seconds']:.1f}",
                f"{index['bytes_per_token']:.0f}",
                cell(near[0]["micros_per_search"] if near else None, ",.0f"),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def served_table(group):
    rows = [
        "| rows | bytes of keys and values | mass on rows | error mean | p50 | p90 | p99 | bounds kept | median bound (missed) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for at in group["served"]:
        asked = f"mass {at['target_mass']:.2f}: " if at["target_mass"] < 1 else ""
        error = at["error"]
        rows.append(
            f"| {asked}{100 * at['rows_share']:.2f} % | {share(at['bytes_share'])} | {at['mass']['mean']:.3f} | "
            f"{error['mean']:.4f} | {error['p50']:.4f} | {error['p90']:.4f} | {error['p99']:.4f} | "
            f"{at['certificates_kept']:.3f} | {at['bound']['p50']:.3f} ({at['missed']['p50']:.3f}) |"
        )
    exact = next((index for index in group["indexes"] if index["name"] == "flat"), None)
    if exact:
        errors = ", ".join(f"{at['error']['mean']:.3f} with {100 * at['effort']:g} %" for at in exact["curve"])
        rows += ["", f"The exact best keys alone err by {errors} of the rows."]
    return "\n".join(rows)


def markdown(runs):
    out = []
    for run in runs:
        for group in run["groups"]:
            out += [
                f"### {title(run, group)}",
                "",
                f"{group['recordings']} KV heads, {group['searched_keys']:,} keys searched, by each {run['setting']['stride']}th of the last "
                f"{run['setting']['decode']} tokens. Recall@100 by keys scored per query head, and "
                f"recall@10 at one of them; then the keys for a recall@100 of {WANTED}; the bytes that the group reads for .95 of the searched mass of every "
                "query head; microseconds of a search (all query heads of the group) at the first effort with that recall.",
                "",
                table(group),
                "",
            ]
            if group["served"]:
                out += ["Attention as a store serves it by sketches:", "", served_table(group), ""]
    return "\n".join(out)


def served_curves(group):
    """Errors of what is served by rows attended to, and of the exact best keys alone, which no index beats without an estimate."""
    by_rows = sorted((at for at in group["served"] if at["target_mass"] >= 1), key=lambda at: at["rows_share"])
    curves = {"sketch": [(at["rows_share"], at["error"]["mean"]) for at in by_rows]} if by_rows else {}
    for index in group["indexes"]:
        if index["name"] == "flat":
            curves["exact"] = [(at["effort"], at["error"]["mean"]) for at in index["curve"]]
    return curves


def panels(group):
    visible = [index for index in group["indexes"] if index["name"] not in EXACT]
    recall = {index["name"]: curve(index, "keys_share", lambda at: at["recall_100"]) for index in visible}
    by_bytes = {index["name"]: curve(index, "bytes_share", lambda at: at["recall_100"]) for index in visible}
    error = {index["name"]: curve(index, "bytes_share", lambda at: at["error"]["mean"]) for index in visible}
    needed = {
        index["name"]: index["for_mass"]["bytes_share"]["mean"]
        for index in visible
        if index["for_mass"] and index["for_mass"]["reached"] == 1
    }
    keys, bytes_read = "keys scored per query head, %", "bytes read by the group, % of the keys'"
    return [
        svg.lines("Recall by keys", keys, "recall@100", recall, (0.0025, 0.5), (0, 1), mark=(WANTED, "0.95")),
        svg.lines("Recall by bytes", bytes_read, "recall@100", by_bytes, (0.02, 5), (0, 1), mark=(WANTED, "0.95")),
        svg.lines("Error by bytes", bytes_read, "mean |o - o*| / |o*|, keys found alone", error, (0.02, 5), (0.001, 1), "log"),
        svg.lines("Error as served", "rows attended to, %", "the same, with the tail estimated; exact: best keys alone", served_curves(group), (0.0025, 0.5), (0.001, 1), "log"),
        svg.dots("Bytes for .95 of the mass", "least that reaches it for every query head", "% of the bytes of all keys", needed, (0.1, 20)),
    ]


def arguments(line):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="files with results, ours of a source before the peers'")
    parser.add_argument("--out", required=True, help="folder for recall.md and recall.svg")
    return parser.parse_args(line)


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def main(line):
    args = arguments(line)
    runs = joined(read(path) for path in args.results)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recall.md").write_text(markdown(runs), encoding="utf-8")
    first = runs[0]
    notes = [
        f"kvasir {first['kvasir']} ({first['profile']}), {first['machine']['cpu']}, {first['machine']['cores']} cores. "
        "Counts and bytes are the same on any machine.",
        "A group is the query heads of one KV head; the sink and the window that a worker keeps are not searched. Dashed: faiss. What "
        "does not count its work (hnswlib, hnsw-faiss) has no line.",
    ]
    groups = [(run, group) for run in runs for group in run["groups"]]
    shown = {index["name"] for _, group in groups for index in group["indexes"] if index["name"] not in EXACT and counted(index)}
    names = [name for name in svg.COLOURS if name in shown | {"exact"}]
    rows = [(title(run, group), panels(group)) for run, group in groups]
    (out / "recall.svg").write_text(svg.page("Attention indexes on the same keys and queries", notes, names, rows), encoding="utf-8")
    print(f"{out / 'recall.md'}\n{out / 'recall.svg'}")


if __name__ == "__main__":
    main(sys.argv[1:])
