#!/bin/sh
# Starts HAProxy with every engine out of rotation. By itself it would take an engine for ready until the first check
# said otherwise, and send it requests. A reload does not come by here: it carries the states over in the same file.
set -eu
cp slots/haproxy/servers.state run/haproxy.state
# Where several gateways count together, the machine may have found the others already.
if [ -e slots/haproxy/peers.cfg ] && [ ! -e run/peers.cfg ]; then cp slots/haproxy/peers.cfg run/peers.cfg; fi
exec "$@"
