"""What planning says beside the plan: findings, notices, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from infra.findings import ConfigError, Finding, in_order
from infra.plan.model import Notice, Origin


@dataclass
class Ledger:
    """Filled while a plan is made. A refusal does not end the planning: all of them come at once."""

    findings: list[Finding]
    notices: list[Notice] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)

    def refuse(self, path: str, problem: str, fix: str = "") -> None:
        """Note that the plan cannot be. What stands in for a value that is faulty itself is not blamed."""
        if all(finding.path != path for finding in self.findings):
            self.findings.append(Finding(path, problem, fix))

    def note(self, path: str, message: str) -> None:
        """Note what the user should know that is no error."""
        self.notices.append(Notice(path=path, message=message))

    def because(self, path: str, value: object, reason: str) -> None:
        """Note where a value came from."""
        self.origins.append(Origin(path=path, value=str(value), because=reason))

    def given(self, path: str, value: object) -> None:
        """Note that the user wrote a value."""
        self.because(path, value, "written in the stack file")

    def settle(self) -> None:
        """End here if anything was refused.

        Raises:
            ConfigError: With every finding, sorted by path.
        """
        if self.findings:
            raise ConfigError(in_order(self.findings))


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / (1 << 30):.1f} GiB"
