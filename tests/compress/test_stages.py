"""Stages of a job add up to the whole."""

from tensormill.compress.stages import Stages


def test_shares_add_up():
    found = []
    stages = Stages(lambda message, share: found.append((message, share)), read=1, write=3)
    stages.enter("read", "reading")
    stages("reading", 1.0)
    stages.enter("write", "writing", 1, 3)
    stages("writing", None)
    stages("writing", 1.0)
    stages.done()
    assert found == [
        ("reading", 0.0), ("reading", 0.25), ("writing", 0.5), ("writing", None), ("writing", 0.75), ("done", 1.0)
    ]  # fmt: skip


def test_nobody_needs_to_listen():
    stages = Stages(None, all=1)
    stages.enter("all", "x")
    stages("x", 0.5)
    stages.done()
