"""A short coverage-guided run over every reader; docs/conversion.md tells of the long one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

_FUZZ = Path(__file__).parents[2] / "fuzz"


@pytest.mark.parametrize("reader", sorted(p.name for p in (_FUZZ / "corpus").iterdir()))
def test_corpus_and_a_few_thousand_mutations_of_it(reader, tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has no wheel for this Python or platform)")
    command = [sys.executable, str(_FUZZ / "fuzz_readers.py"), reader, str(tmp_path)]
    options = [
        "-runs=5000",
        "-max_total_time=20",
        # Its own limit reads the peak memory that a process inherits from the one that started it,
        # here all the tests before; the shell's limit below is this process's alone.
        "-rss_limit_mb=0",
        f"-artifact_prefix={tmp_path}/",
    ]
    done = subprocess.run(
        [
            "sh",
            "-c",
            'ulimit -v 4194304; exec "$@"',
            "sh",
            *command,
            str(_FUZZ / "corpus" / reader),
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
