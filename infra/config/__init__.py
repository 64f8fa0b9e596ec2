"""The stack config: what a user writes in `stacks/Pulumi.<stack>.yaml` under `vllm-fleet:`, read strictly.

Nothing is guessed and nothing is ignored: an unknown key, a wrong unit or an impossible value is a finding with its
path and a fix, and all findings come at once. To that end `parse` returns a config even if something in it is wrong:
the faulty values are left out and the findings stay attached, so that the plan can look for more. `make_plan` refuses
such a config with the findings of both.
"""

from infra.config.api_keys import DEFAULT, ENCRYPTED, ApiKeys, KeyConfig, with_limits
from infra.config.aws import AwsConfig, ImagesConfig, NetworkConfig
from infra.config.pools import PoolConfig, Rung
from infra.config.reading import MAX_DEPTH, MAX_VALUES, from_pulumi, parse, region_of
from infra.config.stack import (
    NAMESPACE,
    BudgetConfig,
    GatewayConfig,
    HostedPriceConfig,
    LocalConfig,
    ModelConfig,
    PortsConfig,
    PricesConfig,
    SloConfig,
    StackConfig,
    TrafficConfig,
    schema,
)
from infra.config.strict import MAX_NAME, NAME, NAME_FIX
from infra.config.units import duration, size
from infra.config.words import Location

__all__ = [
    "DEFAULT",
    "ENCRYPTED",
    "MAX_DEPTH",
    "MAX_NAME",
    "MAX_VALUES",
    "NAME",
    "NAMESPACE",
    "NAME_FIX",
    "ApiKeys",
    "AwsConfig",
    "BudgetConfig",
    "GatewayConfig",
    "HostedPriceConfig",
    "ImagesConfig",
    "KeyConfig",
    "LocalConfig",
    "Location",
    "ModelConfig",
    "NetworkConfig",
    "PoolConfig",
    "PortsConfig",
    "PricesConfig",
    "Rung",
    "SloConfig",
    "StackConfig",
    "TrafficConfig",
    "duration",
    "from_pulumi",
    "parse",
    "region_of",
    "schema",
    "size",
    "with_limits",
]
