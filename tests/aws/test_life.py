"""A stack's whole life on the stand-in, with the real engine: made, looked at again, checked for drift, destroyed."""

from __future__ import annotations

from tests.aws.standin import PRIVATE, StandIn, a_stack


def test_dev_comes_up_stays_as_it_is_and_leaves_nothing(aws: StandIn) -> None:
    with a_stack("dev", aws, PRIVATE) as stack:
        assert "$0.83/h" in stack.preview()

        stack.up()

        assert stack.changes() == {}
        stack.pulumi("refresh", "--yes", "--skip-preview", "--expect-no-changes")
        assert stack.outputs["endpoint"].startswith("http://")
        assert "localPortNumber=3000" in stack.outputs["dashboards"]["grafana"]
        assert stack.outputs["cost"]["total"] == "$0.83/h, $609 a month"
        stack.pulumi("destroy", "--yes", "--skip-preview")
        assert aws.left() == {}
