"""Stands in for `vllm serve` where the engine itself is not what is tested: starts in no time, misbehaves on request.

Run as `python fake_vllm.py serve WEIGHTS --port N ...`. A file `behaviour` in the folder of the weights makes it bad:
`dies-on-request` answers /health and exits at the first completion, `exits` does not start, `has-a-part` has a process
that vLLM would call its own and that ends first when the engine is told to stop. So does a context of 1000
tokens: where the weights are shared, a stack config can name that one.

A request may `hold` until /release, or `stream` so many tokens, one every `every_s`. Told to stop, it finishes what it
has begun, as vLLM does with --shutdown-timeout.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from aiohttp import web


def main() -> None:
    weights, arguments = Path(sys.argv[2]), sys.argv[3:]
    port = int(arguments[arguments.index("--port") + 1])
    host = arguments[arguments.index("--host") + 1] if "--host" in arguments else "127.0.0.1"
    file = weights / "behaviour"
    behaviour = file.read_text().strip() if file.exists() else ""
    if "--max-model-len" in arguments and arguments[arguments.index("--max-model-len") + 1] == "1000":
        behaviour = "dies-on-request"
    if behaviour == "exits":
        sys.exit("these weights do not start")
    asyncio.run(serve(weights, host, port, behaviour))


async def stream(request: web.Request, counts: dict[str, int], tokens: int, every_s: float) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for number in range(tokens):
        counts["generated"] += 1
        await answer.write(f"data: {number}\n\n".encode())
        await asyncio.sleep(every_s)
    await answer.write(b"data: [DONE]\n\n")
    return answer


async def a_part() -> asyncio.subprocess.Process:
    name_and_wait = "import time; open('/proc/self/comm', 'w').write('VLLM::Worker'); time.sleep(600)"
    return await asyncio.create_subprocess_exec(sys.executable, "-c", name_and_wait)


async def serve(weights: Path, host: str, port: int, behaviour: str) -> None:
    part = await a_part() if behaviour == "has-a-part" else None
    counts = {"running": 0, "generated": 0, "prompt": 0}
    hold = asyncio.Event()
    ended = asyncio.Event()

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def metrics(_: web.Request) -> web.Response:
        label = f'{{engine="0",model_name="{weights.name}"}}'
        return web.Response(
            text=f"vllm:num_requests_running{label} {counts['running']}.0\nvllm:num_requests_waiting{label} 0.0\n"
            f"vllm:generation_tokens_total{label} {counts['generated']}.0\n"
            f"vllm:prompt_tokens_total{label} {counts['prompt']}.0\n"
        )

    async def complete(request: web.Request) -> web.StreamResponse:
        if behaviour == "dies-on-request":
            os._exit(1)
        body = await request.json()
        counts["running"] += 1
        try:
            if body.get("stream"):
                return await stream(request, counts, body["max_tokens"], body.get("every_s", 0.1))
            if body.get("hold"):  # in flight until /release
                await hold.wait()
            counts["generated"] += 1
            counts["prompt"] += 1
        finally:
            counts["running"] -= 1
        return web.json_response({"weights": weights.name, "usage": {"completion_tokens": 1}})

    async def release(_: web.Request) -> web.Response:
        hold.set()
        return web.Response()

    application = web.Application()
    application.add_routes(
        [
            web.get("/health", health),
            web.get("/metrics", metrics),
            web.post("/release", release),
            web.post("/v1/completions", complete),
            web.post("/v1/chat/completions", complete),
        ]
    )
    runner = web.AppRunner(application, shutdown_timeout=30)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    if part:
        part.kill()
    await runner.cleanup()


main()
