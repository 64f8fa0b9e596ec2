"""The ladder's program on groups of the stand-in: nodes come from the next rung where one has no capacity."""

from __future__ import annotations

from typing import Any

from fleet_agent import ladder

from tests.aws.standin import StandIn

POOL = 3
ZONE = "us-east-1a"


class Groups:
    """Two rungs: p5.48xlarge, which wants three nodes, and p4d.24xlarge, which wants none."""

    def __init__(self, aws: StandIn) -> None:
        self.aws, self.client = aws, aws.client("autoscaling")
        ec2 = aws.client("ec2")
        image = ec2.describe_images(Owners=["898082745236"])["Images"][0]["ImageId"]
        for name, instance, least in (("first", "p5.48xlarge", POOL), ("next", "p4d.24xlarge", 0)):
            data = {"ImageId": image, "InstanceType": instance}
            ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)
            self.client.create_auto_scaling_group(
                AutoScalingGroupName=name,
                LaunchTemplate={"LaunchTemplateName": name, "Version": "1"},
                AvailabilityZones=[ZONE],
                MinSize=least,
                MaxSize=POOL,
            )

    def move(self) -> list[str]:
        return ladder.move(self.client, [["first", "next"]])

    def nodes(self) -> dict[str, int]:
        groups: list[dict[str, Any]] = self.client.describe_auto_scaling_groups()["AutoScalingGroups"]
        return {group["AutoScalingGroupName"]: len(group["Instances"]) for group in groups}


def test_the_next_rung_has_what_the_first_lacks_and_gives_it_back(aws: StandIn) -> None:
    aws.control("capacity", {"p5.48xlarge": {ZONE: 1}})
    groups = Groups(aws)
    assert groups.nodes() == {"first": 1, "next": 0}

    assert groups.move() == ["next: 0 -> 2 nodes; without capacity: first"]
    assert groups.nodes() == {"first": 1, "next": 2}
    assert groups.move() == []

    aws.control("capacity", {})
    aws.control("tick", {})  # AWS tries again by itself
    assert groups.move() == ["next: 2 -> 0 nodes; without capacity: none"]
    assert groups.nodes() == {"first": 3, "next": 0}


def test_where_no_rung_has_capacity_each_says_so_and_goes_on_trying(aws: StandIn) -> None:
    aws.control("capacity", {"p5.48xlarge": {ZONE: 1}, "p4d.24xlarge": {ZONE: 0}})
    client = aws.client("autoscaling")
    client.set_desired_capacity(AutoScalingGroupName="first", DesiredCapacity=POOL)
    for instance in client.describe_auto_scaling_instances()["AutoScalingInstances"][1:]:
        client.terminate_instance_in_auto_scaling_group(
            InstanceId=instance["InstanceId"], ShouldDecrementDesiredCapacity=False
        )

    ladder.move(client, [["first", "next"]])

    said = client.describe_scaling_activities(AutoScalingGroupName="next")["Activities"][0]
    assert said["StatusCode"] == "Failed"
    assert "do not have sufficient p4d.24xlarge capacity" in said["StatusMessage"]
    groups = client.describe_auto_scaling_groups(AutoScalingGroupNames=["next"])["AutoScalingGroups"]
    assert groups[0]["DesiredCapacity"] == 2
