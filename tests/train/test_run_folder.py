"""A run's folder: continued when it is ours, refused with the reason when it is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minilm_jax.errors import ConfigError, RestoreError
from minilm_jax.train.run_folder import CONFIG, METRICS, RESULT, check_run, open_run

CONFIG_A = {"steps": 10, "optimizer": {"learning_rate": 0.1, "b1": 0.9}, "layers": (1, 2)}


def test_a_new_folder_keeps_its_config_and_is_continued(tmp_path):
    folder = tmp_path / "deep" / "run"
    for _ in range(2):
        with open_run(folder, CONFIG_A):
            pass
    assert json.loads((folder / CONFIG).read_text())["layers"] == [1, 2]


def test_another_runs_folder_is_refused_with_every_difference(tmp_path, caplog):
    with open_run(tmp_path, CONFIG_A):
        (tmp_path / METRICS).write_text("{}\n")
    before = (tmp_path / CONFIG).read_text()
    other = {"steps": 20, "optimizer": {"learning_rate": 0.2, "b1": 0.9}, "layers": (1, 2)}
    with pytest.raises(ConfigError) as error, open_run(tmp_path, other):
        pass
    assert "steps: 10 -> 20" in str(error.value)
    assert "optimizer.learning_rate: 0.1 -> 0.2" in str(error.value)
    assert "b1" not in str(error.value)
    assert (tmp_path / CONFIG).read_text() == before
    with open_run(tmp_path, other, override=("steps", "optimizer")):
        pass
    accepted = [record.message for record in caplog.records]
    assert accepted == [
        "steps: 10 -> 20, as --override accepts",
        "optimizer.learning_rate: 0.1 -> 0.2, as --override accepts",
    ]
    assert json.loads((tmp_path / CONFIG).read_text())["steps"] == 20


def test_a_folder_may_be_named_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("teacher")
    run = tmp_path / "run"
    for source in ("teacher", str(tmp_path / "teacher"), "link"):
        with open_run(run, {"teacher": {"source": source}}):
            (run / METRICS).write_text("{}\n")
    for source in ("other", "none", "two\0lines"):
        with (
            pytest.raises(ConfigError, match=r'teacher\.source: "link" -> '),
            open_run(run, {"teacher": {"source": source}}),
        ):
            pass


def test_what_is_read_may_be_moved_and_not_changed(tmp_path):
    def described(source, fingerprint):
        where = {"teacher": {"source": source, "dtype": "a"}, "data": {"folder": source}}
        return {**where, "fingerprints": {"teacher": fingerprint}}

    with open_run(tmp_path, described("old", "f")):
        (tmp_path / METRICS).write_text("{}\n")
    check_run(tmp_path, described("new", "f"))
    with pytest.raises(ConfigError, match=r'source: "old" -> "new"(.|\n)*teacher: "f" -> "g"'):
        check_run(tmp_path, described("new", "g"))
    other = described("new", "f")
    other["teacher"]["dtype"] = "b"
    with pytest.raises(ConfigError, match=r'dtype: "a" -> "b"$'):
        check_run(tmp_path, other)


def test_settings_of_a_run_that_took_no_step_can_be_mended(tmp_path):
    """Out of memory in the first step, say, when the file of metrics is open already."""
    for steps in (10, 20):
        with open_run(tmp_path, {**CONFIG_A, "steps": steps}):
            (tmp_path / "metrics.jsonl").touch()
    assert json.loads((tmp_path / CONFIG).read_text())["steps"] == 20


def test_a_step_that_is_saved_was_taken_before_a_row_of_it_is_logged(tmp_path):
    with open_run(tmp_path, CONFIG_A):
        (tmp_path / METRICS).touch()
        (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    with pytest.raises(ConfigError, match="differs from this one"):
        check_run(tmp_path, {**CONFIG_A, "steps": 20})
    (tmp_path / "checkpoints" / "6").rename(tmp_path / "checkpoints" / "unreadable-6")
    check_run(tmp_path, {**CONFIG_A, "steps": 20})


def test_an_override_that_names_something_else_is_said(tmp_path):
    with open_run(tmp_path, CONFIG_A):
        (tmp_path / METRICS).write_text("{}\n")
    with (
        pytest.raises(
            ConfigError, match=r"override stpes is no setting of this run; did you mean 'steps'"
        ),
        open_run(tmp_path, {**CONFIG_A, "steps": 20}, override=("stpes",)),
    ):
        pass
    (tmp_path / "data.json").write_text('{"corpora": [], "mask": {"share": 0.15}}')
    check_run(tmp_path, CONFIG_A, override=("corpora", "mask.share", "optimizer"))
    # What is no part of a run may change, asked or unasked.
    check_run(tmp_path, CONFIG_A, override=("output", "train.devices", "train.hosts.heartbeat_s"))
    with pytest.raises(ConfigError, match=r"override text is no setting of .*config.json lists"):
        check_run(tmp_path, CONFIG_A, override=("text",))


def test_an_override_that_no_checkpoint_fits_leaves_the_run_as_it_was(tmp_path):
    with open_run(tmp_path / "run", {"a": 1}):
        (tmp_path / "run" / METRICS).write_text("{}\n")
    message = "no fit; .*config.json is as it was before --override a"
    with (
        pytest.raises(RestoreError, match=message),
        open_run(tmp_path / "run", {"a": 2}, override=("a",)),
    ):
        raise RestoreError("no fit")
    with open_run(tmp_path / "run", {"a": 1}):
        pass


def test_what_a_finished_run_was_can_not_be_overridden(tmp_path):
    with open_run(tmp_path, CONFIG_A):
        (tmp_path / METRICS).write_text("{}\n")
        (tmp_path / RESULT).touch()
    before = (tmp_path / CONFIG).read_text()
    other = {**CONFIG_A, "steps": 20}
    for override in ((), ("steps",)):
        with (
            pytest.raises(
                ConfigError, match=r"is finished.*remove its result.json(.|\n)*steps: 10 -> 20"
            ),
            open_run(tmp_path, other, override=override),
        ):
            pass
    assert (tmp_path / CONFIG).read_text() == before
    (tmp_path / RESULT).unlink()
    with open_run(tmp_path, other, override=("steps",)):
        pass


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run of minilm-jax"), open_run(tmp_path, CONFIG_A):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"), open_run(tmp_path / "thesis.tex", CONFIG_A):
        pass


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / CONFIG).write_text("{half")
    (tmp_path / METRICS).write_text("{}\n")
    with (
        pytest.raises(ConfigError, match=r"config\.json is damaged, .* copy it back"),
        open_run(tmp_path, CONFIG_A),
    ):
        pass


def test_two_processes_do_not_share_a_folder(tmp_path):
    code = (
        "import sys, pathlib; from minilm_jax.train.run_folder import open_run\n"
        "with open_run(pathlib.Path(sys.argv[1]), {}): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use"), open_run(tmp_path, {}):
            pass
        holder.stdin.close()
        holder.wait()
    with open_run(tmp_path, {}):
        pass


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    """A file where a folder should be, and a file system that nobody may write to."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        refused = pytest.raises(ConfigError, match=r"cannot be written to \(.*\); choose another")
        with refused, open_run(folder, CONFIG_A):
            pass


def test_other_versions_on_resume_are_told(tmp_path, caplog):
    for _ in range(2):
        with open_run(tmp_path, CONFIG_A):
            pass
    assert not caplog.records
    versions = tmp_path / "versions.json"
    now = json.loads(versions.read_text())
    for text in ("a", "b"):
        with open_run(tmp_path, CONFIG_A, code={"mine.py": text}):
            pass
    assert 'mine.py: "a" -> "b" since the last start of this run: its results' in caplog.text
    with open_run(tmp_path, CONFIG_A):
        pass
    caplog.clear()
    versions.write_text(json.dumps({**now, "jax": "0.4.1", "revision": "0123abc"}))
    with open_run(tmp_path, CONFIG_A):
        pass
    assert f'jax: "0.4.1" -> "{now["jax"]}"' in caplog.text
    assert 'revision: "0123abc" -> ' in caplog.text
    assert len(caplog.records) == 2
    assert json.loads(versions.read_text()) == now


def test_a_finished_runs_versions_stay_those_it_was_computed_with(tmp_path, caplog):
    with open_run(tmp_path, CONFIG_A):
        (tmp_path / METRICS).write_text("{}\n")
        (tmp_path / RESULT).touch()
    versions = tmp_path / "versions.json"
    versions.write_text(json.dumps({**json.loads(versions.read_text()), "jax": "0.4.1"}))
    with open_run(tmp_path, CONFIG_A):
        pass
    assert not caplog.records
    assert json.loads(versions.read_text())["jax"] == "0.4.1"


def test_a_models_folder_is_not_taken_for_a_run(tmp_path):
    """It has a config.json, which the run's would overwrite."""
    (tmp_path / CONFIG).write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="not a run of minilm-jax"), open_run(tmp_path, CONFIG_A):
        pass
    assert (tmp_path / CONFIG).read_text() == '{"model_type": "bert"}'
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
