"""The job that brings weights from their origins into the cache, once: CodeBuild, started when others are wanted.

Not an instance: there is no image to keep, nothing runs or costs while there is nothing to bring, its logs are in one
place, and the large type has 824 GB of disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pulumi
import pulumi_aws as aws

from infra.paths import ROOT
from infra.targets.aws.cache import Cache
from infra.targets.aws.site import Part, Site, allow, policy, trust
from infra.weights.lock import LOCK

if TYPE_CHECKING:
    from infra.targets.aws.identity import Account
    from infra.weights.lock import WeightsLock

BUILDSPEC = "nodeconfig/cache/buildspec.yml"
SOURCE = (
    *(
        "infra/__init__.py",
        "infra/findings.py",
        "infra/paths.py",
        "infra/weights/*.py",
        "toolchain/*.py",
        "toolchain/*.toml",
        "toolchain/vllm-alias/*",
        "nodeconfig/cache/*",
    ),
    *("requirements/*.txt", "pyproject.toml"),
)
"""What of the project the job runs."""
IMAGE = "aws/codebuild/standard:7.0"
SIZE = "BUILD_GENERAL1_LARGE"
LONGEST_MIN = 480
"""A download of 500 GB at 20 MB/s."""
LOG_DAYS = 90
REQUEST = "fill"
"""Last part of the name of the parameter that says what is wanted: the key of a request in the bucket."""


class Fill(Part):
    """The job, what starts it, and the request for the models of this stack."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of
        self, name: str, site: Site, account: Account, cache: Cache, lock: WeightsLock, after: Sequence[pulumi.Resource]
    ) -> None:
        super().__init__("Fill", name)
        self._site, self._account, self._cache = site, account, cache
        tags = site.tags("fill")
        source = aws.s3.BucketObjectv2(
            "fill-source",
            bucket=cache.bucket.id,
            key="source/fill.zip",
            source=_source(),
            tags=site.fixed_tags("fill"),
            opts=self.within(depends_on=cache.ready),
        )
        log = aws.cloudwatch.LogGroup(
            "fill",
            name=f"/vllm-fleet/{site.stack}/fill",
            retention_in_days=LOG_DAYS,
            tags=tags,
            opts=self.within(),
        )
        role = self._role(source, log, tags)
        project = aws.codebuild.Project(
            "fill",
            description=f"vllm-fleet {site.stack}: weights from their origins into the model cache",
            service_role=role.arn,
            build_timeout=LONGEST_MIN,
            artifacts={"type": "NO_ARTIFACTS"},
            source={
                "type": "S3",
                "location": pulumi.Output.concat(cache.bucket.bucket, "/", source.key),
                "buildspec": BUILDSPEC,
            },
            environment={
                "type": "LINUX_CONTAINER",
                "image": IMAGE,
                "compute_type": SIZE,
                "environment_variables": self._variables(),
            },
            logs_config={"cloudwatch_logs": {"group_name": log.name}},
            tags=tags,
            # A job that runs is left alone: it keeps its tags, and with another token it is another project.
            opts=self.within(ignore_changes=["tags", "tagsAll"], replace_on_changes=["environment"]),
        )
        started_by = self._trigger(project, tags)
        entries = {model.weights: lock.digest(model.weights) for model in site.plan.models}
        text = json.dumps({"entries": entries}, sort_keys=True)
        key = f"fill/{hashlib.sha256(text.encode()).hexdigest()}.json"
        request = cache.store("fill-request", key, text, site)
        aws.ssm.Parameter(
            "fill",
            name=site.parameter(REQUEST),
            type="String",
            insecure_value=key,
            description="What the model cache is to have: its change starts the job",
            tags=tags,
            # Late: a rule that is new takes a moment until it sees events.
            opts=self.within(depends_on=[request, *started_by, *after]),
        )
        self.command = pulumi.Output.concat(
            f"aws codebuild start-build --region {site.region} --project-name ", project.name
        )
        self.register_outputs({"project": project.name})

    def _variables(self) -> list[Any]:
        found: list[Any] = [{"name": "FLEET_BUCKET", "value": self._cache.bucket.bucket}]
        name = self._site.parameter(REQUEST)
        found.append({"name": "FLEET_REQUEST", "type": "PARAMETER_STORE", "value": name})
        if self._site.aws.hub_token_arn:
            value = self._site.aws.hub_token_arn
            found.append({"name": "HF_TOKEN", "type": "SECRETS_MANAGER", "value": value})
        return found

    def _role(self, source: aws.s3.BucketObjectv2, log: aws.cloudwatch.LogGroup, tags: dict[str, str]) -> aws.iam.Role:
        """It reads requests and its own source, and writes weights and its log."""
        site, bucket = self._site, self._cache.bucket.arn
        role = aws.iam.Role(
            "fill",
            path=site.path,
            assume_role_policy=trust("codebuild"),
            permissions_boundary=site.aws.permissions_boundary,
            tags=tags,
            opts=self.within(),
        )
        weights = pulumi.Output.concat(bucket, "/weights/*")
        statements = [
            allow(["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"], weights),
            allow(["s3:GetObject", "s3:GetObjectVersion"], [pulumi.Output.concat(bucket, "/fill/*"), source.arn]),
            allow(["s3:ListBucket"], bucket),
            allow(["ssm:GetParameters"], self._account.arn("ssm", f"parameter{site.parameter(REQUEST)}")),
            allow(["kms:Decrypt", "kms:GenerateDataKey"], self._cache.key.arn),
            allow(["logs:CreateLogStream", "logs:PutLogEvents"], [log.arn, pulumi.Output.concat(log.arn, ":*")]),
        ]
        if site.aws.hub_token_arn:
            statements.append(allow(["secretsmanager:GetSecretValue"], site.aws.hub_token_arn))
        aws.iam.RolePolicy("fill", role=role.id, policy=policy(*statements), opts=self.within())
        return role

    def _trigger(self, project: aws.codebuild.Project, tags: dict[str, str]) -> list[pulumi.Resource]:
        """Another request starts the job."""
        site = self._site
        rule = aws.cloudwatch.EventRule(
            "fill",
            description="The model cache is to have other weights",
            event_pattern=json.dumps(
                {
                    "source": ["aws.ssm"],
                    "detail-type": ["Parameter Store Change"],
                    "detail": {"name": [site.parameter(REQUEST)], "operation": ["Create", "Update"]},
                }
            ),
            tags=tags,
            opts=self.within(),
        )
        role = aws.iam.Role(
            "fill-start",
            path=site.path,
            assume_role_policy=trust("events"),
            permissions_boundary=site.aws.permissions_boundary,
            tags=tags,
            opts=self.within(),
        )
        may = aws.iam.RolePolicy(
            "fill-start",
            role=role.id,
            policy=policy(allow(["codebuild:StartBuild"], project.arn)),
            opts=self.within(),
        )
        target = aws.cloudwatch.EventTarget(
            "fill", rule=rule.name, arn=project.arn, role_arn=role.arn, opts=self.within()
        )
        return [may, target]


def _source() -> pulumi.AssetArchive:
    """The project, as far as the job runs it, with the lock that this stack is planned from."""
    files = {str(file.relative_to(ROOT)): file for pattern in SOURCE for file in ROOT.glob(pattern) if file.is_file()}
    files[str(Path("stacks", LOCK.name))] = LOCK
    return pulumi.AssetArchive({name: pulumi.FileAsset(str(file)) for name, file in sorted(files.items())})
