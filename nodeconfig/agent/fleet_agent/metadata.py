"""What the instance metadata service says of this machine, with a token (IMDSv2)."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus

ADDRESS = "http://169.254.169.254/latest"
TOKEN_S = 21600
TIMEOUT_S = 2.0


class Unreachable(Exception):  # noqa: N818 - it heals by itself
    """Nothing can be said; what was known stays true."""


@dataclass
class Metadata:
    """The service; a document that is not there is an empty text."""

    address: str = ADDRESS
    _token: str = ""

    def get(self, path: str) -> str:
        """A document, or "" where there is none.

        Raises:
            Unreachable: the service does not answer, or answers nonsense.
        """
        for fresh in (not self._token, True):
            if fresh:
                self._token = self._ask("/api/token", "PUT", "X-aws-ec2-metadata-token-ttl-seconds", str(TOKEN_S))
            try:
                return self._ask(f"/meta-data/{path}", "GET", "X-aws-ec2-metadata-token", self._token)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == HTTPStatus.NOT_FOUND:
                    return ""
                if error.code != HTTPStatus.UNAUTHORIZED:
                    raise Unreachable(f"the metadata service answers {error.code}") from None
        raise Unreachable("the metadata service takes no token, not even a new one")

    def _ask(self, path: str, method: str, header: str, value: str) -> str:
        request = urllib.request.Request(f"{self.address}{path}", method=method, headers={header: value})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 - a fixed address
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            if path == "/api/token":
                error.close()
                raise Unreachable(f"the metadata service gives no token: {error.code}") from None
            raise
        except OSError as error:
            raise Unreachable(f"the metadata service does not answer: {error}") from None
