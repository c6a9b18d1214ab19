#!/usr/bin/env bash
# One run on every host of a Cloud TPU VM slice.
#
#   experiments/launch/tpu_vm.sh NAME ZONE experiments/minilm_v2/bert_base_6x384.py [option …]
#
# The repository and its environment (pip install -e '.[tpu]') must be at ~/minilm_jax on every host,
# corpora and --output on storage that all hosts share. After a preemption, start it again to continue.
# It follows the documentation of Google and JAX and has not been run on a slice yet.
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
