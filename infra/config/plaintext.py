"""Credentials that stand in plain text where they must not. What is found is never shown."""

from __future__ import annotations

import re
from dataclasses import dataclass

SHOWN = 4
REVOKED = "take it out and revoke it: it is in the file's history"


@dataclass(frozen=True)
class Credential:
    """A kind of credential, known by how it begins."""

    pattern: re.Pattern[str]
    name: str
    instead: str
    """How it gets to who needs it."""

    @property
    def problem(self) -> str:
        """What is wrong, without what was found."""
        return f"holds {self.name} in plain text, which is not shown here"

    @property
    def fix(self) -> str:
        """What to do."""
        return f"{REVOKED}; {self.instead}"


def _starting(*prefixes: str, rest: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(prefixes)}){rest}")


CREDENTIALS = (
    Credential(
        _starting("hf_", rest=r"[A-Za-z0-9]{8,}"),
        "a token of the Hugging Face hub",
        "`fleet lock` reads a new one from HF_TOKEN; what Pulumi itself must know: `pulumi config set --secret KEY`",
    ),
    Credential(
        _starting("AKIA", "ASIA", rest=r"[A-Z0-9]{8,}(?![A-Za-z0-9])"),
        "an access key of AWS",
        "`aws sso login` or AWS_PROFILE needs none in a file, or else `pulumi config set --secret aws:accessKey`",
    ),
    Credential(
        _starting("gh[pousr]_", "github_pat_", "glpat-", "xox[abprs]-", rest=r"[A-Za-z0-9_-]{8,}"),
        "an access token",
        "what Pulumi must know is encrypted by `pulumi config set --secret KEY`",
    ),
    Credential(
        # A digit or a capital: words with hyphens are no keys.
        _starting("sk-", rest=r"(?=[a-z_-]*[A-Z0-9])[A-Za-z0-9_-]{8,}"),
        "an API key",
        "`fleet keys add NAME` makes a key of this fleet and writes its hash; for others: `pulumi config set --secret`",
    ),
    Credential(
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
        "a private key",
        "what Pulumi must know is encrypted by `pulumi config set --secret KEY`",
    ),
)


SECRET = Credential(
    re.compile(r"(?i)(?:token|secret|password|passwd|passphrase|credentials?|(?:api|access|secret|private)[-_ ]?key)$"),
    "a secret",
    "the hub's token goes into HF_TOKEN, a client's key comes from `fleet keys add NAME`",
)
"""Known by the name of its key."""


def secret(key: object, value: object) -> Credential | None:
    """The kind of credential that a text under a key holds, if any."""
    named = isinstance(key, str) and isinstance(value, str) and value and SECRET.pattern.search(key)
    return credential(value) or (SECRET if named else None)


def credential(text: object) -> Credential | None:
    """The kind of credential that a text holds, if any."""
    if not isinstance(text, str):
        return None
    return next((known for known in CREDENTIALS if known.pattern.search(text)), None)


def hidden(text: str) -> str:
    """A text without the credentials in it."""
    for known in CREDENTIALS:
        text = known.pattern.sub(lambda match: f"{match[0][:SHOWN]}…", text)
    return text
