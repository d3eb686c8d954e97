"""From single measurements to medians, ratios and tables. Pure: JSON in, text out."""

from statistics import median

SCHEMA = 1
OURS = "kvasir"
# The path that the others are compared with: bytes over a loopback socket, as theirs.
FAST = "kvasir-bulk"
# No peer: what the kernel carries.
CEILING = "bare"


def case_name(case):
    """`(operation, block_bytes, batch)` in words."""
    operation, block_bytes, batch = case
    if operation == "exists":
        return f"exists x {batch}"
    size = f"{block_bytes >> 20} MiB" if block_bytes >= 1 << 20 else f"{block_bytes >> 10} KiB"
    return f"{operation} {size} x {batch}"


def speed(case, result):
    """The number that is compared: GB/s, or keys per second where no bytes travel."""
    return result["blocks_per_second"] if case[0] == "exists" else result["gigabytes_per_second"]


def speed_text(case, value):
    if case[0] == "exists":
        return f"{value / 1e6:.2f} M/s"
    return f"{value:.2f}"


def time_text(microseconds):
    return f"{microseconds:.0f} us" if microseconds < 1000 else f"{microseconds / 1000:.1f} ms"


def cpu(result):
    """Processor seconds per gigabyte, client and servers together; `None` where no bytes travelled."""
    parts = (result.get("client_cpu_seconds_per_gigabyte"), result.get("store_cpu_seconds_per_gigabyte"))
    return None if None in parts else sum(parts)


class Results:
    """Measurements by case, system and round."""

    def __init__(self, recorded):
        if recorded.get("schema") != SCHEMA:
            raise ValueError(f"recorded with schema {recorded.get('schema')}; this reads {SCHEMA}")
        self.recorded = recorded
        self.by_case = {}
        self.failures = {}
        for one in recorded["measurements"]:
            case = (one["operation"], one["block_bytes"], one["batch"])
            systems = self.by_case.setdefault(case, {})
            if "result" in one:
                systems.setdefault(one["system"], {})[one["round"]] = one["result"]
            else:
                self.failures.setdefault((one["system"], case_name(case)), one["error"])
        self.systems = [
            name for name in recorded["systems"] if any(name in systems for systems in self.by_case.values())
        ]

    def median(self, case, system, number):
        """Median over rounds of `number(result)`; `None` without any."""
        values = [number(result) for result in self.by_case.get(case, {}).get(system, {}).values()]
        values = [value for value in values if value is not None]
        return median(values) if values else None

    def speed(self, case, system):
        return self.median(case, system, lambda result: speed(case, result))

    def ratio(self, case, system, against, against_case=None):
        """Median of the ratios of each round, so that what slows a whole round slows both sides."""
        ours = self.by_case.get(case, {}).get(system, {})
        theirs = self.by_case.get(against_case or case, {}).get(against, {})
        ratios = [
            speed(case, ours[round_]) / speed(case, theirs[round_])
            for round_ in ours.keys() & theirs.keys()
            if speed(case, theirs[round_]) > 0
        ]
        return median(ratios) if ratios else None

    # ---- tables ----

    def table(self, cell):
        """Cases down, systems across."""
        lines = ["| | " + " | ".join(self.systems) + " |", "|---" * (len(self.systems) + 1) + "|"]
        for case in sorted(self.by_case, key=lambda case: (["get", "put", "exists"].index(case[0]), *case[1:])):
            cells = [cell(case, system) or "-" for system in self.systems]
            lines.append(f"| {case_name(case)} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def speed_cell(self, case, system):
        value = self.speed(case, system)
        if value is None:
            return None
        p50 = self.median(case, system, lambda result: result["latency_us"]["p50"])
        return f"{speed_text(case, value)} ({time_text(p50)})"

    def cpu_cell(self, case, system):
        value = self.median(case, system, cpu)
        return None if value is None else f"{value:.2f}"

    def ratio_cell(self, case, system):
        if system.startswith(OURS):
            return None
        value = self.ratio(case, FAST, system)
        return None if value is None else f"{value:.1f}"

    # ---- bars ----

    def better_of(self, case, peer):
        """The case, single or batched, in which the peer moves this size fastest."""
        same = [other for other in self.by_case if other[:2] == case[:2] and self.speed(other, peer) is not None]
        return max(same, key=lambda other: self.speed(other, peer), default=None)

    def bars(self):
        """`(what, wanted, measured)` for each thing that is to be shown of the peers that ran; measured is `None` where our
        side is missing."""
        bars = []
        asked = [(peer, wanted) for peer, wanted in (("mooncake", 2.0), ("lmcache", 3.0)) if peer in self.systems]
        for case in sorted(self.by_case):
            if case[0] != "get":
                continue
            for peer, wanted in asked:
                best = self.better_of(case, peer)
                ratio = self.ratio(case, FAST, peer, best) if best else None
                bars.append((f"{case_name(case)} against {peer}'s better of single and batch", wanted, ratio))
        for case in sorted(self.by_case):
            if "mooncake" not in self.systems:
                break
            if case[0] == "put" and case[1] == 4 << 20 and case[2] == 1:
                bars.append((f"{case_name(case)} against mooncake", 1.0, self.ratio(case, FAST, "mooncake")))
            if case[0] == "exists":
                bars.append((f"{case_name(case)} against mooncake", 1.0, self.ratio(case, FAST, "mooncake")))
        for case in sorted(self.by_case):
            if case[0] == "exists":
                continue
            ours = self.median(case, FAST, cpu)
            for peer, _ in asked:
                theirs = self.median(case, peer, cpu)
                ratio = theirs / ours if ours and theirs else None
                bars.append((f"{case_name(case)}: processor time of {peer} against ours", 1.0, ratio))
        case = ("get", 4 << 20, 1)
        if case in self.by_case:
            peers = [system for system in self.systems if not system.startswith(OURS) and system != CEILING]
            ratios = [self.ratio(case, "kvasir-local", peer, self.better_of(case, peer)) for peer in peers]
            ratios = [ratio for ratio in ratios if ratio is not None]
            bars.append((f"{case_name(case)} by the arena against the fastest peer", 10.0, min(ratios, default=None)))
        return bars

    def bars_table(self):
        lines = ["| bar | wanted | measured | |", "|---|---|---|---|"]
        for what, wanted, measured in self.bars():
            verdict = "not measured" if measured is None else "met" if measured >= wanted else "missed"
            shown = "-" if measured is None else f"{measured:.2f}"
            lines.append(f"| {what} | {wanted:.0f}x | {shown} | {verdict} |")
        return "\n".join(lines)

    def markdown(self):
        recorded = self.recorded
        machine = recorded["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
        sections = [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['os']}; "
            f"load {machine['load_before']:.1f} before the run; {recorded['rounds']} rounds of {recorded['seconds']} s, medians; "
            f"{versions}.",
            "GB/s (median latency of a request); keys per second for exists:\n\n" + self.table(self.speed_cell),
            f"{FAST} against each peer, median of the rounds' ratios:\n\n" + self.table(self.ratio_cell),
            "Processor seconds per GB, client and servers together:\n\n" + self.table(self.cpu_cell),
            "What is to be shown:\n\n" + self.bars_table(),
        ]
        if self.failures:
            failures = [f"- {system}, {case}: {error}" for (system, case), error in self.failures.items()]
            sections.append("Not measured:\n\n" + "\n".join(failures))
        for name, error in recorded.get("not_started", {}).items():
            sections.append(f"{name} did not run: {error}")
        return "\n\n".join(sections) + "\n"
