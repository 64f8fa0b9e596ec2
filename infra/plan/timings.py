"""Every duration and count that more than one part depends on. Each is derived here, once, with its reason.

They hang together: an engine that dies must be out of rotation in `OUT_MS`; nothing may be cut off that is still in its
right; nobody may wait for longer than the one behind him. tests/unit/test_plan_timings.py has these as properties.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from infra.plan.model import Timings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infra.catalog.gpu_start import GpuStart
    from infra.plan.work import Work

OUT_MS = 1500
"""An engine that is dead or stopped is out of rotation after so long."""
SLACK_MS = 100
"""What none of the parts of `OUT_MS` accounts for: processes that wake late."""
AGENT_RESTART_MS = 2000
"""From the death of the agent until another process answers on its socket, which stays open meanwhile."""
LEAST_WARMUP_S = 30
LEAST_WEDGED_S = 20
HEAR_S = 10
"""To hear of the beginning of something and of its end."""
LONGEST_QUEUE_S = 120

# AWS

HEARTBEAT_LIMIT_S = 7200
"""Longest time-out of a lifecycle hook (API reference, PutLifecycleHook, 2026-11)."""
DEREGISTRATION_LIMIT_S = 3600
"""Longest deregistration delay of a target group (API reference, 2026-11)."""
IDLE_RANGE_S = (60, 6000)
"""Idle time-out of a TCP listener; a TLS listener has 350 s, fixed (Network Load Balancer guide, 2026-11)."""
SPOT_NOTICE_S = 120
"""From the notice to the end of a spot instance; best effort (EC2 guide, spot interruption notices, 2026-11)."""
METADATA_POLL_S = 5
"""How often AWS recommends to look for that notice (same page)."""
DRAIN_LIMIT_S = DEREGISTRATION_LIMIT_S - LONGEST_QUEUE_S - 2 * HEAR_S
"""Longest generation for which `deregistration_s` is long enough, whatever `queue_s` is."""

Explained = tuple[int | str, str]
"""A value and the reason for it."""


def explain(works: Sequence[Work], ttft_p95_s: float) -> dict[str, Explained]:
    """Every timing of a fleet, and why: for each the value that its slowest model needs."""
    return _generation(works, ttft_p95_s) | _starting(works) | _rotation() | _rest()


def timings(explained: Mapping[str, Explained]) -> Timings:
    """The timings without the reasons."""
    return Timings.model_validate(values(explained))


def values(explained: Mapping[str, Explained]) -> dict[str, int | str]:
    """What was explained, without the reasons."""
    return {name: value for name, (value, _) in explained.items()}


def _generation(works: Sequence[Work], ttft_p95_s: float) -> dict[str, Explained]:
    longest = math.ceil(max(work.generation for work in works))
    drain = max(longest, _wedged(works)) + HEAR_S
    server = drain + 10
    shutdown = 30
    queue = round(min(LONGEST_QUEUE_S, max(10, 6 * ttft_p95_s)))
    return {
        "longest_generation_s": (
            longest,
            "a slow machine reads a full batch of full prompts and writes the longest answer, nothing new coming in",
        ),
        "drain_s": (
            drain,
            "longest generation, or the time to see that an engine is wedged; and 10 s to hear of beginning and end",
        ),
        "shutdown_s": (
            shutdown,
            "after a drain, time for what was on its way; without one, the limit of what may finish",
        ),
        "stop_s": (shutdown + 15, "shutdown, and 15 s for the engine's processes to end (7 to 10 measured)"),
        "server_s": (
            server,
            "an answer that is not streamed is silent until it is whole: drain and 10 s; the agent ends wedged ones",
        ),
        "client_s": (server + 10, "more than server_s: else the gateway takes its own waiting for the client's"),
        "queue_s": (
            queue,
            "six times the promised time to the first token, 10 to 120 s: clients give up after minutes",
        ),
        "gateway_stop_s": (queue + drain, "what waits in an old gateway process gets its place and finishes"),
    }


def _wedged(works: Sequence[Work]) -> int:
    return max(LEAST_WEDGED_S, math.ceil(max(work.silence for work in works)))


def _starting(works: Sequence[Work]) -> dict[str, Explained]:
    warmup = max(LEAST_WARMUP_S, math.ceil(max(work.warmup for work in works)))
    start = math.ceil(max(work.start for work in works)) + 2 * warmup
    wedged = _wedged(works)
    restarts = 3
    return {
        "warmup_request_s": (warmup, f"the longest prompt and a short answer, {LEAST_WARMUP_S} s at least"),
        "start_s": (start, "twice the slowest start that was measured, reading the weights, two warm-up requests"),
        "wedged_s": (
            wedged,
            f"the longest time without a token that a slow machine needs, {LEAST_WEDGED_S} s at least",
        ),
        "crash_loop_restarts": (restarts, "starts that nobody asked for"),
        "crash_loop_window_s": (restarts * start, "the time that so many of the slowest starts take"),
    }


def _rotation() -> dict[str, Explained]:
    poll, check, fast, fall = 200, 200, 100, 2
    probe = OUT_MS - SLACK_MS - poll - check - fast * (fall - 1)
    return {
        "poll_ms": (poll, f"part of the {OUT_MS} ms in which a dead engine is out of rotation"),
        "probe_timeout_ms": (
            probe,
            f"what is left of those {OUT_MS} ms: an engine on a busy machine is slow to answer",
        ),
        "check_ms": (check, f"part of those {OUT_MS} ms"),
        "check_fast_ms": (fast, f"part of those {OUT_MS} ms, once for each further check that must fail"),
        "check_fall": (fall, "one lost check is no failure"),
        "check_rise": (1, "the agent has made sure"),
        "check_timeout_ms": (
            AGENT_RESTART_MS * 5 // 2,
            "a restart of the agent, two and a half times: engines stay in",
        ),
        "connect_ms": (1000, "an engine on the same network accepts at once, or is not there"),
    }


def _rest() -> dict[str, Explained]:
    scrape = 5
    return {
        "request_s": (30, "for a client to send a request"),
        "keep_alive_s": (75, "more than the 60 s of common clients: it is they who close"),
        "scrape_s": (scrape, "alerts within half a minute, at next to no load"),
        "alert_window_s": (6 * scrape, "six scrapes: one that is lost starts no alert and ends none"),
        "retention": ("7d", "a week to look back on one machine"),
    }


def queue_length(requests_s: float, queue_s: int) -> int:
    """Requests that may wait for a model, of which its engines together answer so many in a second.

    Who comes last is served within `queue_s`: length / rate <= queue_s. A longer queue would only let him wait in vain.
    """
    return max(1, int(requests_s * queue_s))


# Targets whose machines come and go


def explain_aws(t: Timings, node_weights_bytes: int, facts: GpuStart) -> dict[str, Explained]:
    """What only AWS has.

    Args:
        t: The fleet's timings.
        node_weights_bytes: What one node has to fetch at most before its engines start.
        facts: The catalog's.
    """
    boot, fetch = facts.boot_s.value, math.ceil(node_weights_bytes / facts.fetch_bytes_s.value)
    launch = min(boot + fetch + t.start_s + 60, HEARTBEAT_LIMIT_S)
    ttl = 10
    return {
        "drain_hook_s": (
            min(t.drain_s + t.stop_s + 60, HEARTBEAT_LIMIT_S),
            "heartbeat of an engine node's terminate hook: drain, stop, and a minute to say so; AWS allows 7200 s",
        ),
        "gateway_hook_s": (
            min(t.gateway_stop_s + 60, HEARTBEAT_LIMIT_S),
            "the same of a gateway: its streams finish, and a minute to say so",
        ),
        "launch_hook_s": (
            launch,
            f"boot {boot} s, weights over a slow network {fetch} s, start {t.start_s} s, a minute; AWS allows 7200 s",
        ),
        "health_grace_s": (
            launch,
            "as launch_hook_s: a node that is still starting is not unhealthy",
        ),
        "instance_warmup_s": (
            ttl + math.ceil(t.check_rise * t.check_ms / 1000) + HEAR_S,
            "a gateway finds the new node and checks it; only then may the next one go (else AWS takes health_grace_s)",
        ),
        "deregistration_s": (
            min(t.gateway_stop_s + HEAR_S, DEREGISTRATION_LIMIT_S),
            "the load balancer keeps the connections of a gateway that leaves until it has finished; AWS allows 3600 s",
        ),
        "idle_s": (
            max(IDLE_RANGE_S[0], min(t.client_s + 10, IDLE_RANGE_S[1])),
            "the load balancer forgets silent connections: later than the gateway does; AWS allows 60 to 6000 s",
        ),
        "dns_ttl_s": (ttl, "so long a new engine waits to be found; one that leaves is out by the gateway's check"),
        "metadata_poll_s": (METADATA_POLL_S, "how often the agent looks for a spot notice: as AWS recommends"),
        "spot_drain_s": (
            min(t.drain_s, SPOT_NOTICE_S - METADATA_POLL_S - HEAR_S),
            f"the notice comes {SPOT_NOTICE_S} s before the end and is seen {METADATA_POLL_S} s later; 10 s to end",
        ),
    }


def explain_kubernetes(t: Timings, node_weights_bytes: int, facts: GpuStart) -> dict[str, Explained]:
    """What only Kubernetes has. Arguments as of `explain_aws`."""
    pull, fetch = facts.image_pull_s.value, math.ceil(node_weights_bytes / facts.fetch_bytes_s.value)
    grace = t.drain_s + t.stop_s + HEAR_S
    period = 5
    return {
        "grace_s": (grace, "terminationGracePeriodSeconds of engines: drain, stop, and 10 s; then comes SIGKILL"),
        "gateway_grace_s": (t.gateway_stop_s + HEAR_S, "the same of gateways: their streams finish, and 10 s"),
        "readiness_period_s": (
            1,
            "the shortest there is; it is the gateway's own check that takes a dead engine out",
        ),
        "readiness_timeout_s": (
            math.ceil(t.check_timeout_ms / 1000),
            "as the gateway's check: outlasts the agent's restart",
        ),
        "startup_period_s": (period, "soon enough to go on, at next to no load"),
        "startup_failures": (math.ceil(t.start_s / period) + 1, "periods until start_s has passed, and one"),
        "progress_s": (
            grace + pull + fetch + t.start_s,
            f"progressDeadlineSeconds: the old pod leaves first; then image {pull} s, weights {fetch} s, and start_s",
        ),
    }


def min_healthy_percent(nodes: int) -> int:
    """Instance refresh's MinHealthyPercentage that lets one node go, together with MaxHealthyPercentage 100.

    Never a spare GPU: with 100 AWS would launch the new node before it ends the old one. AWS rounds the count up and
    knows whole per cent only, so that from 200 nodes on one in a hundred goes at once.
    """
    return 100 * (nodes - 1) // nodes
