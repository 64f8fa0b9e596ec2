"""The target `aws`: what a user may say of the network, the endpoint and the machines' images."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import GroupedMetadata
from pydantic import BeforeValidator, Field, WithJsonSchema

from infra.config.strict import Strict
from infra.config.units import refusal
from infra.findings import show

LARGEST_NETWORK, SMALLEST_NETWORK = 16, 20
"""Prefix lengths. AWS has none larger than /16; a zone has a sixteenth, of /20 that is 251 addresses."""
MAX_USER_TAGS = 40
"""AWS allows 50 on most resources; the fleet has up to five of its own."""
_ARN = r"arn:aws(?:-[a-z]+)*"
_TAG_KEY = re.compile(r"(?!aws:)(?!vllm-fleet:)[A-Za-z0-9_.:,=+@-]{1,128}")
"""What machines may show of themselves in their metadata: no spaces and no slashes (EC2 guide, 2026-11)."""


@dataclass(frozen=True)
class _Given(GroupedMetadata):
    """A text that AWS gives, of a known form: what it must match, what it is, and how to get it right."""

    pattern: str
    what: str
    fix: str

    def __iter__(self) -> Iterator[Any]:
        form = re.compile(self.pattern)

        def check(value: Any) -> str:
            if isinstance(value, str) and form.fullmatch(value):
                return value
            raise refusal(f"{show(value)} is not {self.what}", self.fix)

        yield BeforeValidator(check)
        yield _schema(self.pattern)


def _schema(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$"})


_CIDR = r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}/[0-9]{1,2}"
VpcId = Annotated[
    str,
    _Given(r"vpc-[0-9a-f]{8,17}", "the id of a VPC", "`vpc-` and hex digits, as `aws ec2 describe-vpcs` shows it"),
]
SubnetId = Annotated[
    str,
    _Given(
        r"subnet-[0-9a-f]{8,17}",
        "the id of a subnet",
        "`subnet-` and hex digits, as `aws ec2 describe-subnets` shows it",
    ),
]
CertificateArn = Annotated[
    str,
    _Given(
        rf"{_ARN}:acm:[a-z0-9-]+:[0-9]{{12}}:certificate/[0-9a-f-]+",
        "the ARN of a certificate",
        "`arn:aws:acm:REGION:ACCOUNT:certificate/ID`, as `aws acm list-certificates` shows it",
    ),
]
PolicyArn = Annotated[
    str,
    _Given(
        rf"{_ARN}:iam::(?:[0-9]{{12}}|aws):policy/[\w+=,.@/-]+",
        "the ARN of a policy",
        "`arn:aws:iam::ACCOUNT:policy/NAME`, as `aws iam list-policies` shows it",
    ),
]
SecretArn = Annotated[
    str,
    _Given(
        rf"{_ARN}:secretsmanager:[a-z0-9-]+:[0-9]{{12}}:secret:[\w/+=.@-]+",
        "the ARN of a secret",
        "`arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME`, as `aws secretsmanager list-secrets` shows it",
    ),
]
HostedZoneId = Annotated[
    str,
    _Given(
        r"Z[A-Z0-9]{5,31}",
        "the id of a hosted zone",
        "`Z…`, as `aws route53 list-hosted-zones` shows it after the slash",
    ),
]
Image = Annotated[
    str,
    _Given(
        r"(?:ami-[0-9a-f]{8,17}|/[\w./-]{1,512})",
        "an image",
        "`ami-…`, or the name of an SSM parameter that holds one, from / on",
    ),
]


def _network(value: Any) -> ipaddress.IPv4Network:
    """Addresses, written as a whole network."""
    fix = "a network such as `10.64.0.0/16`"
    try:
        return ipaddress.IPv4Network(value if isinstance(value, str) else "")
    except ValueError:
        pass
    try:
        meant = ipaddress.IPv4Network(value, strict=False) if isinstance(value, str) else None
    except ValueError:
        meant = None
    raise refusal(f"{show(value)} is not a network", f"write `{meant}`" if meant else fix)


def client_network(value: Any) -> str:
    """Addresses that clients have."""
    return str(_network(value))


def own_network(value: Any) -> str:
    """Addresses of the fleet's own machines: private ones, enough for every zone of a region."""
    network = _network(value)
    if not network.is_private and not network.subnet_of(ipaddress.IPv4Network("100.64.0.0/10")):
        raise refusal(f"{show(value)} is public: nobody could answer what comes from it", "`10.64.0.0/16`, for example")
    if not LARGEST_NETWORK <= network.prefixlen <= SMALLEST_NETWORK:
        size = "large" if network.prefixlen < LARGEST_NETWORK else "small"
        fix = f"/{LARGEST_NETWORK} to /{SMALLEST_NETWORK}, such as `10.64.0.0/16`"
        raise refusal(f"{show(value)} is too {size}", fix)
    return str(network)


def tag_key(value: Any) -> str:
    """Name of a tag that is the user's own."""
    if isinstance(value, str) and _TAG_KEY.fullmatch(value):
        return value
    fix = "letters, digits and _ . : , = + - @; not beginning with `aws:` or `vllm-fleet:`"
    raise refusal(f"{show(value)} cannot be the name of a tag", fix)


ClientNetwork = Annotated[str, BeforeValidator(client_network), _schema(_CIDR)]
OwnNetwork = Annotated[str, BeforeValidator(own_network), _schema(_CIDR)]
TagValue = Annotated[str, Field(max_length=256)]


class NetworkConfig(Strict):
    """Where the machines are."""

    cidr: OwnNetwork = "10.64.0.0/16"
    """Addresses of the VPC that is made. Every zone has its fixed part: a zone that is added moves no other."""
    vpc: VpcId | None = None
    """One that is there already, instead. Needs `subnets`."""
    subnets: Annotated[list[SubnetId], Field(min_length=1, max_length=16)] | None = None
    """Private ones of that VPC: of every zone that the fleet shall use, one. They lead where nodes need to go."""
    internet: Literal["nat", "none"] = "nat"
    """How machines reach what is not AWS. `none`: not at all; needs images that have everything, and
    `interface-endpoints`."""
    interface_endpoints: bool = False
    """Reach the services of AWS inside the VPC, at a price by the hour. S3 is always reached so, at none."""
    flow_logs: bool = False
    """Note every connection, in CloudWatch, for 30 days."""


class ImagesConfig(Strict):
    """What machines boot from: ids of images, or names of SSM parameters that hold one, as images/ writes them.

    Default: public images, on which a machine installs what it needs at its first boot.
    """

    engine: Image | None = None
    gateway: Image | None = None
    monitor: Image | None = None
    bake: bool = False
    """Make the pipelines that bake such images."""


class AwsConfig(Strict):
    """The target `aws`."""

    network: NetworkConfig = NetworkConfig()
    endpoint: Literal["internal", "public"] = "internal"
    """Who can reach the load balancer: the VPC and what is joined to it, or everybody in `clients`."""
    clients: Annotated[list[ClientNetwork], Field(min_length=1, max_length=50)] | None = None
    """Networks of clients. Default: the VPC; with `endpoint: public` there is none."""
    certificate: CertificateArn | None = None
    """Of ACM: the load balancer ends TLS."""
    hosted_zone: HostedZoneId | None = None
    """Of Route 53, in which `gateway.hostname` becomes a name of the load balancer."""
    images: ImagesConfig = ImagesConfig()
    rollout: Literal["automatic", "manual"] = "automatic"
    """How machines that run take up an edit: one after the other by State Manager, or when you run the command that the
    output `rollout` shows."""
    permissions_boundary: PolicyArn | None = None
    """Set on every role that is made."""
    hub_token_arn: SecretArn | None = None
    """Of a secret of Secrets Manager that holds a token for the Hugging Face hub: the job that fills the model cache
    reads it. Needed for weights that the hub does not give to everybody."""
    tags: Annotated[dict[Annotated[str, BeforeValidator(tag_key)], TagValue], Field(max_length=MAX_USER_TAGS)] = Field(
        default_factory=dict
    )
    """On every resource, beside those of the fleet itself."""
    protect: bool = True
    """`pulumi destroy` leaves what holds data: the model cache, its key, the metrics."""
