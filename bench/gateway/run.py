"""The same as `python -m bench.gateway`, by path: python bench/gateway/run.py [--quick]."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
runpy.run_module("bench.gateway", run_name="__main__", alter_sys=True)
