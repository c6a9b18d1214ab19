#!/usr/bin/env bash
# One run on every host of a Cloud TPU VM slice.
#
#   experiments/launch/tpu_vm.sh NAME ZONE experiments/minilm_v2/bert_base_6x384.py [option …]
#
# The repository and its environment (pip install -e '.[tpu]') are at ~/minilm_jax on every host;
# corpora and --output lie on storage that all hosts share. Started again after a preemption, the run
# continues. Written after Google's and JAX's documentation; not yet run on a slice.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,8p' "$0" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
arguments=$(printf ' %q' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
    "cd ~/minilm_jax && .venv/bin/minilm-jax distill$arguments --train.hosts.start auto"
