"""vllm-fleet: one typed stack config, one OpenAI-compatible endpoint."""
