"""What of the comparison can be tested without faiss, hnswlib or numpy: curves, joining, tables, plots, mistakes."""

import io
import json
import sys
import tempfile
import unittest
import xml.etree.ElementTree as xml
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import arrays  # noqa: E402
import join  # noqa: E402
import peers  # noqa: E402
import svg  # noqa: E402


SOURCE = {"kind": "dump", "model": "M", "tokens": 8192, "text": "t"}
SETTING = {"decode": 256, "stride": 16, "sink": 4, "window": 64}


def summary(mean):
    return {"mean": mean, "p10": mean / 2, "p50": mean, "p90": 2 * mean, "p99": 3 * mean}


def index(name, *curve, counted=True, reached=1.0):
    points = [
        {
            "effort": keys,
            "recall_10": recall,
            "recall_100": recall,
            "keys_share": keys if counted else None,
            "bytes_share": 2 * keys if counted else None,
            "bytes_per_search": 1000 * keys,
            "mass": summary(recall),
            "error": summary(0.1),
            "micros_per_search": 5.0,
        }
        for keys, recall in curve
    ]
    mass = {"mass": 0.95, "reached": reached, "bytes": summary(2048.0), "bytes_share": summary(0.25)}
    return {
        "name": name,
        "build_seconds": 1.5,
        "bytes_per_token": 16.0,
        "curve": points,
        "for_mass": mass if counted else None,
    }


def ours(*indexes):
    served = {
        "effort": 0.04,
        "target_mass": 1.0,
        "queries": 3,
        "rows_share": 0.02,
        "bytes_share": 0.1,
        "bytes_per_search": 1.0,
        "mass": summary(0.9),
        "error": summary(0.01),
        "certificates_kept": 0.99,
        "bound": summary(0.02),
        "missed": summary(0.01),
        "micros_per_search": 9.0,
    }
    group = {
        "name": "layers from 3 on",
        "layers": [4],
        "recordings": 3,
        "heads": 3,
        "head_dim": 64,
        "searched_keys": 7868,
        "key_bytes": 7868 * 128,
        "indexes": list(indexes),
        "served": [served],
    }
    return {
        "schema": 1,
        "source": SOURCE,
        "setting": SETTING,
        "kvasir": "0",
        "profile": "dev",
        "machine": {"cpu": "C", "cores": 2},
        "groups": [group],
    }


def theirs(*indexes):
    groups = [{"name": "layers from 3 on", "layers": [4], "indexes": list(indexes)}]
    return {"schema": 2, "peers": {"faiss": "1"}, "source": SOURCE, "setting": SETTING, "groups": groups}


class Curves(unittest.TestCase):
    POINTS = [(0.04, 1.0), (0.01, 0.5)]

    def test_between_points_over_the_logarithm(self):
        for x, expected in ((0.01, 0.5), (0.02, 0.75), (0.04, 1.0), (0.005, None), (0.05, None)):
            found = join.between(self.POINTS, x)
            self.assertEqual(expected, found if found is None else round(found, 9), x)

    def test_where_a_level_is_reached(self):
        for y, expected in ((0.75, 0.02), (0.5, 0.01), (0.3, 0.01), (1.1, None)):
            found = join.first_above(self.POINTS, y)
            self.assertEqual(expected, found if found is None else round(found, 9), y)


class Joining(unittest.TestCase):
    def table(self, *results):
        return join.markdown(join.joined(results))

    def test_one_table_of_all(self):
        text = self.table(
            ours(index("flat", (0.01, 1.0))),
            ours(index("roar", (0.01, 0.5), (0.04, 1.0))),
            theirs(index("hnswlib", (0.01, 0.9), counted=False)),
        )
        line = next(line for line in text.splitlines() if line.startswith("| roar"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        self.assertEqual(cells[:5], ["roar", "0.500", "0.750", "0.896", "-"])
        # 0.95 lies nine tenths of the way, over the logarithm.
        self.assertEqual(cells[7:12], ["0.750", "3.5 %", "2 KiB", "25.0 %", "1.5"])
        self.assertIn("| hnswlib | - | - | - | - | - | - | - | - | - | - | 1.5 | 16 | - |", text)
        self.assertNotIn("| flat", text)
        self.assertIn("The exact best keys alone err by 0.100 with 1 % of the rows.", text)
        self.assertEqual(text.count("| 2.00 % | 10.0 % | 0.900 | 0.0100 |"), 1)

    def test_of_an_index_measured_twice_the_first_counts(self):
        text = self.table(ours(index("roar", (0.01, 0.5))), ours(index("roar", (0.01, 0.6))))
        self.assertEqual([line[:14] for line in text.splitlines() if line.startswith("| roar")], ["| roar | 0.500"])

    def test_other_sources_and_settings_have_tables_of_their_own(self):
        for other in ({"source": SOURCE | {"model": "N"}}, {"setting": SETTING | {"stride": 32}}):
            one, two = ours(index("roar", (0.01, 0.5))), ours(index("roar", (0.01, 0.5)))
            self.assertEqual(self.table(one, two | other).count("| roar |"), 2)

    def test_what_did_not_reach_the_mass_is_not_said(self):
        text = self.table(ours(index("roar", (0.01, 0.5), reached=0.9)))
        self.assertIn("| roar | 0.500 | - | - | - | - | - | - | - | - | - | 1.5 |", text)

    def test_what_does_not_go_together_is_refused(self):
        sparser = theirs() | {"setting": SETTING | {"stride": 32}}
        for results in ([ours() | {"schema": 2}], [ours(), theirs() | {"schema": 1}], [theirs()], [ours(), sparser]):
            with self.assertRaises(ValueError):
                self.table(*results)

    def test_files(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ours.json"
            path.write_text(json.dumps(ours(index("sketch", (0.01, 0.5), (0.1, 1.0)))), encoding="utf-8")
            with redirect_stdout(io.StringIO()):
                join.main([str(path), "--out", folder])
            page = xml.parse(Path(folder) / "recall.svg").getroot()
            lines = page.iter("{http://www.w3.org/2000/svg}polyline")
            # Three curves of the index, and one of what is served.
            self.assertEqual(len(list(lines)), 4)
            self.assertTrue((Path(folder) / "recall.md").read_text(encoding="utf-8").startswith("### M, 8,192 tokens"))

    def test_mistakes_are_refused(self):
        for line in (["one.json"], ["--out", "x"], []):
            with self.assertRaises(SystemExit), redirect_stderr(io.StringIO()):
                join.arguments(line)


class Plots(unittest.TestCase):
    def test_ticks(self):
        self.assertEqual(svg.ticks_of(1, 20), [1, 2, 5, 10, 20])

    def test_the_least_is_on_top_and_stays_inside(self):
        panel = "".join(svg.dots("t", "l", "x", {"much": 99.0, "sketch": 0.25}, (0.1, 20)))
        self.assertLess(panel.index(">sketch<"), panel.index(">much<"))
        places = [float(part.split('"')[0]) for part in panel.split('cx="')[1:]]
        self.assertTrue(all(svg.LEFT < place <= svg.WIDTH for place in places), places)

    def test_others_are_dashed_and_ours_on_top(self):
        panel = svg.lines("t", "x", "y", {"sketch": [(0.1, 0.5)], "faiss-ivf": [(0.1, 0.4)]}, (0.01, 1), (0, 1))
        curves = [part for part in panel if part.startswith("<polyline")]
        self.assertEqual(["stroke-dasharray" in curve for curve in curves], [True, False])

    def test_words_are_escaped(self):
        self.assertIn("a &lt;b&gt;", "".join(svg.dots("a <b>", "c", "d", {"e": 1.0}, (0.1, 20))))


class Peers(unittest.TestCase):
    def test_widths_rise_to_the_most(self):
        self.assertEqual(peers.widths(20), [8, 11, 15, 20])

    def test_percentiles_are_those_of_kvasir(self):
        self.assertEqual(peers.spread([float(at) for at in range(100, 0, -1)]), {"mean": 50.5, "p10": 10.0, "p50": 50.0, "p90": 90.0, "p99": 99.0})
        self.assertEqual(peers.spread([])["p50"], 0.0)

    def test_layers_fall_into_our_groups(self):
        for layer, kind, expected in ((2, "dump", "layers 0-2"), (3, "dump", "layers from 3 on"), (0, "synthetic", "made up")):
            self.assertEqual(peers.group_of(layer, kind), expected)

    def test_mistakes_are_refused(self):
        for line in ([], ["d", "--setting", "s", "--index", "nobody"]):
            with self.assertRaises(SystemExit), redirect_stderr(io.StringIO()):
                peers.arguments(line)

    def test_another_format_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "meta.json").write_text('{"format": "kvasir-qkv/9"}', encoding="utf-8")
            with self.assertRaises(ValueError):
                arrays.Dump(folder)


if __name__ == "__main__":
    unittest.main()
