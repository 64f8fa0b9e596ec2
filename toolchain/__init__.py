"""How a fresh machine gets the tools: pulumi, haproxy, prometheus, the engine.

Commands: `python -m toolchain --help`.
"""
