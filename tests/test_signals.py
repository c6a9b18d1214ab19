"""A signal ends a job, whatever it was at and whoever catches what the signal raised."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from minilm_jax.signals import Stopped, stoppable


def send():
    os.kill(os.getpid(), signal.SIGINT)


def job(interrupted):
    with stoppable("the rest is left"):
        interrupted()
        time.sleep(20)
        raise AssertionError("nothing ended the job")


def as_another_error():
    try:
        send()
        time.sleep(1)
    except BaseException as error:
        raise ImportError("a library that makes an error of its own of everything") from error


def while_garbage_is_collected():
    """JAX has such a callback; what is raised there Python prints and ignores."""

    def callback(phase, info):
        if phase == "stop" and callback in gc.callbacks:
            gc.callbacks.remove(callback)
            send()
            time.sleep(1)

    gc.callbacks.append(callback)
    gc.collect()


@pytest.mark.parametrize("interrupted", [send, as_another_error, while_garbage_is_collected])
def test_the_first_signal_ends_the_job(interrupted):
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    began = time.monotonic()
    with pytest.raises(Stopped, match=r"^stopped by SIGINT; the rest is left$") as stopped:
        job(interrupted)
    assert stopped.value.signum == signal.SIGINT
    assert time.monotonic() - began < 10
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_errors_without_a_signal_stay_what_they_are():
    with pytest.raises(ImportError, match="missing"), stoppable():
        raise ImportError("missing")


@pytest.mark.parametrize("command", ["distill", "plan"])
def test_an_interrupt_before_the_job_has_begun_ends_the_process_at_once(command, tmp_path):
    experiment = tmp_path / "mine.py"
    experiment.write_text("import os, signal\n\nos.kill(os.getpid(), signal.SIGINT)\n")
    # A shell has what it starts in the background ignore SIGINT, these tests too.
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from minilm_jax.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [sys.executable, "-c", program, command, str(experiment)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "")
