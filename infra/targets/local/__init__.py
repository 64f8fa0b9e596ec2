"""The `local` target: machines are folders, and a process manager in each runs what production runs under systemd."""
