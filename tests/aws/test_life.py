"""A stack's whole life on the stand-in, with the real engine: made, looked at again, checked for drift, destroyed.

Whoever does it may do what docs/aws-deploy-policy.json says, and nothing else: the stand-in looks at every call.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.aws.deploy_policy import FILE
from tests.aws.standin import PRIVATE, StandIn, a_stack

pytestmark = pytest.mark.timeout(1800)  # beside machines that boot, on two cores
OTHERS = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}],
}


@pytest.fixture(scope="module")
def deployer(aws: StandIn) -> dict[str, str]:
    """Keys, for a time, of a role that has the policy in docs; as boto3 calls them."""
    iam = aws.client("iam")
    role = iam.create_role(RoleName="deployer", AssumeRolePolicyDocument=json.dumps(OTHERS))["Role"]
    iam.put_role_policy(RoleName="deployer", PolicyName="deploy", PolicyDocument=FILE.read_text(encoding="utf-8"))
    keys = aws.client("sts").assume_role(RoleArn=role["Arn"], RoleSessionName="test")["Credentials"]
    return {
        "aws_access_key_id": keys["AccessKeyId"],
        "aws_secret_access_key": keys["SecretAccessKey"],
        "aws_session_token": keys["SessionToken"],
    }


def foreign(aws: StandIn) -> list[tuple[str, str, dict[str, Any]]]:
    """Calls that concern what is not the fleet's; what they are about is there."""
    aws.client("s3").create_bucket(Bucket="theirs")
    aws.client("iam").create_role(RoleName="theirs", AssumeRolePolicyDocument=json.dumps(OTHERS))
    secret = aws.client("secretsmanager").create_secret(Name="theirs", SecretString="x")["ARN"]
    vpc = aws.client("ec2").create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    key = aws.client("kms").create_key()["KeyMetadata"]["KeyId"]
    return [
        ("iam", "create_user", {"UserName": "other"}),
        ("iam", "delete_role", {"RoleName": "theirs"}),
        ("iam", "put_role_policy", {"RoleName": "theirs", "PolicyName": "x", "PolicyDocument": json.dumps(OTHERS)}),
        ("s3", "delete_bucket", {"Bucket": "theirs"}),
        ("s3", "put_object", {"Bucket": "theirs", "Key": "x", "Body": b""}),
        ("secretsmanager", "get_secret_value", {"SecretId": secret}),
        ("ssm", "put_parameter", {"Name": "/theirs", "Value": "x", "Type": "String"}),
        ("ec2", "delete_vpc", {"VpcId": vpc}),
        ("kms", "schedule_key_deletion", {"KeyId": key}),
    ]


def test_dev_comes_up_stays_as_it_is_and_leaves_nothing(aws: StandIn, deployer: dict[str, str]) -> None:
    with a_stack("dev", aws, PRIVATE) as stack:
        stack.environment.update({name.upper(): value for name, value in deployer.items()})
        said = stack.preview()

        stack.up()

        assert stack.changes() == {}
        stack.pulumi("refresh", "--yes", "--skip-preview", "--expect-no-changes")
        assert stack.outputs["endpoint"].startswith("http://")
        assert "localPortNumber=3000" in stack.outputs["dashboards"]["grafana"]
        assert stack.outputs["cost"]["total"].partition("/h")[0] in said
        stack.pulumi("destroy", "--yes", "--skip-preview")
        assert aws.left() == {"iam:role": ["deployer"]}


def test_the_policy_of_who_deploys_allows_nothing_that_is_not_the_fleets(
    aws: StandIn, deployer: dict[str, str]
) -> None:
    for service, operation, arguments in foreign(aws):
        call = getattr(aws.client(service, **deployer), operation)
        with pytest.raises(ClientError, match=r"AccessDenied|Access Denied"):
            call(**arguments)
