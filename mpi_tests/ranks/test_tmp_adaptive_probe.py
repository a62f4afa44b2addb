import pytest
from .test_adaptive import Training, lgreco, BASES, assert_equal
@pytest.mark.parametrize("kind", ["plain", "adaptive"])
def test_probe(job, kind):
    make = BASES["powersgd"] if kind == "plain" else lgreco("powersgd")
    a, b = Training(job, make), Training(job, make)
    for t in (a, b):
        for s in range(11): t.step(s)
    assert_equal(a.of, b.of)
