"""The graph of a stack as the JSON of a Terraform plan, which scanners read. References between resources are lost."""

from __future__ import annotations

import re
from typing import Any

from tests.program.aws_graph import Graph

TYPES = {
    "ec2/flowLog": "aws_flow_log",
    "lb/loadBalancer": "aws_lb",
    "s3/bucket": "aws_s3_bucket",
    "s3/bucketObjectv2": "aws_s3_object",
    "secretsmanager/secret": "aws_secretsmanager_secret",
    "secretsmanager/secretVersion": "aws_secretsmanager_secret_version",
    "servicediscovery/privateDnsNamespace": "aws_service_discovery_private_dns_namespace",
    "servicediscovery/service": "aws_service_discovery_service",
}
"""Where Terraform's name is not made by the rule of `terraform_type`."""
BARE = {"ec2", "ebs"}
"""Modules that Terraform's names do not have."""
SINGULAR = {"blockDeviceMappings": "block_device_mappings", "networkInterfaces": "network_interfaces"}
PLURAL = {"rules": "rule", "defaultActions": "default_action", **SINGULAR}
"""Lists of blocks by their name there."""
MAPS = {"tags", "parameters", "variables"}
"""Mappings with keys of the user's own; all others are blocks."""


def snake(name: str) -> str:
    """`mapPublicIpOnLaunch` as Terraform writes it."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def terraform_type(kind: str) -> str:
    """`aws:ec2/launchTemplate:LaunchTemplate` as Terraform calls it."""
    what = kind.split(":")[1]
    module, _, name = what.partition("/")
    return TYPES.get(what) or (f"aws_{snake(name)}" if module in BARE else f"aws_{module}_{snake(name)}")


def value(given: Any, key: str = "") -> Any:
    """An input as a plan has it: a block is a list of one."""
    if isinstance(given, dict) and key not in MAPS:
        return [{PLURAL.get(name) or snake(name): value(it, name) for name, it in given.items()}]
    if isinstance(given, list):
        return [value(it)[0] if isinstance(it, dict) else it for it in given]
    return given if isinstance(given, str | int | float | bool | dict | None) else str(given)


def terraform_plan(graph: Graph) -> dict[str, Any]:
    """A plan that makes everything."""
    resources = []
    for made in graph.resources:
        if made.kind.startswith("aws:"):
            kind, (values,) = terraform_type(made.kind), value(made.inputs)
            address = f"{kind}.{re.sub('[^a-zA-Z0-9_-]', '_', made.name)}"
            resources.append({"address": address, "mode": "managed", "type": kind, "name": made.name, "values": values})
    changes = [
        {**it, "change": {"actions": ["create"], "before": None, "after": it["values"], "after_unknown": {}}}
        for it in resources
    ]
    return {
        "format_version": "1.2",
        "terraform_version": "1.7.0",
        "planned_values": {"root_module": {"resources": resources}},
        "resource_changes": changes,
        "configuration": {"root_module": {"resources": []}},
    }
