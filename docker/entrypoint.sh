#!/usr/bin/env bash
# The image's entry point: overrides (model.path=..., +experiment=..., --help) go to launch/train.sh, all else is a
# command of its own (qdora merge ..., bash).
set -euo pipefail

case "${1:-}" in
    *=* | [-+~]*) exec /qdora/launch/train.sh "$@" ;;
esac
if ! command -v "${1:-}" >/dev/null; then
    echo "qdora: the image has no command '${1:-}': give overrides of qdora train (model.path=... data.train=...), or a command (qdora merge ..., bash)" >&2
    exit 127
fi
exec "$@"
