import itertools

import pytest

from minilm_jax.data.machine_docs import machine_documents


@pytest.fixture(scope="module")
def documents():
    return list(machine_documents())


def test_there_is_enough_text_for_a_first_run_and_the_order_is_fixed(documents):
    assert sum(len(d.text) for d in documents) >= 1_500_000
    assert documents[:200] == list(itertools.islice(machine_documents(), 200))


def test_documents_are_prose_with_a_name_of_their_own(documents):
    origins = [d.origin for d in documents]
    assert len(set(origins)) == len(origins)
    assert "python-docstring:argparse.ArgumentParser" in origins
    assert not any(".test." in o or "site-packages" in o for o in origins)
    assert all(d.text.strip() and d.language == "en" for d in documents)
