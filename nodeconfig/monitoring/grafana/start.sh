#!/bin/sh
# Start Grafana, whatever it is called and wherever its package put its files. $1: the program.
set -eu
program=$1
prefix=$(dirname "$(dirname "$program")")

# An archive keeps everything beside bin/, Homebrew in share/, distribution packages in /usr/share.
for home in "$prefix" "$prefix/share/grafana" /usr/share/grafana ''; do
    [ -f "$home/conf/defaults.ini" ] && break
done
if [ -z "$home" ]; then
    echo "Grafana's home (the folder with conf/defaults.ini) is not beside $program: reinstall Grafana, or take it off PATH" >&2
    exit 1
fi

export GF_PATHS_DATA="$PWD/data/grafana" GF_PATHS_LOGS="$PWD/data/grafana/log" GF_PATHS_PLUGINS="$PWD/data/grafana/plugins"
export GF_PATHS_PROVISIONING="$PWD/slots/grafana/provisioning" FLEET_DASHBOARDS="$PWD/slots/grafana/dashboards"
case $program in
    *-server) set -- ;;
    *) set -- server ;;
esac
exec "$program" "$@" --homepath "$home" --config "$PWD/slots/grafana/grafana.ini"
