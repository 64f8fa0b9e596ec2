"""Pulumi's entry: config → plan → target. Beside Pulumi.yaml: dynamic providers start in the program's folder."""

import pulumi

from infra.findings import ConfigError
from infra.program import run

try:
    run(pulumi.get_stack())
except ConfigError as error:
    raise pulumi.RunError(f"the stack config cannot be deployed:\n{error}") from None
