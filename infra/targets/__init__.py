"""Where a plan becomes machines. A target's SDK is imported only by the target that needs it."""
