"""A preview for somebody who has no credentials: the plan, and then what is missing; no trace."""

from __future__ import annotations

from tests.aws.standin import PROD, StandIn, a_stack


def test_without_credentials_the_plan_is_told_and_what_to_do() -> None:
    with a_stack("prod", StandIn(""), PROD) as stack:
        own = {name: value for name, value in stack.environment.items() if not name.startswith("AWS_")}
        nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(stack.folder)}
        stack.environment = {**own, **nowhere}

        said = stack.preview(fails=True)

    assert "stack prod on aws us-east-1" in said
    assert "a month, $" in said
    assert "there are no credentials of AWS" in said
    assert "`fleet plan -s prod` needs no credentials" in said
    assert "Traceback" not in said
