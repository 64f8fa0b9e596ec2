import json
from conftest import *
def test_a(fleet):
    r=fleet.ask()
    print(r.status_code, r.headers, r.text)
    for e in fleet.engines.values():
        for s in e.seen: print(s)
    print(fleet.agent.headers[-1], fleet.gateway.servers())
    print(fleet.gateway.log_text())
    for s in fleet.gateway.requests(): print(s)
