"""What this machine tells AWS. Every call may be repeated; what is so already is no error."""

from __future__ import annotations

from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

PASSED = "No active Lifecycle Action found"
"""Of a hook that nobody waits for any more."""


class CloudError(Exception):
    """AWS did not take it; another try may help."""


class Clients:
    """boto3's clients, made when they are wanted: one that was made without credentials never gets any."""

    def __init__(self, region: str, **settings: Any) -> None:
        self._region, self._config = region, Config(**settings)
        self._made: dict[str, Any] = {}

    def __getitem__(self, service: str) -> Any:
        """The client of a service."""
        if service not in self._made:
            self._made[service] = boto3.client(service, region_name=self._region, config=self._config)
        return self._made[service]

    def forget(self) -> None:
        """After a failure: make them anew."""
        self._made.clear()


class Cloud:
    """The services, for one machine."""

    def __init__(self, region: str, instance: str, address: str, group: str | None) -> None:
        self.region, self.instance, self.address, self.group = region, instance, address, group
        patience = {"mode": "standard", "total_max_attempts": 3}
        self._clients = Clients(region, connect_timeout=5, read_timeout=10, retries=patience, inject_host_prefix=True)

    def _call(self, service: str, method: str, *, fine: tuple[str, ...] = (), **arguments: Any) -> Any:
        try:
            return getattr(self._clients[service], method)(**arguments)
        except ClientError as error:
            found = error.response["Error"]
            if found["Code"] not in fine and not any(text in found["Message"] for text in fine):
                raise CloudError(str(error)) from None
        except BotoCoreError as error:
            self._clients.forget()
            raise CloudError(str(error)) from None

    def hook(self, name: str, result: str) -> None:
        """Let the group go on (CONTINUE), or end this machine (ABANDON).

        Raises:
            CloudError: as every method here.
        """
        self._call(
            "autoscaling",
            "complete_lifecycle_action",
            fine=(PASSED,),
            AutoScalingGroupName=self.group,
            LifecycleHookName=name,
            InstanceId=self.instance,
            LifecycleActionResult=result,
        )

    def heartbeat(self, hook: str) -> None:
        """Let the group wait for longer."""
        self._call(
            "autoscaling",
            "record_lifecycle_action_heartbeat",
            fine=(PASSED,),
            AutoScalingGroupName=self.group,
            LifecycleHookName=hook,
            InstanceId=self.instance,
        )

    def protect(self, *, protected: bool) -> None:
        """Whether the group may choose this machine when it wants fewer."""
        self._call(
            "autoscaling",
            "set_instance_protection",
            AutoScalingGroupName=self.group,
            InstanceIds=[self.instance],
            ProtectedFromScaleIn=protected,
        )

    def _group(self) -> dict[str, Any]:
        found = self._call("autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[self.group])
        if not found["AutoScalingGroups"]:
            raise CloudError(f"there is no group {self.group}")
        return dict(found["AutoScalingGroups"][0])

    def machines(self) -> tuple[int, dict[str, bool]]:
        """How many machines the group wants; those that serve, and whether each is protected."""
        group = self._group()
        serving = {
            it["InstanceId"]: bool(it["ProtectedFromScaleIn"])
            for it in group["Instances"]
            if it["LifecycleState"] == "InService"
        }
        return int(group["DesiredCapacity"]), serving

    def balance(self, *, on: bool) -> None:
        """Whether the load balancers of the group send connections to this machine; open ones it leaves alone."""
        method = "register_targets" if on else "deregister_targets"
        for arn in self._group()["TargetGroupARNs"]:
            self._call("elbv2", method, fine=("InvalidTarget",), TargetGroupArn=arn, Targets=[{"Id": self.instance}])

    def unhealthy(self) -> None:
        """Let the group replace this machine."""
        self._call(
            "autoscaling",
            "set_instance_health",
            InstanceId=self.instance,
            HealthStatus="Unhealthy",
            ShouldRespectGracePeriod=False,
        )

    def register(self, service: str, name: str, port: int) -> None:
        """Let gateways find an engine."""
        self._call(
            "servicediscovery",
            "register_instance",
            fine=("DuplicateRequest",),
            ServiceId=service,
            InstanceId=f"{self.instance}-{name}",
            Attributes={"AWS_INSTANCE_IPV4": self.address, "AWS_INSTANCE_PORT": str(port)},
        )

    def deregister(self, service: str, name: str) -> None:
        """Let them forget it."""
        self._call(
            "servicediscovery",
            "deregister_instance",
            fine=("InstanceNotFound", "ServiceNotFound", "DuplicateRequest"),
            ServiceId=service,
            InstanceId=f"{self.instance}-{name}",
        )
