from tests.render.conftest import *
from tests.render.test_gateway_api import *
def test_p(start_fleet):
    fleet = start_fleet(["chat", "embed"], 1, timings={"request_s": 1})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
    for close in (b"",b"Connection: close\r\n"):
        s=socket.create_connection(("127.0.0.1", fleet.gateway.plan.gateway.port), timeout=5)
        s.sendall(head+close+b"Content-Length: 9\r\n\r\n{")
        print(close, s.recv(65536))
        try: print(s.recv(65536))
        except Exception as e: print(repr(e))
    for r in (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", *(f"{m} {p} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode() for p in HOSTILE for m in ("GET","POST"))):
        s=socket.create_connection(("127.0.0.1", fleet.gateway.plan.gateway.port), timeout=5)
        s.sendall(r)
        b=b""
        try:
            while c:=s.recv(65536): b+=c
        except Exception as e: b+=repr(e).encode()
        if b"404 Not" not in b: print(r[:60],b[:200])
    print(fleet.gateway.log_text()[-3000:])
