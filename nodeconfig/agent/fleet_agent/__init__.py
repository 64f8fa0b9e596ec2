"""The node agent: what a machine of the fleet runs beside its engines. Reads one JSON file; knows nothing of Pulumi."""
