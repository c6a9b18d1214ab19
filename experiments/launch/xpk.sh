#!/usr/bin/env bash
# One run as a job on a GKE cluster with TPUs, with XPK (github.com/AI-Hypercomputer/xpk).
#
#   experiments/launch/xpk.sh CLUSTER ZONE v5litepod-256 IMAGE experiments/… [option …]
#
# IMAGE must hold the repository and its environment at /minilm_jax; corpora and --output must be on
# storage that all pods mount. It follows XPK's documentation and has not been run on a cluster yet.
set -euo pipefail
if [ $# -lt 5 ]; then
    sed -n '2,7p' "$0" >&2
    exit 2
fi
cluster=$1 zone=$2 slice=$3 image=$4
shift 4
arguments=$(printf ' %q' "$@")
exec xpk workload create --workload "minilm-jax-$(date +%m%d-%H%M)" \
    --cluster "$cluster" --zone "$zone" --tpu-type "$slice" --docker-image "$image" \
    --max-restarts 100 --command \
    "cd /minilm_jax && .venv/bin/minilm-jax distill$arguments --train.hosts.start auto"
