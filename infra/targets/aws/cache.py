"""The model cache: one bucket with bundles and weights, its key, and the job that fills it once."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
import pulumi_aws as aws

from infra.targets.aws.site import Part, Site, policy

KEY_DAYS = 30
"""From the end of the key until it cannot be had back: AWS allows 7 to 30."""
OLD_DAYS = 30
"""How long what was replaced or removed can be had back."""
UPLOAD_DAYS = 3
"""After so long an upload is not finished any more."""


class Cache(Part):
    """The bucket, encrypted with a key of the stack's own; only over TLS; closed to the public."""

    def __init__(self, name: str, site: Site) -> None:
        super().__init__("Cache", name)
        keep = site.aws.protect
        self.key = aws.kms.Key(
            "key",
            description=f"vllm-fleet {site.stack}: model cache and secrets",
            enable_key_rotation=True,
            deletion_window_in_days=KEY_DAYS if keep else 7,
            tags=site.tags("cache"),
            opts=self.within(protect=keep),
        )
        self.bucket = aws.s3.Bucket(
            "cache",
            bucket_prefix=site.bucket_prefix,
            force_destroy=not keep,
            tags=site.tags("cache"),
            opts=self.within(protect=keep),
        )
        self.ready = self._settings(site)
        self.register_outputs({"bucket": self.bucket.bucket})

    def _settings(self, site: Site) -> list[pulumi.Resource]:
        """How the bucket keeps things; objects come after that.

        They hold data only together with the bucket, and outlive the stack with it: else it would lie open.
        """
        keep, bucket = site.aws.protect, self.bucket.id
        versioning = aws.s3.BucketVersioning(
            "cache",
            bucket=bucket,
            versioning_configuration={"status": "Enabled"},
            opts=self.within(protect=keep),
        )
        encryption = aws.s3.BucketServerSideEncryptionConfiguration(
            "cache",
            bucket=bucket,
            rules=[
                {
                    "bucket_key_enabled": True,
                    "apply_server_side_encryption_by_default": {
                        "sse_algorithm": "aws:kms",
                        "kms_master_key_id": self.key.arn,
                    },
                }
            ],
            opts=self.within(protect=keep),
        )
        closed = aws.s3.BucketPublicAccessBlock(
            "cache",
            bucket=bucket,
            block_public_acls=True,
            block_public_policy=True,
            ignore_public_acls=True,
            restrict_public_buckets=True,
            opts=self.within(protect=keep),
        )
        owner = aws.s3.BucketOwnershipControls(
            "cache",
            bucket=bucket,
            rule={"object_ownership": "BucketOwnerEnforced"},
            opts=self.within(protect=keep),
        )
        tls = aws.s3.BucketPolicy(
            "cache",
            bucket=bucket,
            policy=policy(
                {
                    "Sid": "OnlyOverTls",
                    "Effect": "Deny",
                    "Principal": "*",
                    "Action": "s3:*",
                    "Resource": [self.bucket.arn, pulumi.Output.concat(self.bucket.arn, "/*")],
                    "Condition": {"Bool": {"aws:SecureTransport": "false"}},
                }
            ),
            opts=self.within(protect=keep, depends_on=[closed]),
        )
        old = aws.s3.BucketLifecycleConfiguration(
            "cache",
            bucket=bucket,
            rules=[
                {
                    "id": "old-versions",
                    "status": "Enabled",
                    "filter": {"prefix": ""},
                    "noncurrent_version_expiration": {"noncurrent_days": OLD_DAYS},
                    "abort_incomplete_multipart_upload": {"days_after_initiation": UPLOAD_DAYS},
                }
            ],
            opts=self.within(protect=keep, depends_on=[versioning]),
        )
        return [versioning, encryption, closed, owner, tls, old]

    def store(
        self,
        name: str,
        key: pulumi.Input[str],
        content: pulumi.Input[str],
        site: Site,
        after: Sequence[pulumi.Resource] = (),
    ) -> aws.s3.BucketObjectv2:
        """A file in the bucket. Its key says what is in it: another content is another file."""
        return aws.s3.BucketObjectv2(
            name,
            bucket=self.bucket.id,
            key=key,
            content=content,
            content_type="application/json",
            tags=site.fixed_tags("cache"),  # an object has ten at most
            opts=self.within(depends_on=[*self.ready, *after]),
        )
