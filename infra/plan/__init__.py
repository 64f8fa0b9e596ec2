"""The plan: pure functions from stack config, weights lock, catalog and host facts to one frozen `FleetPlan`."""

from infra.plan.planner import make_plan

__all__ = ["make_plan"]
