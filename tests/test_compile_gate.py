"""Every config that ships, compiled for Hopper, keeps to the bounds its table states.

The other targets take minutes: ``make compile-report`` compiles for all of them, and fails where a bound is broken.
"""

import pytest

from tests.support import compile_gate

HOPPER = compile_gate.jobs(["cuda:90"])


@pytest.fixture(scope="module")
def compiled():
    return compile_gate.run(["cuda:90"])


@pytest.mark.parametrize("job", HOPPER, ids=" ".join)
def test_machine_code(compiled, job):
    assert compiled[job]["violations"] == []
