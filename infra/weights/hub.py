"""The Hugging Face hub as a source, through its own client: what it has, its bytes, and what it says no to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from infra.findings import Finding
from infra.weights import files
from infra.weights.entry import FileFact
from infra.weights.files import FULL, WeightsError
from infra.weights.origins import Hub
from infra.weights.progress import Say
from infra.weights.sources import Found, no_weights, read_config, wanted

if TYPE_CHECKING:
    from infra.weights.sources import Fetch, Sink

PUBLIC = "https://huggingface.co"


def find(origin: Hub, say: Say) -> Found:
    """What a repository has at a revision: its commit, the digests that the hub knows, the rest read.

    Raises:
        WeightsError: it cannot be had, or is no model in safetensors.
    """
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415 - slow to import, and most runs do not need it

    source = f"hf://{origin.repository}@{origin.revision}"
    api = HfApi(endpoint=endpoint())
    try:
        say(f"asking {api.endpoint} for {origin.repository}")
        info = api.model_info(origin.repository, revision=origin.revision, files_metadata=True)
        commit = str(info.sha)
        metadata = api.get_safetensors_metadata(origin.repository, revision=commit)
        locked: dict[str, FileFact] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for sibling in info.siblings or []:
                path = sibling.rfilename
                if not wanted(path, metadata):
                    continue
                if sibling.lfs and path != "config.json":
                    locked[path] = FileFact(size=sibling.lfs.size, sha256=sibling.lfs.sha256)
                else:
                    say(f"reading {path}")
                    file = Path(
                        hf_hub_download(
                            origin.repository, path, revision=commit, local_dir=scratch, endpoint=api.endpoint
                        )
                    )
                    locked[path] = FileFact(size=file.stat().st_size, sha256=files.sha256(file))
            config = read_config(Path(scratch), source)
    except failures() as error:
        raise no_weights(error, source) or refusal(error, origin.repository, source) from None
    licence = getattr(info.card_data, "license", None)
    if licence == "other":
        licence = getattr(info.card_data, "license_name", None) or licence
    return Found(f"hf://{origin.repository}@{commit}", locked, config, metadata, licence)


def fetch(origin: Hub, where: str) -> Fetch:
    """Files of one commit of a repository.

    The client's `hf_hub_download` throws a partial file away when its process ends, so the file is kept here and only
    continued by the client. The token is the client's business (HF_TOKEN, or what `hf auth login` stored), as is its
    safety: it does not follow a redirect to another host.
    """
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 - slow to import, and most runs fetch nothing
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils._headers import build_hf_headers  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    hub = endpoint()
    headers = build_hf_headers()

    def get(path: str, fact: FileFact, sink: Sink, offset: int) -> None:
        url = hf_hub_url(origin.repository, path, revision=origin.revision, endpoint=hub)
        try:
            http_get(url, sink, resume_size=offset, headers=headers, expected_size=fact.size)  # type: ignore[arg-type]
        except failures() as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            raise refusal(error, origin.repository, where, path) from None

    return get


def endpoint() -> str:
    """The hub that is asked: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")


def failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own errors, and those of the HTTP client below it."""
    import httpx2  # noqa: PLC0415 - slow to import, and most runs fetch nothing
    from huggingface_hub import errors  # noqa: PLC0415

    return OSError, ValueError, httpx2.HTTPError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError


def refusal(error: Exception, repository: str, where: str, path: str = "config.json") -> WeightsError:
    """What the hub's client ran into, in words that say what to do."""
    from huggingface_hub import errors, get_token  # noqa: PLC0415 - slow to import, and most runs fetch nothing

    hub = endpoint()
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    gated = isinstance(error, errors.GatedRepoError)
    if gated or isinstance(error, errors.RepositoryNotFoundError) or status in {401, 403}:
        why = "it is gated" if gated else "it is gated, private or not there"
        problem = f"{hub} does not give out {repository} (HTTP {status}): {why}"
        accept = f"accept the model's terms on {hub}/{repository}"
        fix = (
            f"{accept} with the account of the token that is in use; a fine-grained token also needs the permission "
            "to read gated repositories (another token: HF_TOKEN)"
            if get_token()
            else f"{accept} and set HF_TOKEN to a token of that account (or run `hf auth login`): none is set"
        )
        fix = fix if gated else f"check the name, {fix}"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem, fix = f"{repository} has no such revision", "name a commit, branch or tag that it has"
    elif isinstance(error, errors.EntryNotFoundError):
        problem, fix = f"{repository} has no {path} at that revision", "lock it again: `fleet lock add`"
    elif status is not None:
        problem, fix = f"{hub} answered HTTP {status} for {repository}", "try again later"
    else:
        problem = f"{repository} cannot be fetched from {hub}: {_first_line(error)}"
        fix = "check the network, or set HF_ENDPOINT to a mirror; the next run goes on where this one ended"
    return WeightsError([Finding(where, problem, fix)])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
