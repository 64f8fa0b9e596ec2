"""FleetPlan to the files that machines run. Pure: the same plan and layout give the same bytes."""
