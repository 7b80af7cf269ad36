"""More than the server can do: what it still does, how it refuses the rest, and whether anything grows.

    python tests/bench/overload.py [--seats 8] [--seconds 20] [--model PATH]
    python tests/bench/overload.py --cpu       # instead: what a refusal takes, by process

Starts the server of fairness.py, measures its peak (closed loop), and then offers once to five times the peak in an
open loop, half of it by each of two tenants, clients in processes of their own. Then, under load, SIGTERM: streams
that have begun must come to their end. Goals: at five times the peak at least 0.9 of it is still answered, refusals
have a Retry-After and p99 below 100 ms, memory does not grow with the load, and no stream is broken by the end. Exit
status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import dataclass

import psutil
from bench_load import Plan, Report, load, quantile, report_of, running
from fairness import Tenants, add_server_options, own_server

MIN_GOODPUT, MAX_REFUSAL_S, MAX_GROWTH = 0.9, 0.1, 1.2
FACTORS = (1, 2, 3, 5)
ROLES = {":decoder-": "decoder", ":router": "router", "ProxyActor": "proxy", "": "others"}
"""Processes by a part of what they are called."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_options(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load; the lines take some ten to fill")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU time of refusals instead")
    options = parser.parse_args()
    with own_server(options) as tenants:
        if options.cpu:
            return costs(tenants, options.seconds)
        goals = measure(tenants, options.seconds) | end_under_load(tenants)
    for goal, is_met in goals.items():
        print(f"{'met' if is_met else 'MISSED':8}{goal}")
    sys.exit(not all(goals.values()))


def measure(tenants: Tenants, seconds: float) -> dict[str, bool]:
    load(tenants.plan("victim", 2.0, connections=32))  # not counted: first use of everything
    peak = served(load(tenants.plan("victim", seconds, connections=32)))
    print(f"peak {peak:.1f} answers/s, {memory(tenants) / 1e6:.0f} MB")
    print(
        f"{'offered':>8}{'answers/s':>11}{'of peak':>9}{'refused/s':>11}{'p99 ms':>8}{'TTFT p99 s':>12}{'MB':>6}"
        "   statuses"
    )
    first_memory = 0.0
    for factor in FACTORS:
        how = {"rate": factor * peak / 2, "warm_up_s": 3.0}
        reports = load(tenants.plan("victim", seconds, **how), tenants.plan("greedy", seconds, **how))
        used = memory(tenants)
        first_memory = first_memory or used
        refused = [seen for report in reports for seen in report.refused]
        late = quantile(sorted(seen.end - seen.due for seen in refused if seen.end is not None), 0.99)
        ttft = quantile(sorted(t for report in reports for t in report.ttfts), 0.99)
        statuses = " ".join(f"{key}: {sum(r.count().get(key, 0) for r in reports)}" for key in (200, 429, 503, 500, 0))
        goodput = served(reports) / peak
        print(
            f"{factor:7}x{served(reports):11.1f}{goodput:9.2f}{len(refused) / seconds:11.1f}{1000 * late:8.1f}"
            f"{ttft:12.2f}{used / 1e6:6.0f}   {statuses}",
            flush=True,
        )
    return {
        f"at {FACTORS[-1]}x at least {MIN_GOODPUT} of the peak": goodput >= MIN_GOODPUT,
        "every refusal has a Retry-After": all(seen.retry_after for seen in refused),
        f"refusals p99 below {1000 * MAX_REFUSAL_S:.0f} ms": late < MAX_REFUSAL_S,
        f"memory at {FACTORS[-1]}x at most {MAX_GROWTH} times that at 1x": used <= MAX_GROWTH * first_memory,
    }


def end_under_load(tenants: Tenants) -> dict[str, bool]:
    """SIGTERM while streams run: those that had their first token by then must come to [DONE]."""
    plan = tenants.plan("victim", 6.0, connections=6, grace_s=30.0)
    with running([plan]) as clients:
        time.sleep(5.0)
        begun = time.monotonic()
        tenants.server.process.send_signal(signal.SIGTERM)
        report = report_of(clients[0])
        tenants.server.process.wait(60)
    broken = [seen for seen in report.requests if seen.first is not None and not seen.is_whole]
    print(
        f"SIGTERM under load: {len(report.answered)} streams whole, {len(broken)} broken, "
        f"exit {tenants.server.process.returncode} after {time.monotonic() - begun:.1f} s"
    )
    return {
        "SIGTERM breaks no stream": bool(report.answered) and not broken,
        "SIGTERM ends with status 0": tenants.server.process.returncode == 0,
    }


def costs(tenants: Tenants, seconds: float) -> None:
    """The CPU time of refusals: what the server takes when its lines are full, less what its answers take, which is
    what they take at the peak, where nothing is refused."""
    load(tenants.plan("victim", 2.0, connections=32))
    at_peak = Taken.by(tenants, [tenants.plan("victim", seconds, connections=32, warm_up_s=3.0)])
    how = {"rate": FACTORS[-1] * at_peak.served / 2, "warm_up_s": 12.0}
    full = Taken.by(tenants, [tenants.plan(name, seconds, **how) for name in ("victim", "greedy")])
    for name, taken in (("peak", at_peak), (f"{FACTORS[-1]}x", full)):
        shares = ", ".join(f"{role} {100 * share:.1f} %" for role, share in taken.cores.items())
        print(f"{name:>5}: {taken.served:.1f} answers/s, {taken.refused:.1f} refused/s; of a core {shares}")
    own = {role: full.cores[role] - at_peak.cores[role] * full.served / at_peak.served for role in full.cores}
    own["clients"] = full.cores["clients"]
    costs = ", ".join(f"{role} {1000 * share / full.refused:.1f}" for role, share in own.items())
    print(f"ms of CPU a refusal: {costs}; its p50 is {1000 * full.p50:.1f} ms")


@dataclass(frozen=True)
class Taken:
    """Of one load: answers and refusals a second, the median time to a refusal, and the share of a core by role."""

    served: float
    refused: float
    p50: float
    cores: dict[str, float]

    @classmethod
    def by(cls, tenants: Tenants, plans: list[Plan]) -> Taken:
        """Run the plans, and look at the processes while they count."""
        (warm_up_s,), (seconds,) = {plan.warm_up_s for plan in plans}, {plan.seconds for plan in plans}
        with running(plans) as clients:
            time.sleep(warm_up_s + 1.0)  # a client takes a moment to start
            before, begun = cpu_by_role(tenants), time.monotonic()
            time.sleep(seconds - 2.0)
            after, watched = cpu_by_role(tenants), time.monotonic() - begun
            reports = [report_of(client) for client in clients]
        cores = {role: (after[role] - before[role]) / watched for role in ROLES.values()}
        cores["clients"] = sum(report.cpu_s for report in reports) / (warm_up_s + seconds)
        refused = [seen for report in reports for seen in report.refused if seen.end is not None]
        p50 = quantile(sorted(seen.end - seen.due for seen in refused if seen.end is not None), 0.5)
        return cls(served(reports), len(refused) / seconds, p50, cores)


def cpu_by_role(tenants: Tenants) -> dict[str, float]:
    """Seconds that the server's processes have taken so far."""
    seconds = dict.fromkeys(ROLES.values(), 0.0)
    for process in tenants.server.processes():
        try:
            times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        role = next(role for part, role in ROLES.items() if part in command)
        seconds[role] += times.user + times.system
    return seconds


def served(reports: list[Report]) -> float:
    return sum(report.num_served / report.seconds for report in reports)


def memory(tenants: Tenants) -> float:
    """Bytes of the server and all its processes, shared pages counted once per process."""
    total = 0
    for process in tenants.server.processes():
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return float(total)


if __name__ == "__main__":
    main()
