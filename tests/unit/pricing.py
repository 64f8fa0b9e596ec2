"""A small AWS on loopback: the pricing API's GetProducts, as boto3 asks for it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

PAGE = 2
"""Products in one answer; the rest is on the next page."""


def product(price: str, unit: str = "Hrs", **attributes: str) -> dict[str, Any]:
    """One product as the price list describes it, with the term that it is sold on."""
    return {
        "product": {"productFamily": "Compute Instance", "sku": "ABC", "attributes": attributes},
        "serviceCode": "AmazonEC2",
        "terms": {
            "OnDemand": {
                "ABC.JRTCKXETXF": {
                    "priceDimensions": {
                        "ABC.JRTCKXETXF.6YS6EN2CT7": {"unit": unit, "pricePerUnit": {"USD": price}},
                    },
                },
            },
        },
        "version": "20261101",
    }


class Pricing:
    """Knows one on-demand price for each type and region, and what else is asked of it."""

    def __init__(self) -> None:
        self.prices: dict[tuple[str, str], str] = {}
        self.more: dict[str, list[dict[str, Any]]] = {}
        """Further products, by instance type: they come first."""
        self.fail: tuple[int, str] | None = None
        """Answer this status and error code instead."""
        self.asked: list[dict[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One page of the products that all filters let through."""
        filters = {each["Field"]: each["Value"] for each in request["Filters"]}
        start = int(request.get("NextToken", 0))
        if not start:
            self.asked.append(filters)
        name, region = filters["instanceType"], filters["regionCode"]
        found = list(self.more.get(name, ()))
        if price := self.prices.get((name, region)):
            found.append(product(price, **filters))
        body: dict[str, Any] = {"FormatVersion": "aws_v1"}
        body["PriceList"] = [json.dumps(each) for each in found[start : start + PAGE]]
        if found[start + PAGE :]:
            body["NextToken"] = str(start + PAGE)
        return body

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        pricing = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                assert self.headers["X-Amz-Target"] == "AWSPriceListService.GetProducts"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert request["ServiceCode"] == "AmazonEC2"
                status, body = 200, pricing.answer(request)
                if pricing.fail:
                    status, body = pricing.fail[0], {"__type": pricing.fail[1], "message": "no"}
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
