#!/usr/bin/env bash
# docker/debian_base.sh NAME: makes the image NAME, Debian 12 with nothing added, from Debian's packages alone: a BASE for
# docker/build.sh where no registry of images can be reached. Needs root, debootstrap and podman.
set -euo pipefail

name="${1:?give the name of the image to make}"
folder="$(mktemp -d)"
trap 'umount "$folder" && rmdir "$folder"' EXIT
mount -t tmpfs -o mode=755,size=2g tmpfs "$folder"  # dpkg waits for the disk after every package otherwise
debootstrap --variant=minbase --include=ca-certificates bookworm "$folder/root" "${MIRROR:-http://deb.debian.org/debian}"
rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/*
tar --create --directory "$folder/root" . | podman import --quiet - "$name"
