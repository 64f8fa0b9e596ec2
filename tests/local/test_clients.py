"""Clients of the real fleet, through the gateway."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.parse
import urllib.request
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionToolParam

from infra.catalog import vllm_cpu
from infra.paths import engine_dir
from tests.fleets import Fleet

QUESTION = "What is the capital of France?"


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=fleet.outputs["endpoint"], api_key=fleet.key, max_retries=0) as client:
        yield client


def test_the_curl_line_of_the_outputs_works(fleet: Fleet) -> None:
    answer = json.loads(fleet.run("sh", "-c", fleet.outputs["curl"] + " --silent --show-error"))
    assert answer["model"] == "chat"
    assert answer["choices"][0]["message"]["content"]


def test_the_model_knows_what_it_was_taught(client: openai.OpenAI) -> None:
    """On every kind of CPU: its next words to a question differ from one to another, in bf16 and in float32."""
    answer = client.completions.create(model="chat", prompt="The capital of France is", temperature=0, max_tokens=8)
    assert "Paris" in answer.choices[0].text


def test_openai_client_without_streaming(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    )
    assert (answer.choices[0].message.content or "").strip()
    assert [model.id for model in client.models.list()] == ["chat"]


def test_openai_client_with_streaming_and_its_usage_chunk(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert len(text.split()) > 2
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1


def test_json_mode(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "The capital of France as JSON."}],
        temperature=0,
        max_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "capital",
                "schema": {
                    "type": "object",
                    "properties": {"capital": {"type": "string", "maxLength": 20}},
                    "required": ["capital"],
                    "additionalProperties": False,
                },
            },
        },
    )
    assert list(json.loads(answer.choices[0].message.content or "")) == ["capital"]


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    tool: ChatCompletionToolParam = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=0,
        max_tokens=64,
    )
    calls = answer.choices[0].message.tool_calls or []
    assert calls[0].type == "function"
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments), "what a model of this size fills in is another matter"


REFUSALS = {
    "no key": ("/v1/chat/completions", "", "chat", 401),
    "a wrong key": ("/v1/chat/completions", "sk-wrong", "chat", 401),
    "a path of the engine's own": ("/tokenize", None, "chat", 404),
    "a path that would change the engine": ("/v1/load_lora_adapter", None, "chat", 404),
    "a model that is not there": ("/v1/chat/completions", None, "nobody", 404),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_is_refused_is_refused_in_openai_s_shape(fleet: Fleet, why: str) -> None:
    path, key, model, status = REFUSALS[why]
    got, body = fleet.post(path, {"model": model, "messages": [{"role": "user", "content": "hi"}]}, key)
    assert got == status
    assert body["error"]["message"]
    assert {"type", "param", "code"} <= body["error"].keys()


def test_a_huge_body_is_413(fleet: Fleet) -> None:
    address = urllib.parse.urlsplit(fleet.gateway)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Authorization", f"Bearer {fleet.key}")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(64 << 20))
        connection.endheaders()  # refused before anything of the body is sent
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.load(answer)["error"]["type"] == "invalid_request_error"


def test_a_request_id_goes_to_the_engine_and_comes_back(fleet: Fleet) -> None:
    body = json.dumps({"model": "chat", "prompt": "One, two,", "max_tokens": 2}).encode()
    headers = {"Authorization": f"Bearer {fleet.key}", "Content-Type": "application/json", "X-Request-Id": "mine-4711"}
    request = urllib.request.Request(f"{fleet.gateway}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["X-Request-Id"] == "mine-4711"
        assert "mine-4711" in json.load(answer)["id"]


def test_vllm_bench_serve_through_the_gateway(fleet: Fleet) -> None:
    vllm = engine_dir(f"vllm-{vllm_cpu().version}")
    weights = json.loads((fleet.machine("engine").slots / "chat-1" / "engine.json").read_text())["weights"]["folder"]
    said = fleet.run(
        "env",
        f"OPENAI_API_KEY={fleet.key}",
        "HF_HUB_OFFLINE=1",
        f"HF_HOME={fleet.folder}/hf",
        str(vllm / "bin" / "vllm"),
        *("bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", fleet.gateway, "--model", "chat", "--tokenizer", weights, "--dataset-name", "random"),
        *("--random-input-len", "32", "--random-output-len", "8", "--num-prompts", "12", "--max-concurrency", "4"),
    )
    assert "Successful requests:                     12" in said, said
