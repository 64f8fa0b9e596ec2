"""The target `aws`: a plan as resources of pulumi-aws. Their number grows with pools, never with nodes."""
