#!/usr/bin/env bash
# docker/build.sh [options of the engine's build]: builds the image, by docker, podman or buildah, whichever works here.
# IMAGE=NAME names it (qdora), BASE=NAME builds on another base than the Dockerfile's, ENGINE=... chooses the engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

engine="${ENGINE:-}"
for candidate in docker podman buildah; do
    # `info` of docker fails where there is a client and no engine.
    [[ -n "$engine" ]] || ! "$candidate" info >/dev/null 2>&1 || engine="$candidate"
done
if [[ -z "$engine" ]]; then
    echo "qdora: no docker, podman or buildah works here: install one, or start docker's engine" >&2
    exit 2
fi

pin() { sed -n "s/^$1==//p" constraints.txt; }
arguments=(
    --file docker/Dockerfile
    --tag "${IMAGE:-qdora}"
    --build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)"
    --build-arg "REVISION=$(git describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown)"
    --build-arg "TORCH_VERSION=$(pin torch)"
    --build-arg "BITSANDBYTES_VERSION=$(pin bitsandbytes)"
)
[[ -z "${BASE:-}" ]] || arguments+=(--build-arg "BASE=$BASE")
# OCI's own format has no health check.
[[ "$engine" == docker ]] || arguments+=(--format docker)
exec "$engine" build "${arguments[@]}" "$@" .
