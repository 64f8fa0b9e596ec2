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


class AwsTimings(Frozen):
    """What AWS has to know of how nodes come and go. Derived in plan/timings.py."""

    drain_hook_s: int
    """Heartbeat of the terminate hook of engine nodes."""
    gateway_hook_s: int
    """The same of gateways."""
    launch_hook_s: int
    """Heartbeat of the launch hook: a node that is not ready by then is abandoned."""
    health_grace_s: int
    """HealthCheckGracePeriod of a group."""
    instance_warmup_s: int
    """DefaultInstanceWarmup of a group: how long after one node the next is replaced."""
    deregistration_s: int
    """Deregistration delay of the gateways' target group; connections are not terminated at its end."""
    idle_s: int
    """Idle time-out of the load balancer's TCP listener."""
    dns_ttl_s: int
    """Of the records that engine nodes are found by."""
    metadata_poll_s: int
    """How often the agent asks instance metadata whether its node is to leave."""
    spot_drain_s: int
    """How long a drain waits after a spot notice."""


class KubernetesTimings(Frozen):
    """What Kubernetes has to know of how pods come and go. Derived in plan/timings.py."""

    grace_s: int
    """`terminationGracePeriodSeconds` of engines."""
    gateway_grace_s: int
    """The same of gateways."""
    readiness_period_s: int
    readiness_timeout_s: int
    startup_period_s: int
    startup_failures: int
    """`failureThreshold` of the startup probe."""
    progress_s: int
    """`progressDeadlineSeconds`."""


class SlotPlan(Frozen):
    """The place of one engine on every node of a pool."""

    model: str
    gpus: tuple[int, ...]
    """CUDA_VISIBLE_DEVICES: of one NVLink or NUMA domain."""


class RungPlan(Frozen):
    """One way to get nodes, tried after the rungs before it."""

    kind: Literal["reservation", "capacity-block", "on-demand", "spot"]
    id: str | None
    """Of the reservation or block; None with `capacity-block`: the one that is active."""
    instances: tuple[str, ...]
    """Types that carry the pool's slots, the preferred one first."""
    zones: tuple[str, ...]
    """Zones of the pool in which one of them is offered."""
    usd_per_hour: float
    """Of one node: expected; of a spot node at most."""
    basis: str
    """What that price is."""


class SchedulePlan(Frozen):
    """The hours in which a pool has its nodes."""

    days: tuple[int, ...]
    """Of the week; 0 is Monday."""
    start: str
    """HH:MM"""
    end: str
    """HH:MM, of the same day."""
    time_zone: str

    @property
    def share(self) -> float:
        """Of a week that these hours are."""
        return len(self.days) * (_minutes(self.end) - _minutes(self.start)) / (7 * 24 * 60)

    def later(self, time: str, minutes: int) -> str:
        """A time some minutes later, on the same day and before the end."""
        found = min(_minutes(time) + minutes, _minutes(self.end))
        return f"{found // 60:02}:{found % 60:02}"

    def cron(self, time: str) -> str:
        """A time on these days, as Auto Scaling takes it (5 fields; 0 is Sunday)."""
        hour, _, minute = time.partition(":")
        return f"{int(minute)} {int(hour)} * * {','.join(str((day + 1) % 7) for day in self.days)}"


def _minutes(clock: str) -> int:
    hour, _, minute = clock.partition(":")
    return int(hour) * 60 + int(minute)


class PoolPlan(Frozen):
    """Nodes that are all alike: one launch template, one packing."""

    name: str
    gpu: str
    """Key of the catalog."""
    instance: str | None
    """None: nodes of a cluster that is there already."""
    nodes: int
    gpus_per_node: int
    slots: tuple[SlotPlan, ...]
    """The same on every node; empty where a scheduler finds the places."""
    engines: tuple[tuple[str, int], ...]
    """(model, engines) in the whole pool. Engines are not listed: a pool may have thousands."""
    zones: tuple[str, ...]
    rungs: tuple[RungPlan, ...]
    weights_bytes: int
    """What one node has on disk: each of its models once."""
    weights_on: Literal["nvme", "volume"]
    volume_bytes: int
    """Of the root volume, or of the claim on Kubernetes."""
    min_healthy_percent: int
    """Instance refresh, with MaxHealthyPercentage 100: one node at a time, and never a spare one."""
    usd_per_hour: float | None
    """Of all nodes on the first rung; None: not known."""
    schedule: SchedulePlan | None = None
    """None: it has its nodes always."""

    @property
    def share(self) -> float:
        """Of all hours, in which it has its nodes."""
        return self.schedule.share if self.schedule else 1.0

    @property
    def idle_gpus(self) -> int:
        """GPUs of each node that no slot has; 0 where there are no slots."""
        return self.gpus_per_node - sum(len(slot.gpus) for slot in self.slots) if self.slots else 0

    @property
    def highest_usd_per_hour(self) -> float | None:
        """Of all nodes if the dearest rung has to serve."""
        return self.nodes * max(rung.usd_per_hour for rung in self.rungs) if self.rungs else self.usd_per_hour


class KeyPlan(Frozen):
    """An API key and what it may do. None: no limit."""

    name: str
    sha256: str
    """In hex; the key itself is nowhere in the plan."""
    models: tuple[str, ...] | None = None
    rpm: int | None = None
    """Requests that it may begin in a minute."""
    concurrency: int | None = None
    """Requests that it may have open at once."""
    expires: str | None = None
    """The last day on which it is good, YYYY-MM-DD in UTC."""

    @property
    def limited(self) -> bool:
        """Whether there is anything that it may not do."""
        return (self.models, self.rpm, self.concurrency, self.expires) != (None,) * 4


class DnsPlan(Frozen):
    """How the gateway asks for SRV records."""

    nameservers: tuple[str, ...] = ()
    """`address:port`; empty: those of the machine's resolv.conf."""
    poll_ms: int = 1000
    """How often it asks."""
    retry_ms: int = 500
    """When it takes a question for lost and asks again."""
    retries: int = 3
    gone_ms: int = 0
    """How long an engine stays that is in no answer any more."""
    keep_s: int = 86400
    """How long the last answer holds while no nameserver gives another."""
    payload_bytes: int = 8192
    """Largest answer: 100 engines and more."""


class GatewayPlan(Frozen):
    """The load balancer."""

    proxy: Literal["haproxy", "nginx"]
    bind: str
    port: int
    stats_port: int
    """Prometheus metrics and the status page, on loopback."""
    routing: Literal["least-loaded", "round-robin", "prefix-affinity", "session"]
    maxconn: int
    """Client connections at once."""
    server_maxconn: tuple[tuple[str, int], ...]
    """Per model: requests that the gateway has open at one engine at once."""
    queue: int
    """Requests that may wait in the gateway."""
    max_body_bytes: int
    buffer_bytes: int
    """HAProxy's tune.bufsize: where there are several models, the largest request that `model` is read from."""
    route_by_body: bool
    """Several models: the gateway reads `model` from the JSON body. One model: it reads no body."""
    keys: tuple[tuple[str, str], ...]
    """(name, SHA-256 in hex) of each API key; the key itself is nowhere in the plan."""
    key_limits: tuple[KeyPlan, ...] = ()
    """The same keys, with what each may do; empty: none has a limit."""
    session_header: str = "X-Session-Id"
    prefix_bytes: int = 512
    """Of the first message: what prefix affinity goes by."""
    balance_percent: int = 150
    """Affinity ends where an engine has so much of the mean load."""
    server_weights: tuple[tuple[str, int], ...] = ()
    """(engine, weight); all others have 100."""
    tls: str | None = None
    """PEM file on the gateway's machine, with certificate, chain and key; None: plain HTTP."""
    tls_sha256: str = ""
    """Of that file, where it can be read while the plan is made: another certificate is a change."""
    proxy_protocol: bool = False
    """Clients come through a load balancer that says who they are."""
    discovery: Literal["static", "dns-srv"] = "static"
    srv: tuple[tuple[str, str, int], ...] = ()
    """(model, SRV name, slots): where the engines are found, and for how many there is room."""
    dns: DnsPlan = DnsPlan()
    audio: tuple[str, ...] = ()
    """Models whose engines have /v1/audio."""
    gateways: int = 1
    """Gateways that there is room for: they count together what a key has begun and has open."""
    peers_port: int = 0
    """Where they tell each other; 0: there is one gateway alone."""

    @property
    def url(self) -> str:
        """Where clients on the machine itself reach it."""
        return f"{'https' if self.tls else 'http'}://{self.bind}:{self.port}"


class AgentPlan(Frozen):
    """The node agent."""

    port: int


class AlertThresholds(Frozen):
    """What the alert rules compare with."""

    ttft_p95_s: float
    queue_waiting: int
    tpot_p95_s: float | None = None
    failing: float | None = None
    """Part of the requests that may fail: what the promised availability leaves."""


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


class SpeedPlan(Frozen):
    """How fast one engine is while it has as many requests as its load says."""

    ttft_s: float
    """Mean time to the first token."""
    ttft_p95_s: float
    tpot_s: float
    """Mean time between tokens."""
    tpot_p95_s: float
    """Of requests: each has its own mean."""
    output_tokens_s: float
    """Of all requests together."""
    prefill_tokens_s: float
    """What it reads of prompts in a second while it does nothing else."""
    requests_s: float
    """Answered."""
    measured: bool
    """Of that very configuration; else it is an estimate."""
    error_percent: int
    """Nine estimates of ten are closer; 0 if measured."""
    basis: str
    """What the numbers rest on."""


class ZonePlan(Frozen):
    """One availability zone of the network that is made."""

    zone: str
    """Its id: names like us-east-1a mean another zone in each account."""
    private: str
    """Subnet of the machines."""
    public: str
    """Subnet of what has addresses in the internet: the NAT gateway, a public endpoint."""


class NetworkPlan(Frozen):
    """Where the machines of AWS are."""

    vpc: str | None
    """One that is there already; None: it is made."""
    subnets: tuple[str, ...]
    """Of that VPC."""
    cidr: str | None
    """Of the VPC that is made."""
    zones: tuple[ZonePlan, ...]
    internet: Literal["nat", "none"]
    interface_endpoints: bool
    flow_logs: bool


class GroupPlan(Frozen):
    """One group of engine nodes: a pool's nodes that come from one rung of its ladder."""

    name: str
    """Of the Auto Scaling group; fixed, as its machines know it."""
    pool: str
    rung: int
    kind: Literal["reservation", "capacity-block", "on-demand", "spot"]
    reservation: str | None
    """Id of the reservation or block."""
    instances: tuple[str, ...]
    """Types, the preferred one first."""
    zones: tuple[str, ...]
    minimum: int
    maximum: int
    min_healthy_percent: int
    """With MaxHealthyPercentage 100: never a spare GPU."""
    max_usd_per_hour: float | None
    """Of a spot node."""


class HostsPlan(Frozen):
    """The gateways, or the monitor."""

    group: str | None
    """Name of the Auto Scaling group; None: there is none."""
    instance: str
    hosts: int
    most: int
    """While one is replaced."""
    zones: tuple[str, ...]
    min_healthy_percent: int
    max_healthy_percent: int
    volume_bytes: int
    """Of the root volume."""
    data_bytes: int
    """Of the volume that outlives the machine; 0: there is none."""


class BalancerPlan(Frozen):
    """The load balancer in front of the gateways."""

    public: bool
    clients: tuple[str, ...]
    """Networks; empty: the VPC's."""
    port: int
    tls: Literal["balancer", "gateway"] | None
    """What ends TLS; None: nothing does."""
    certificate: str | None
    """Of ACM; None with `tls: balancer`: one is made for the hostname."""
    hostname: str | None
    hosted_zone: str | None
    health_path: str
    """What it asks each gateway for."""


class AwsPlan(Frozen):
    """What a fleet on AWS is made of beside its pools."""

    network: NetworkPlan
    groups: tuple[GroupPlan, ...]
    """Of engine nodes."""
    gateway: HostsPlan
    monitor: HostsPlan
    balancer: BalancerPlan
    engine_ports: tuple[int, int]
    """The first and the last on which an engine listens on any node."""
    engine_image: str | None
    """Id, or name of the SSM parameter that holds it; None: a public one."""
    gateway_image: str | None
    monitor_image: str | None
    bake: bool
    """Pipelines that bake such images are made."""
    rollout: Literal["automatic", "manual"]
    permissions_boundary: str | None
    hub_token_arn: str | None
    """Of the secret that holds a token for the hub."""
    tags: tuple[tuple[str, str], ...]
    """The user's own."""
    protect: bool
    """What holds data outlives the stack."""

    @property
    def ladders(self) -> list[list[str]]:
        """Names of the groups of every pool that has several, in the order of its rungs."""
        pools = dict.fromkeys(it.pool for it in self.groups)
        found = [[it.name for it in self.groups if it.pool == pool] for pool in pools]
        return [names for names in found if len(names) > 1]


class CostLine(Frozen):
    """Machines that are rented by the hour: a pool, the gateways, the monitor; or something else that is charged."""

    name: str
    instance: str
    """Type of the machines; of what is no machine, what it is made of."""
    count: int
    """Machines; 0: it is none, and has one price as a whole."""
    usd_per_hour_each: float
    usd_per_hour: float
    price: str
    """Where the price is from."""

    @property
    def what(self) -> str:
        """How many of what."""
        return f"{self.count:,} x {self.instance}" if self.count else self.instance


class HostedCost(Frozen):
    """The traffic of one model at a hosted API."""

    name: str
    """`provider/model`."""
    size: str
    """`small`, `large`, or empty where it is not known."""
    usd_per_month: float
    usd_per_request: float
    break_even_requests: int | None
    """Requests a month at which self-hosting costs the same; None: at no number."""
    break_even_engines: int | None
    """Engines that serve so many."""
    verdict: str
    """The same in words."""
    price: str
    """Where the price is from."""


class ModelCost(Frozen):
    """One model's part of the fleet, and what it gets for it. What rests on the engines' speed is an estimate."""

    model: str
    engines: int
    requests_per_month: int
    prompt_tokens: int
    answer_tokens: int
    capacity_requests_per_month: int
    """Requests that its engines answer in a month without a pause."""
    utilisation: float
    """Traffic by capacity; more than 1: it cannot be served."""
    usd_per_hour: float
    usd_per_month: float
    usd_per_mtok_input: float | None
    """At that utilisation; None: no traffic."""
    usd_per_mtok_output: float | None
    error_percent: int
    """Of capacity, utilisation and the break-even."""
    measured: bool
    """The speed is of a benchmark of this very configuration."""
    hosted: tuple[HostedCost, ...]


class CostPlan(Frozen):
    """What the fleet costs, and what its traffic would cost elsewhere."""

    usd_per_hour: float
    """With every pool on the first rung of its ladder."""
    usd_per_month: float
    certainty: Literal["", "at most", "about"]
    """`at most`: there are spot nodes, and the market decides; `about`: there are capacity blocks, which are bought."""
    dearest_usd_per_hour: float
    """With every pool on the dearest rung of its ladder."""
    dearest: tuple[tuple[str, str], ...]
    """(pool, rung) where that is not the first one."""
    lines: tuple[CostLine, ...]
    models: tuple[ModelCost, ...]
    by_use: tuple[str, ...]
    """What is charged besides, by use, with its price: nobody knows beforehand how much it will be."""
    assumptions: tuple[str, ...]


class Change(Frozen):
    """What an edit changes against the plan that was deployed last."""

    path: str
    """`models.chat`, `pools.h100`, `machines.gateway`, `cost` …"""
    what: str
    short: str = ""
    """The same in a few words, where it belongs into the first line: what is down meanwhile, what is cut off."""


class FitPlan(Frozen):
    """How one engine uses the memory of its GPUs: predicted, on the one that has least room."""

    budget_bytes: int
    """Utilisation times the GPU's memory."""
    weights_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    """CUDA context, libraries, NCCL."""
    graph_bytes: int
    """CUDA graphs."""
    kv_bytes: int
    """What is left for the KV cache."""
    kv_bytes_per_token: int
    """What one more token of a long sequence takes."""
    kv_tokens: int
    holds_full: float
    """Requests of a full context that fit at once."""
    holds_typical: int
    """Usual requests that fit at once."""


class EngineSetPlan(Frozen):
    """The engines of one model on GPUs: all alike, and therefore not listed."""

    model: str
    pool: str
    engines: int
    gpu: str
    """Key of the catalog."""
    tensor_parallel_size: int
    flags: tuple[str, ...]
    """Arguments of `vllm serve` after the folder of the weights, without host and port."""
    environment: tuple[tuple[str, str], ...]
    fit: FitPlan
    speed: SpeedPlan


class ChoicePlan(Frozen):
    """One way to serve a model, and what became of it."""

    model: str
    chosen: bool
    gpu: str
    quantization: Quantization
    format: str | None
    tensor_parallel_size: int
    instance: str | None
    nodes: int | None
    engines: int
    concurrency: int
    output_tokens_s: float | None
    """Of one engine."""
    ttft_s: float | None
    tpot_s: float | None
    usd_per_hour: float | None
    usd_per_mtok: float | None
    """Of prompts and answers together."""
    verdict: str
    """Why it was chosen, or why not."""


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
    memory: MemoryPlan | None
    """Of the one machine of a local stack."""
    region: str | None = None
    """Of AWS."""
    engine_sets: tuple[EngineSetPlan, ...] = ()
    """On GPUs; `engines` is empty then."""
    pools: tuple[PoolPlan, ...] = ()
    aws: AwsTimings | None = None
    kubernetes: KubernetesTimings | None = None
    on_aws: AwsPlan | None = None
    cost: CostPlan | None = None
    choices: tuple[ChoicePlan, ...] = ()
    notices: tuple[Notice, ...] = ()
    origins: tuple[Origin, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the plan as canonical JSON, without what only explains it."""
        decided = self.model_dump(mode="json", exclude={"notices", "origins", "choices"})
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def model(self, name: str) -> ModelPlan:
        """The model that clients call `name`."""
        return next(m for m in self.models if m.name == name)

    def engines_of(self, model: str) -> tuple[EnginePlan, ...]:
        """The engines that serve one model."""
        return tuple(e for e in self.engines if e.model == model)
