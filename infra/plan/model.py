"""The plan: one frozen value that everything after it reads and nothing after it changes.

Units are in the names: `_s` seconds, `_ms` milliseconds, `_bytes` bytes. A field that has no unit is a count or a name.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

Target = Literal["local", "aws", "kubernetes"]
Quantization = Literal["none", "8bit", "4bit"]


class Frozen(BaseModel):
    """Base of every part of the plan: immutable, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HostFacts(Frozen):
    """What the plan has to know of the machine that a `local` stack runs on. Read elsewhere: the plan does no I/O."""

    ram_bytes: int
    """Memory that processes may use: the machine's, or the container's limit if that is lower."""
    cores: int
    cpu_flags: frozenset[str]
    """As in /proc/cpuinfo; only `avx512f` matters today."""
    platform: str
    """`linux-x86_64`, `linux-aarch64`, `darwin-arm64` …"""


class ModelPlan(Frozen):
    """A model that clients can ask for."""

    name: str
    """What clients put in `model`."""
    weights: str
    """The entry of models.lock.yaml that is served: after the quantisation was chosen."""
    base_weights: str
    """The entry that the stack config names."""
    quantization: Quantization
    format: str
    """`bf16`, `w8a8-int8` …: what the weights are stored as."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """What the engine computes in."""
    context: int
    """Tokens of prompt and answer together, `--max-model-len`."""
    concurrency: int
    """Sequences that one engine decodes at once, `--max-num-seqs`."""
    queued: int
    """Requests that one engine lets wait, beside those that run, before it answers 503."""
    kv_cache_bytes: int
    """Memory for keys and values in one engine, `--kv-cache-memory-bytes`."""
    engine_memory_bytes: int
    """What one engine of this model takes in all: an estimate, see plan/memory.py."""
    max_answer: int | None = None
    """Tokens of the longest answer, where that is less than the context."""
    tool_calls: str | None = None
    """vLLM's parser for tool calls; None: requests with tools are refused."""


class EnginePlan(Frozen):
    """One vLLM server."""

    name: str
    """`<model>-<n>`; also the name of its program, of its server in the gateway and of its label in metrics."""
    model: str
    port: int
    flags: tuple[str, ...]
    """Arguments of `vllm serve` after the folder of the weights."""
    environment: tuple[tuple[str, str], ...]


class Timings(Frozen):
    """Every duration and count that more than one part depends on. Derived in plan/timings.py; typed nowhere else."""

    longest_generation_s: int
    """The longest answer that the fleet promises to finish."""
    drain_s: int
    """How long a drain waits for what is in flight: not less than the longest generation."""
    shutdown_s: int
    """`--shutdown-timeout` of the engine: what came in after the drain may finish."""
    stop_s: int
    """SIGTERM to SIGKILL: more than `shutdown_s`."""
    start_s: int
    """From the start of an engine until it must be ready; then the old bundle comes back."""
    warmup_request_s: int
    """How long one warm-up completion may take."""
    poll_ms: int
    """How often the agent asks an engine how it is."""
    probe_timeout_ms: int
    """When the agent takes an engine for silent."""
    wedged_s: int
    """Requests are running and no token has moved for so long: the engine is restarted."""
    crash_loop_restarts: int
    crash_loop_window_s: int
    """So many starts in that window are reported as a crash loop."""
    check_ms: int
    """How often the gateway asks the agent."""
    check_fast_ms: int
    """The same while an answer has just changed."""
    check_timeout_ms: int
    """How long the gateway waits for the agent's answer: it outlasts a restart of the agent."""
    check_fall: int
    check_rise: int
    connect_ms: int
    queue_s: int
    """How long a request waits in the gateway for a free engine."""
    server_s: int
    """The gateway's limit on silence of an engine: time to the first token and between tokens."""
    client_s: int
    request_s: int
    """How long a client may take to send its request."""
    keep_alive_s: int
    gateway_stop_s: int
    """How long an old gateway process may finish its streams after a reload or a stop."""
    scrape_s: int
    alert_window_s: int
    """Shortest `for:` of an alert on scraped values: several scrapes."""
    retention: str
    """How long Prometheus keeps samples, in its own notation."""


class GatewayPlan(Frozen):
    """The load balancer."""

    proxy: Literal["haproxy"]
    bind: str
    port: int
    stats_port: int
    """Prometheus metrics and the status page, on loopback."""
    routing: Literal["least-loaded", "round-robin"]
    maxconn: int
    """Client connections at once."""
    server_maxconn: tuple[tuple[str, int], ...]
    """Per model: requests that the gateway has open at one engine at once."""
    queue: int
    """Requests that may wait in the gateway."""
    max_body_bytes: int
    buffer_bytes: int
    """HAProxy's tune.bufsize."""
    route_by_body: bool
    """Several models: the gateway reads `model` from the JSON body. One model: it reads no body."""
    keys: tuple[tuple[str, str], ...]
    """(name, SHA-256 in hex) of each API key; the key itself is nowhere in the plan."""


class AgentPlan(Frozen):
    """The node agent."""

    port: int


class AlertThresholds(Frozen):
    """What the alert rules compare with."""

    ttft_p95_s: float
    queue_waiting: int


class MonitorPlan(Frozen):
    """Prometheus, Alertmanager, Grafana."""

    prometheus_port: int
    alertmanager_port: int
    grafana_port: int
    thresholds: AlertThresholds


class MemoryPlan(Frozen):
    """Does it fit? All in bytes."""

    available: int
    services: int
    engines: int
    total: int


class Origin(Frozen):
    """Where a value came from, for `fleet plan --explain`."""

    path: str
    value: str
    because: str


class Notice(Frozen):
    """Something the user should know that is no error."""

    path: str
    message: str


class FleetPlan(Frozen):
    """Everything that was decided. Render and targets read it and decide nothing."""

    stack: str
    target: Target
    vllm_version: str
    models: tuple[ModelPlan, ...]
    engines: tuple[EnginePlan, ...]
    gateway: GatewayPlan
    agent: AgentPlan
    monitor: MonitorPlan
    timings: Timings
    memory: MemoryPlan
    notices: tuple[Notice, ...] = ()
    origins: tuple[Origin, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the plan as canonical JSON, without what only explains it."""
        decided = self.model_dump(mode="json", exclude={"notices", "origins"})
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def model(self, name: str) -> ModelPlan:
        """The model that clients call `name`."""
        return next(m for m in self.models if m.name == name)

    def engines_of(self, model: str) -> tuple[EnginePlan, ...]:
        """The engines that serve one model."""
        return tuple(e for e in self.engines if e.model == model)
