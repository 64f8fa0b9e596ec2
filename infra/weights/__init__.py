"""Weights: what `stacks/models.lock.yaml` promises, where it comes from, and this machine's cache of it."""
