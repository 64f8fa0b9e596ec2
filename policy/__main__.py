"""Policy pack for a fleet on AWS: `pulumi preview --policy-pack policy`, and the same of `pulumi up`.

Settings, in a file for `--policy-pack-config`:

    {"budget": {"usd_per_hour": 100}, "tags": {"required": ["team"], "enforcementLevel": "advisory"}}

Without one, the budget is that of the stack itself (`vllm-fleet:budget`), and no tags but the fleet's own are wanted.
"""
# ruff: noqa: INP001 - Pulumi runs it by path

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import rules
from pulumi_policy import (
    EnforcementLevel,
    PolicyConfigSchema,
    PolicyPack,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
    StackValidationArgs,
    StackValidationPolicy,
)

Rule = Callable[[str, str, Any], Iterator[str]]


def of_resources(name: str, description: str, rule: Rule) -> ResourceValidationPolicy:
    """A policy that looks at each resource by itself."""

    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        for words in rule(args.resource_type, args.name, args.props):
            report(words)

    return ResourceValidationPolicy(name, description, validate)


def tags() -> ResourceValidationPolicy:
    """The policy on tags, which can be told to want more."""

    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        wanted = args.get_config().get("required") or ()
        for words in rules.tagging(args.resource_type, args.name, args.props, wanted):
            report(words)

    schema = PolicyConfigSchema(properties={"required": {"type": "array", "items": {"type": "string"}}})
    return ResourceValidationPolicy("tags", "Everything says what it is for.", validate, config_schema=schema)


def of_buckets(args: StackValidationArgs, report: ReportViolation) -> None:
    """Buckets with what belongs to them."""
    for words in rules.buckets([(it.resource_type, it.name, {}) for it in args.resources]):
        report(words)


def of_budget(args: StackValidationArgs, report: ReportViolation) -> None:
    """The plan's cost is an output of the stack."""
    stack = next((it for it in args.resources if it.resource_type == "pulumi:pulumi:Stack"), None)
    plan = (stack.props.get("plan") or {}) if stack else {}
    cost = (plan.get("cost") or {}).get("usd_per_hour")
    limit = args.get_config().get("usd_per_hour")
    for words in rules.budget(cost, own_budget() if limit is None else limit):
        report(words)


def own_budget() -> float | None:
    """What the stack's config says; None: nothing."""
    config = json.loads(os.environ.get("PULUMI_CONFIG") or "{}")
    found = json.loads(config.get("vllm-fleet:budget") or "{}").get("usd_per_hour")
    return None if found is None else float(found)


money = PolicyConfigSchema(properties={"usd_per_hour": {"type": "number"}})
PolicyPack(
    name="vllm-fleet",
    enforcement_level=EnforcementLevel.MANDATORY,
    policies=[
        StackValidationPolicy("budget", "The fleet costs no more than it may.", of_budget, config_schema=money),
        of_resources("open-ports", "Nothing but the endpoint can be reached from everywhere.", rules.open_ports),
        of_resources("encryption", "What is written is encrypted.", rules.encryption),
        StackValidationPolicy("buckets", "Buckets are encrypted and closed.", of_buckets),
        tags(),
    ],
)
