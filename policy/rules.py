"""The rules, as plain functions: of a resource's type and inputs, what is wrong with it, in words. No Pulumi."""
# ruff: noqa: INP001 - imported by the pack beside it, which Pulumi runs by path

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Props = Mapping[str, Any]
Check = Callable[[Props], str | None]
"""What is wrong, after the resource's name; None: nothing."""
PREFIX = "vllm-fleet"
WORLD = ("0.0.0.0/0", "::/0")
WEB_PORTS = (80, 443)
PRIVATE = ("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets")
UNTAGGED = frozenset(
    {
        *(
            "acm/certificateValidation",
            "autoscaling/lifecycleHook",
            "cloudwatch/eventTarget",
            "ec2/mainRouteTableAssociation",
        ),
        *(
            "ec2/route",
            "ec2/routeTableAssociation",
            "ec2/volumeAttachment",
            "iam/rolePolicy",
            "iam/rolePolicyAttachment",
        ),
        *(
            "kms/alias",
            "lb/listenerCertificate",
            "lb/targetGroupAttachment",
            "route53/record",
            "s3/bucketLifecycleConfiguration",
        ),
        *("s3/bucketNotification", "s3/bucketOwnershipControls", "s3/bucketPolicy", "s3/bucketPublicAccessBlock"),
        *("s3/bucketServerSideEncryptionConfiguration", "s3/bucketVersioning", "secretsmanager/secretPolicy"),
        *("secretsmanager/secretVersion", "sqs/queuePolicy", "lambda/permission"),
    }
)
"""Types that AWS has no tags for."""
FEW_TAGS = frozenset({"s3/bucketObjectv2"})
"""Types that AWS has ten tags for: those of the fleet alone."""


def short(kind: str) -> str:
    """`aws:ec2/instance:Instance` without what is said twice: `ec2/instance`."""
    return kind.partition(":")[2].partition(":")[0]


def tags_of(props: Props) -> dict[str, str]:
    """Tags in either of the forms that AWS's resources have."""
    tags = props.get("tags") or {}
    if isinstance(tags, Mapping):
        return dict(tags)
    return {tag["key"]: tag["value"] for tag in tags}


def open_ports(kind: str, name: str, props: Props) -> Iterator[str]:
    """Nothing can be reached from everywhere but the load balancer, on the ports of the web."""
    if words := _OPEN.get(short(kind), _fine)(props):
        yield f"{name} {words}"


def encryption(kind: str, name: str, props: Props) -> Iterator[str]:
    """What is written is encrypted, secrets with a key of the stack's own."""
    if words := _PLAIN.get(short(kind), _fine)(props):
        yield f"{name} {words}"


def _fine(_props: Props) -> str | None:
    return None


def _ingress(props: Props) -> str | None:
    if not _worldwide([props.get("cidrIpv4"), props.get("cidrIpv6")]):
        return None
    first, last, role = props.get("fromPort"), props.get("toPort"), tags_of(props).get(f"{PREFIX}:role")
    if role == "balancer" and first == last and first in WEB_PORTS:
        return None
    return f"opens ports {first} to {last} of the {role} to the world"


def _old_rules(props: Props) -> str | None:
    rules = props.get("ingress") or ([props] if props.get("type") == "ingress" else [])
    wide = any(_worldwide([*_list(it, "cidrBlocks"), *_list(it, "ipv6CidrBlocks")]) for it in rules)
    return "is open to the world" if wide else None


def _launched_in_public(props: Props) -> str | None:
    cards = _list(props, "networkInterfaces")
    public = any(_true(it.get("associatePublicIpAddress")) for it in cards)
    return "gives its machines public addresses" if public else None


def _public_bucket(props: Props) -> str | None:
    off = [it for it in PRIVATE if props.get(it) is not True]
    return f"lets the bucket be public: set {', '.join(off)}" if off else None


_OPEN: dict[str, Check] = {
    "vpc/securityGroupIngressRule": _ingress,
    "ec2/securityGroup": _old_rules,
    "ec2/securityGroupRule": _old_rules,
    "ec2/subnet": lambda it: "gives its machines public addresses" if it.get("mapPublicIpOnLaunch") else None,
    "ec2/instance": lambda it: "has a public address" if it.get("associatePublicIpAddress") else None,
    "ec2/launchTemplate": _launched_in_public,
    "s3/bucketPublicAccessBlock": _public_bucket,
}


def _disks(disks: Sequence[Props]) -> str | None:
    """Of disks, at least one, that all have to be encrypted."""
    plain = not disks or not all(_true(it.get("encrypted")) for it in disks)
    return "has a disk that is not encrypted" if plain else None


def _mapped_disks(props: Props) -> str | None:
    return _disks([it["ebs"] for it in _list(props, "blockDeviceMappings") if it.get("ebs")])


def _objects(props: Props) -> str | None:
    used = [(it.get("applyServerSideEncryptionByDefault") or {}).get("sseAlgorithm") for it in _list(props, "rules")]
    return None if used == ["aws:kms"] else "does not encrypt objects with KMS"


_PLAIN: dict[str, Check] = {
    "ebs/volume": lambda it: _disks([it]),
    "ec2/instance": lambda it: _disks([it.get("rootBlockDevice") or {}, *_list(it, "ebsBlockDevices")]),
    "ec2/launchTemplate": _mapped_disks,
    "imagebuilder/imageRecipe": _mapped_disks,
    "s3/bucketServerSideEncryptionConfiguration": _objects,
    # Its value is not known before the key is made: that there is one is enough, and asking for it would end the rule.
    "secretsmanager/secret": lambda it: None if "kmsKeyId" in set(it) else "is not encrypted with the stack's own key",
    "kms/key": lambda it: None if it.get("enableKeyRotation") else "is never rotated",
}


def tagging(kind: str, name: str, props: Props, required: Iterable[str] = ()) -> Iterator[str]:
    """Everything says which stack it is of and what for; and what else a company wants to be said."""
    if not kind.startswith("aws:") or short(kind) in UNTAGGED:
        return
    own = {f"{PREFIX}:stack", f"{PREFIX}:role"}
    wanted = own if short(kind) in FEW_TAGS else own | set(required)
    missing = sorted(wanted - tags_of(props).keys())
    if missing:
        yield f"{name} has no tag {', '.join(missing)}"


def buckets(resources: Sequence[tuple[str, str, Props]]) -> Iterator[str]:
    """Every bucket has its encryption and is closed: each is a resource of its own, that can be forgotten."""
    have = [short(kind) for kind, _, _ in resources]
    wanted = have.count("s3/bucket")
    for part, words in (
        ("s3/bucketServerSideEncryptionConfiguration", "no encryption of its own"),
        ("s3/bucketPublicAccessBlock", "nothing that keeps it from being public"),
    ):
        if have.count(part) < wanted:
            yield f"{wanted} buckets, of which {wanted - have.count(part)} have {words}"


def budget(usd_per_hour: float | None, limit: float | None) -> Iterator[str]:
    """The fleet costs no more than it may.

    Args:
        usd_per_hour: What the plan says; None: it does not say.
        limit: What it may cost; None: anything.
    """
    if limit is None:
        return
    if usd_per_hour is None:
        yield f"what the fleet costs is not known, and it may cost ${limit:g} an hour"
    elif usd_per_hour > limit:
        yield f"the fleet costs ${usd_per_hour:.2f} an hour, and may cost ${limit:g}"


def _worldwide(networks: Iterable[Any]) -> bool:
    return any(network in WORLD for network in networks)


def _list(props: Props, key: str) -> list[Any]:
    return list(props.get(key) or [])


def _true(value: Any) -> bool:
    """As resources have it, as truth or as text."""
    return str(value).lower() == "true"
