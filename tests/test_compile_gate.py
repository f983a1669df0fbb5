"""Every shipped config of every kernel, compiled for four targets, keeps to the bounds its table states."""

import pytest

from tests.support import compile_gate


@pytest.fixture(scope="module")
def compiled():
    return compile_gate.run()


@pytest.mark.parametrize("job", compile_gate.jobs(), ids=" ".join)
def test_machine_code(compiled, job):
    assert compiled[job]["violations"] == []
