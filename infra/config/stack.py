"""The types of the stack config: everything that a user can write under `vllm-fleet:`, with defaults and limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from infra.config.api_keys import ApiKey
from infra.config.aws import AwsConfig
from infra.config.pools import PoolConfig
from infra.config.strict import Name, Strict
from infra.config.units import Duration, HeaderName, Hostname, HostPath, Size
from infra.findings import Finding, in_order

NAMESPACE = "vllm-fleet"
Port = Annotated[int, Field(ge=1024, le=32767)]
"""Above is the range that Linux gives to outgoing connections: one of them could hold a port that a server needs."""


class TrafficConfig(Strict):
    """What clients ask of a model."""

    requests_per_month: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """Default: half of what the engines can do."""
    prompt_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Of a mean request. Default: 1155, the mean of a public trace."""
    answer_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Of a mean answer. Default: 211, likewise."""


class ModelConfig(Strict):
    """A model that clients can ask for."""

    weights: str | None = None
    """Entry of models.lock.yaml. Default: the entry with the model's own name."""
    quantization: Literal["none", "8bit", "4bit", "auto"] = "none"
    """How many bits weights have; the plan picks the format that the machine runs best. `auto`: what costs least."""
    context: Annotated[int, Field(ge=128, le=10_000_000)] | None = None
    """Tokens of prompt and answer together. Default on local: 2048, or the model's maximum if that is lower."""
    max_answer: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Tokens of the longest answer; longer ones are cut. Default: the context. An update waits for running answers."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Requests that one engine answers at once. Default on local: 8."""
    typical_tokens: Annotated[int, Field(ge=16, le=10_000_000)] | None = None
    """Tokens of a usual request, prompt and answer: an engine has memory for `concurrency` of them, and for fewer that
    are longer. Default on local: half the context."""
    engines: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """vLLM servers. Default: what the traffic needs, and 2 at least, so that one serves while the other is updated."""
    tool_calls: str | None = None
    """vLLM's parser for this model's tool calls: `hermes`, `llama3_json`, `mistral` … Default: tools are refused."""
    pool: str | None = None
    """Pool that its engines run in. Default: the only one."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """GPUs that share one engine. Default: whatever costs least."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """`fp8`: the KV cache holds twice as many tokens."""
    gpu_memory_utilization: Annotated[float, Field(ge=0.1, le=0.98)] | None = None
    """Part of each GPU's memory that vLLM takes. Default: 0.92."""
    max_num_batched_tokens: Annotated[int, Field(ge=64, le=1_000_000)] | None = None
    """Tokens that one step of an engine computes at most. Default: vLLM's own for the GPU."""
    enforce_eager: bool = False
    """No compilation and no CUDA graphs: starts faster, runs slower."""
    sleep: bool = False
    """Engines can sleep: their weights go to host memory, which must have room for them."""
    traffic: TrafficConfig | None = None
    """What clients ask of it: costs and the number of engines are computed from it."""


class BudgetConfig(Strict):
    """The most that the fleet may cost: a plan over it is refused."""

    usd_per_hour: Annotated[float, Field(gt=0)] | None = Field(default=None, alias="usd_per_hour")
    usd_per_month: Annotated[float, Field(gt=0)] | None = Field(default=None, alias="usd_per_month")


class HostedPriceConfig(Strict):
    """What a hosted API asks."""

    input_usd_per_mtok: Annotated[float, Field(ge=0)] = Field(alias="input_usd_per_mtok")
    output_usd_per_mtok: Annotated[float, Field(ge=0)] = Field(alias="output_usd_per_mtok")


class PricesConfig(Strict):
    """Your own prices, before those of the catalog."""

    hosted: dict[str, HostedPriceConfig] = Field(default_factory=dict)
    """By `provider/model`."""
    instances: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Dollars an hour by instance type."""


class TlsConfig(Strict):
    """What the gateway proves its name with."""

    certificate: HostPath
    """PEM file on the gateway's machine: certificate, chain and key. It is read when the gateway starts or reloads."""


class GatewayConfig(Strict):
    """The load balancer."""

    proxy: Literal["haproxy", "nginx"] = "haproxy"
    routing: Literal["least-loaded", "round-robin", "prefix-affinity", "session"] = "least-loaded"
    """How an engine is chosen. `prefix-affinity`: by the beginning of the first message, so that its prefix is cached
    there; `session`: by a header of the request; both pass over an engine that has much more to do than the others."""
    session_header: HeaderName = "X-Session-Id"
    """Header that names the session."""
    weights: dict[str, Annotated[int, Field(ge=1, le=256)]] = Field(default_factory=dict)
    """Of single engines, by name (`chat-1`), against 100 of the others: a canary gets less. Least-loaded heeds them
    under load only."""
    tls: TlsConfig | None = None
    """Default: plain HTTP."""
    proxy_protocol: bool = False
    """A load balancer in front says with PROXY who the client is. Nobody else may then reach the port."""
    max_body: Annotated[Size, Field(ge=1 << 10, le=64 << 20)] | None = None
    """Largest request. Default: what a full context can take as JSON, at least 1MiB."""
    hosts: Annotated[int, Field(ge=1, le=16)] | None = None
    """Machines. Default: 2; on local there is one."""
    hostname: Hostname | None = None
    """Name that clients use."""


class SloConfig(Strict):
    """What users of the fleet may expect: alerts compare with it, and the gateway's patience is derived from it."""

    ttft_p95: Annotated[Duration, Field(ge=0.05, le=600)] | None = Field(default=None, alias="ttft_p95")
    """Time to the first token, 95th percentile. Default on local: 10s."""
    tpot_p95: Annotated[Duration, Field(ge=0.001, le=10)] | None = Field(default=None, alias="tpot_p95")
    """Time between two tokens of an answer, 95th percentile. Default: nothing is promised."""
    availability: Annotated[float, Field(ge=90, le=99.999)] | None = None
    """Percent of requests that are answered. Default: nothing is promised."""


class PortsConfig(Strict):
    """Ports of single servers, where the derived ones do not suit."""

    gateway: Port | None = None
    gateway_stats: Port | None = None
    agent: Port | None = None
    prometheus: Port | None = None
    alertmanager: Port | None = None
    grafana: Port | None = None


class LocalConfig(Strict):
    """The target `local`."""

    base_port: Annotated[int, Field(ge=1024, le=32668)] | None = None
    """The stack's ports are this one and the 99 above. Default: 18000 for the stack `local`, else from its name."""
    ports: PortsConfig = PortsConfig()


class StackConfig(Strict):
    """Everything under `vllm-fleet:` in one stack file."""

    target: Literal["local", "aws", "kubernetes"]
    models: Annotated[dict[Name, ModelConfig], Field(min_length=1)]
    """By the name that clients put in `model`."""
    gateway: GatewayConfig = GatewayConfig()
    api_keys: dict[Name, ApiKey] = Field(default_factory=dict)
    """SHA-256 of each API key, and its limits if it has any, by the name of its owner. `fleet keys add NAME` writes
    them."""
    slo: SloConfig = SloConfig()
    pools: dict[Name, PoolConfig] = Field(default_factory=dict)
    """GPU nodes, by name."""
    budget: BudgetConfig = BudgetConfig()
    prices: PricesConfig = PricesConfig()
    local: LocalConfig = LocalConfig()
    aws: AwsConfig = AwsConfig()

    _region: str | None = PrivateAttr(default=None)
    _findings: tuple[Finding, ...] = PrivateAttr(default=())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the text that this was read from. If there is any, the config is good for checks only."""
        return self._findings

    @property
    def region(self) -> str | None:
        """`aws:region` of the stack file."""
        return self._region

    def in_region(self, region: str | None) -> StackConfig:
        """The same config in a region of AWS."""
        other = self.model_copy()
        other._region = region  # noqa: SLF001 - of the same class
        return other

    def with_findings(self, findings: Sequence[Finding]) -> StackConfig:
        """The same config with these findings attached."""
        other = self.model_copy()
        other._findings = in_order(findings)  # noqa: SLF001 - of the same class
        return other


def schema() -> dict[str, Any]:
    """JSON Schema of a whole stack file, for editors."""
    config = StackConfig.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllm-fleet stack",
        "type": "object",
        "required": ["config"],
        "properties": {
            "config": {
                "type": "object",
                "required": [f"{NAMESPACE}:{key}" for key in config["required"]],
                "properties": {f"{NAMESPACE}:{key}": value for key, value in config["properties"].items()},
                "patternProperties": {f"^(?!{NAMESPACE}:)[^:]+:.+$": True},
                "additionalProperties": False,
            }
        },
        "$defs": config["$defs"],
    }
