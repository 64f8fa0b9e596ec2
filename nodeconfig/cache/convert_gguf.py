"""Dequantise a GGUF model to what vLLM loads: safetensors in bfloat16, tokeniser, chat template, configuration.

    python convert_gguf.py MODEL.gguf OUT_DIR

Runs in the engine's virtual environment (transformers, gguf, accelerate). The output is the same byte for byte each
time with the same versions, so models.lock.yaml can pin it: stamps of the version and of this machine are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

STAMPS = {
    "config.json": ("transformers_version", "_model_name_or_path"),
    "generation_config.json": ("transformers_version", "_from_model_config"),
    "tokenizer_config.json": ("is_local", "local_files_only"),
}
"""What transformers writes about itself and about the file it read, not about the model."""


def main(source: Path, out: Path) -> None:
    """Convert one file; says each stage on standard output."""
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    print("reading and dequantising", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    print("reading the tokeniser", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # GGUF has the limit in the model's part only; without it a tokeniser never warns of a prompt that is too long.
    tokenizer.model_max_length = model.config.max_position_embeddings
    print("writing", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, keys in STAMPS.items():
        path = out / name
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            content.pop(key, None)
        path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
