"""What one value alone cannot know, and what needs no catalog: keys of another target, pools that nobody uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from infra.config.api_keys import DEFAULT, ENCRYPTED
from infra.findings import Finding, did_you_mean, show

if TYPE_CHECKING:
    from infra.config.aws import AwsConfig
    from infra.config.pools import PoolConfig
    from infra.config.stack import GatewayConfig, ModelConfig, StackConfig

NOT_ON_LOCAL = {
    "pool": "the target `local` is one machine, without pools",
    "tensor-parallel-size": "the target `local` has no GPUs: each engine runs on the CPU alone",
    "kv-cache-dtype": "the target `local` has no GPUs: the KV cache is in the type that the CPU computes in",
    "gpu-memory-utilization": "the target `local` has no GPUs: the KV cache has the size that `concurrency` needs",
    "max-num-batched-tokens": "the target `local` derives it from `concurrency`",
    "enforce-eager": "on the target `local` engines are always eager",
    "sleep": "the target `local` has no GPUs whose memory a sleeping engine could free",
    "traffic": "the target `local` costs nothing, and its number of engines is `engines`",
}
"""Keys of a model that mean nothing there."""


NO_SESSION = frozenset(
    {
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "forwarded",
        "host",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that do not tell sessions apart, or that never get so far."""


def checks(config: StackConfig, raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything that is wrong between the values of a config.

    Args:
        config: With what was faulty in itself taken out.
        raw: As it was written.
    """
    if raw.get("target") == config.target:  # else nobody knows what was meant
        yield from _on_local(config) if config.target == "local" else _on_gpus(config)
    for name, model in config.models.items():
        yield from _model(f"models.{name}", model)
    yield from _keys(config, raw)
    yield from _gateway(config.gateway)
    if config.target == "aws":
        yield from _aws(config)
    elif config.aws.model_fields_set:
        problem = f"the target is `{config.target}`"
        yield Finding("aws", problem, "remove it, or choose `target: aws`")
    if config.target == "local":
        return
    written = raw.get("models")
    if isinstance(written, Mapping) and len(written) == len(config.models):  # else one that is lost may use it
        yield from _unused(config)
    for name, pool in config.pools.items():
        yield from _ladder(f"pools.{name}.capacity", pool)


def _pool_of(target: str, at: str, pool: PoolConfig) -> Iterator[Finding]:
    """Keys that a pool cannot have on a target."""
    if target == "kubernetes":
        for key in ("instance", "zones", "capacity", "schedule"):
            if key in pool.model_fields_set:
                yield Finding(f"{at}.{key}", "on Kubernetes the cluster has its nodes already", "remove it")
        return
    if pool.gpus_per_node is not None:
        problem = "on AWS the instance type decides how many GPUs a node has"
        yield Finding(f"{at}.gpus-per-node", problem, "remove it, or choose another `instance`")
    if pool.usd_per_hour is not None and pool.instance is None:
        fix = "add `instance: …`, or write it under `prices.instances`"
        yield Finding(f"{at}.usd_per_hour", "the price of a node, but no `instance` says of which", fix)


def _on_local(config: StackConfig) -> Iterator[Finding]:
    if config.pools:
        problem = "the target `local` is one machine, without pools"
        yield Finding("pools", problem, "remove it, or choose `target: aws` or `target: kubernetes`")
    for name, model in config.models.items():
        for key, problem in NOT_ON_LOCAL.items():
            if key.replace("-", "_") in model.model_fields_set:
                yield Finding(f"models.{name}.{key}", problem, "remove it: nothing uses it there")
        if model.quantization == "auto":
            problem = "`auto` is whatever costs least, and the target `local` costs nothing"
            yield Finding(f"models.{name}.quantization", problem, "`none`, `8bit` or `4bit`")
    yield from _gateway_on_local(config.gateway)
    for key, part in (("budget", config.budget), ("prices", config.prices)):
        if part.model_fields_set:
            yield Finding(key, "the target `local` costs nothing", "remove it: nothing uses it there")


def _gateway_on_local(gateway: GatewayConfig) -> Iterator[Finding]:
    if gateway.hosts is not None and gateway.hosts > 1:
        problem = f"{gateway.hosts} machines: the target `local` is one"
        yield Finding("gateway.hosts", problem, "remove it")
    if gateway.proxy_protocol:
        problem = "on the target `local` clients reach the gateway themselves: nothing is in front that speaks PROXY"
        yield Finding("gateway.proxy-protocol", problem, "remove it")
    if gateway.hostname is not None:
        problem = "the target `local` has no name: clients use 127.0.0.1 and the gateway's port"
        yield Finding("gateway.hostname", problem, "remove it: nothing uses it there")


def _on_gpus(config: StackConfig) -> Iterator[Finding]:
    for name, pool in config.pools.items():
        yield from _pool_of(config.target, f"pools.{name}", pool)
    if config.gateway.weights:
        problem = "engines are found by DNS there, and their weights stand in its records"
        yield Finding("gateway.weights", problem, "remove it: on the target `local` engines have names that stay")
    if config.local.model_fields_set:
        problem = f"the target is `{config.target}`: ports can be chosen on the target `local` only"
        yield Finding("local", problem, "remove it, or choose `target: local`")
    if config.target == "kubernetes" and config.prices.instances:
        problem = "the nodes of a cluster have no instance types"
        yield Finding("prices.instances", problem, "write the price of a node as `pools.NAME.usd_per_hour`")


def _gateway(gateway: GatewayConfig) -> Iterator[Finding]:
    if gateway.routing != "session" and "session_header" in gateway.model_fields_set:
        problem = f"the routing is `{gateway.routing}`: nothing reads this header"
        yield Finding("gateway.session-header", problem, "remove it, or choose `routing: session`")
    if gateway.session_header.lower() in NO_SESSION:
        problem = f"`{gateway.session_header}` names no session: it belongs to HTTP, or to the gateway itself"
        yield Finding("gateway.session-header", problem, "a header of your clients' own, such as `X-Session-Id`")


def _model(at: str, model: ModelConfig) -> Iterator[Finding]:
    answer = model.traffic.answer_tokens if model.traffic else None
    if answer is not None and model.max_answer is not None and answer > model.max_answer:
        problem = f"{answer} tokens: a mean answer, longer than the longest, `max-answer: {model.max_answer}`"
        yield Finding(f"{at}.traffic.answer-tokens", problem, f"at most {model.max_answer}")
    step, at_once = model.max_num_batched_tokens, model.concurrency
    if step is not None and at_once is not None and step < at_once:
        problem = f"{step} tokens: a step computes one for each request, and there are {at_once} at once"
        yield Finding(f"{at}.max-num-batched-tokens", problem, f"at least {at_once}, or a lower `concurrency`")


def _keys(config: StackConfig, raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that have two names, as the gateway could not tell who asks; and keys for models that are not there."""
    owners: dict[str, str] = {}
    written = raw.get("models")
    models = set(config.models) | (set(written) if isinstance(written, Mapping) else set())
    for name, key in config.api_keys.items():
        at = f"api-keys.{name}"
        if name == DEFAULT:
            yield Finding(at, "is the name of the stack's own key", "choose another name")
        owner = owners.setdefault(key.hash, name)
        if owner != name and key.hash != ENCRYPTED:
            problem = f"is the key of `{owner}`: the gateway could not tell which of them asks"
            yield Finding(at, problem, f"remove it, and `fleet keys add {name}` makes one of its own")
        for index, model in enumerate(key.models or ()):
            if model not in models:
                yield Finding(f"{at}.models.{index}", *no_model(model, config.models))


def no_model(name: str, models: Iterable[str]) -> tuple[str, str]:
    """What is wrong with the name of a model that is none, and what to do."""
    return f"there is no model {show(name)}", did_you_mean(name, models)


def _aws(config: StackConfig) -> Iterator[Finding]:
    """What cannot be together under `aws`."""
    aws, network, hostname = config.aws, config.aws.network, config.gateway.hostname
    if aws.endpoint == "public":
        if aws.clients is None:
            problem = "is missing: a public endpoint is open to nobody unless you say to whom"
            yield Finding("aws.clients", problem, "the networks of your clients; `[0.0.0.0/0]` is everybody")
        if aws.certificate is None and config.gateway.tls is None and not (aws.hosted_zone and hostname):
            fix = "add `certificate: arn:aws:acm:…`, or `hosted-zone` and `gateway.hostname` to have one made"
            yield Finding("aws.certificate", "is missing: keys would cross the internet in plain text", fix)
    if aws.certificate is not None and config.gateway.tls is not None:
        problem = "the load balancer or the gateways end TLS, not both"
        yield Finding("aws.certificate", problem, "remove it, or remove `gateway.tls`")
    if aws.hosted_zone is not None and hostname is None:
        yield Finding("aws.hosted-zone", "no name is to be put into it", "add `gateway.hostname: llm.example.com`")
    if (network.vpc is None) != (network.subnets is None):
        missing, there = ("subnets", "vpc") if network.subnets is None else ("vpc", "subnets")
        problem = f"is missing: `{there}` means a network that is there already"
        yield Finding(f"aws.network.{missing}", problem, f"add it, or remove `{there}` to have a network made")
    yield from _aws_internet(aws)


def _aws_internet(aws: AwsConfig) -> Iterator[Finding]:
    network = aws.network
    if network.vpc is not None:
        for key in ("cidr", "internet", "flow_logs"):
            if key in network.model_fields_set:
                problem = f"`vpc: {network.vpc}` is there already, and has its own"
                yield Finding(f"aws.network.{key.replace('_', '-')}", problem, "remove it")
        if aws.endpoint == "public":
            problem = "the subnets of a VPC that is there already are taken for private ones"
            yield Finding("aws.endpoint", problem, "`internal`, or remove `network.vpc` to have a network made")
        return
    if network.internet == "nat":
        return
    if not network.interface_endpoints:
        problem = "is false, and with `internet: none` machines cannot reach the services of AWS otherwise"
        yield Finding("aws.network.interface-endpoints", problem, "write `interface-endpoints: true`")
    for role in ("engine", "gateway", "monitor"):
        if getattr(aws.images, role) is None:
            problem = "is missing: the public image installs itself from the internet, and there is `internet: none`"
            yield Finding(f"aws.images.{role}", problem, "an image that images/ made, or `internet: nat`")


def _unused(config: StackConfig) -> Iterator[Finding]:
    """Pools that no model uses. Where a model's pool is not known, that is said instead."""
    used = {model.pool for model in config.models.values()}
    if used <= set(config.pools):
        for name in config.pools:
            if name not in used:
                fix = f"give a model `pool: {name}`, or remove the pool"
                yield Finding(f"pools.{name}", "no model uses this pool", fix)


def _ladder(at: str, pool: PoolConfig) -> Iterator[Finding]:
    """Rungs that stand twice in a pool's ladder."""
    seen: dict[tuple[str, str | None], int] = {}
    for index, rung in enumerate(pool.capacity):
        first = seen.setdefault((rung.kind, rung.id), index)
        if first != index:
            name = f"{rung.kind} {rung.id}" if rung.id else rung.kind
            yield Finding(f"{at}.{index}", f"{name} is there already, as capacity.{first}", "remove one of them")
