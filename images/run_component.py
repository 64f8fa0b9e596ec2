"""Run a component document of EC2 Image Builder here, without Image Builder: the steps of one phase.

    python3 run_component.py components/fleet.yaml build --set Sha256=… --set Source=s3://… --objects FOLDER

Only what the documents beside it use: parameters, the actions ExecuteBash and S3Download, maxAttempts, timeoutSeconds,
onFailure. A download from S3 is a copy from the folder of objects. It needs root, and changes the machine it runs on.
"""

# ruff: noqa: INP001, T201 - a program, run by path on the machine that becomes an image
from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

SCHEMA = "1.0"
LONGEST_S = 7200
"""What AWSTOE gives a step that says nothing."""
REFERENCE = re.compile(r"\{\{\s*([\w.]+)\s*\}\}")


class RefusedError(Exception):
    """The document cannot be run; the text says why."""


class FailedError(Exception):
    """A step failed in every attempt."""


def load(file: Path) -> dict[str, Any]:
    """A component document.

    Raises:
        RefusedError: It is of another schema.
    """
    document: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if str(document.get("schemaVersion")) != SCHEMA:
        raise RefusedError(f"{file}: schemaVersion is {document.get('schemaVersion')}, not {SCHEMA}")
    return document


def steps(document: Mapping[str, Any], phase: str) -> list[dict[str, Any]]:
    """The steps of a phase; none if the document has no such phase."""
    return [step for one in document["phases"] if one["name"] == phase for step in one["steps"]]


def values(document: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Every parameter's value: what was given, or its default.

    Raises:
        RefusedError: One is missing, or unknown.
    """
    known = {name: facts for row in document.get("parameters", ()) for name, facts in row.items()}
    if unknown := sorted(given.keys() - known.keys()):
        raise RefusedError(f"no parameter is called {', '.join(unknown)}: there are {', '.join(known) or 'none'}")
    found = {name: given.get(name, facts.get("default")) for name, facts in known.items()}
    if missing := sorted(name for name, value in found.items() if value is None):
        raise RefusedError(f"say what {', '.join(missing)} is: --set NAME=VALUE")
    return {name: str(value) for name, value in found.items()}


def filled(value: Any, parameters: Mapping[str, str]) -> Any:
    """A step's input with values in the places of parameters.

    Raises:
        RefusedError: It names one that the document does not have.
    """
    if isinstance(value, list):
        return [filled(one, parameters) for one in value]
    if isinstance(value, dict):
        return {key: filled(one, parameters) for key, one in value.items()}
    if not isinstance(value, str):
        return value

    def put(found: re.Match[str]) -> str:
        if found[1] not in parameters:
            raise RefusedError(f"{{{{ {found[1]} }}}} is no parameter of the document")
        return parameters[found[1]]

    return REFERENCE.sub(put, value)


def run(document: Mapping[str, Any], phase: str, parameters: Mapping[str, str], objects: Path | None) -> None:
    """Run a phase, step by step, to the first that fails.

    Raises:
        RefusedError: A step asks for what this cannot do.
        FailedError: A step failed in every attempt.
    """
    for step in steps(document, phase):
        inputs = filled(step["inputs"], parameters)
        attempts = int(step.get("maxAttempts", 1))
        for attempt in range(1, attempts + 1):
            print(f"{document['name']} {phase} {step['name']}: attempt {attempt} of {attempts}", flush=True)
            if _step(step, inputs, objects):
                break
        else:
            if step.get("onFailure", "Abort") == "Abort":
                raise FailedError(f"{document['name']}: {phase} step {step['name']} failed")


def _step(step: Mapping[str, Any], inputs: Any, objects: Path | None) -> bool:
    """One attempt of a step."""
    action = step["action"]
    if action == "ExecuteBash":
        script = "\n".join(inputs["commands"])
        limit = int(step.get("timeoutSeconds", LONGEST_S))
        try:
            return (
                subprocess.run(["bash", "-c", script], stdin=subprocess.DEVNULL, timeout=limit, check=False).returncode
                == 0
            )
        except subprocess.TimeoutExpired:
            print(f"{step['name']} took more than {limit} s", flush=True)
            return False
    if action == "S3Download":
        if objects is None:
            raise RefusedError("a step downloads from S3: --objects names the folder that has the files")
        for one in inputs:
            target = Path(one["destination"])
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(objects / PurePosixPath(one["source"]).name, target)
            except OSError as error:
                print(f"{one['source']}: {error}", flush=True)
                return False
        return True
    raise RefusedError(f"the action {action} is not known here")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0: every step ran, 1: one failed, 2: the document or the arguments cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("phase", choices=["build", "validate"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="given")
    parser.add_argument("--objects", type=Path, help="folder with the files that a step would download from S3")
    wanted = parser.parse_args(arguments)
    try:
        document = load(wanted.document)
        parameters = values(document, dict(one.split("=", 1) for one in wanted.given))
        run(document, wanted.phase, parameters, wanted.objects)
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    except FailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
