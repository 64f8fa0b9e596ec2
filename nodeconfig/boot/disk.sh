#!/bin/sh
# Mount what is not the root volume; every boot, as instance store is empty after a stop. Nothing with data is formatted.
#   instance store  -> /var/lib/fleet/weights       (several disks: one stripe)
#   data volume     -> /var/lib/fleet/machine/data
set -eu
weights=/var/lib/fleet/weights
data=/var/lib/fleet/machine/data
mkdir -p "$weights" "$data"

# A disk or array gets a file system if it has nothing at all on it, and is mounted.
mount_at() {
    mountpoint -q "$2" && return
    [ -n "$(blkid -p -o value -s TYPE "$1" || true)" ] || mkfs.ext4 -q -m 0 -E lazy_itable_init=1,nodiscard "$1"
    mount -o noatime "$1" "$2"
    echo "$1 is on $2"
}

stores=$(find /dev/disk/by-id -name 'nvme-Amazon_EC2_NVMe_Instance_Storage_*' ! -name '*-part*' -exec readlink -f {} + 2>/dev/null | sort -u)
# Amazon's Deep Learning images have joined and mounted it already, here.
theirs=/opt/dlami/nvme
if mountpoint -q "$theirs"; then
    mkdir -p "$theirs/fleet"
    mountpoint -q "$weights" || mount --bind "$theirs/fleet" "$weights"
    stores=
fi
count=$(printf '%s' "$stores" | grep -c . || true)
if [ "$count" -gt 1 ]; then
    array=/dev/md/fleet
    # shellcheck disable=SC2086  # a list of devices
    [ -e "$array" ] || mdadm --assemble "$array" $stores 2>/dev/null ||
        mdadm --create "$array" --level=0 --raid-devices="$count" --run $stores
    mount_at "$array" "$weights"
elif [ "$count" = 1 ]; then
    mount_at "$stores" "$weights"
fi

# What EC2 calls /dev/sdf, Nitro shows by the volume's own id: the one EBS disk that is neither root nor in use.
if [ -n "${FLEET_DATA_VOLUME:-}" ]; then
    root=$(lsblk -no PKNAME "$(findmnt -no SOURCE /)" | head -n 1)
    for try in $(seq 60); do
        disk=$(lsblk -dno NAME,MODEL | awk '/Amazon Elastic Block Store/ {print $1}' | grep -vx "$root" | head -n 1 || true)
        [ -z "$disk" ] || break
        echo "waiting for volume $FLEET_DATA_VOLUME ($try)"
        sleep 5
    done
    [ -n "$disk" ] || { echo "volume $FLEET_DATA_VOLUME is not attached" >&2; exit 1; }
    mount_at "/dev/$disk" "$data"
fi
