"""What a machine runs, where it finds it: its bundle by digest, its secrets, and the parameter that points at both."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pulumi
import pulumi_aws as aws

from infra.render.bundle import Bundle
from infra.targets.aws.cache import Cache
from infra.targets.aws.site import Part, Site

SCHEMA = 1


class Runs(Part):
    """What one kind of machines runs.

    An edit that changes files alone changes the object, the parameter and the rollout, and no machine.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        machine: str,
        site: Site,
        cache: Cache,
        bundle: Bundle,
        public: Mapping[str, str],
        secret: Mapping[str, str],
        runtime: str | None,
        tags: dict[str, str],
        services: pulumi.Input[Mapping[str, str]] | None = None,
    ) -> None:
        """Declare it.

        Args:
            machine: Their kind.
            site: The stack.
            cache: Where the bundle is kept.
            bundle: What they run.
            public: Files of the bundle that the cache keeps.
            secret: Its other files.
            runtime: Digest of what they install; None: their image has it.
            tags: Of everything.
            services: Model to the id of its service in Cloud Map, of engine nodes.
        """
        super().__init__("Runs", machine)
        self.digest = bundle.digest
        text = json.dumps({"schema": SCHEMA, "files": dict(public)}, sort_keys=True)
        stored = cache.store(f"bundle-{machine}", f"bundles/{bundle.digest}.json", text, site)
        self.secret = self._secret(machine, site, cache, secret, tags) if secret else None
        arns = [self.secret.arn] if self.secret else []
        self.pointer = aws.ssm.Parameter(
            machine,
            name=site.parameter(machine),
            type="String",
            insecure_value=pulumi.Output.json_dumps(
                {"bundle": bundle.digest, "secrets": arns, "runtime": runtime, "services": services or {}}
            ),
            description="What these machines run: bundles/<bundle>.json of the cache",
            tags=tags,
            opts=self.within(depends_on=[stored, *self._versions]),
        )
        self.register_outputs({"digest": bundle.digest})

    _versions: tuple[pulumi.Resource, ...] = ()

    def _secret(
        self, machine: str, site: Site, cache: Cache, files: Mapping[str, str], tags: dict[str, str]
    ) -> aws.secretsmanager.Secret:
        """Files with hashes of keys. Its name is free at once when it goes: there is nothing in it that others lack."""
        secret = aws.secretsmanager.Secret(
            machine,
            name=f"vllm-fleet/{site.stack}/{machine}",
            description="Files of the bundle that hold hashes of API keys",
            kms_key_id=cache.key.arn,
            recovery_window_in_days=0,
            tags=tags,
            opts=self.within(),
        )
        version = aws.secretsmanager.SecretVersion(
            machine,
            secret_id=secret.id,
            secret_string=pulumi.Output.secret(json.dumps(dict(files), sort_keys=True)),
            opts=self.within(),
        )
        self._versions = (version,)
        return secret
