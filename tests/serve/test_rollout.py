"""Who takes the traffic, from what the registry and the replicas say. Time is a number here."""

import pytest

from rayclip.serve.versions.rollout import Rollout
from rayclip.serve.versions.routing_table import ModelInfo, ReplicaReport, VersionSource

INFO = ModelInfo(embed_dim=16, image_size=16, logit_scale=14.0)


def source(version):
    return VersionSource(f"models:/{version}", f"/models/{version}")


def report(name, kind, *loaded, failed=None):
    return ReplicaReport(name, kind, dict.fromkeys(loaded, INFO), failed or {})


@pytest.fixture
def rollout():
    rollout = Rollout({"champion": 1.0, "canary": 0.0}, fresh_s=5, retire_s=30)
    rollout.want("champion", "m/1", source("m/1"))
    return rollout


def all_have(rollout, now, *versions):
    rollout.hear(report("i1", "image", *versions), now)
    rollout.hear(report("t1", "text", *versions), now)


def test_the_first_version_is_active_at_once(rollout):
    assert rollout.table().traffic == {"m/1": 1.0}
    assert rollout.table().sources == {"m/1": source("m/1")}


def test_a_new_version_waits_until_every_replica_has_it(rollout):
    all_have(rollout, 0, "m/1")
    rollout.want("champion", "m/2", source("m/2"))
    assert set(rollout.table().sources) == {"m/1", "m/2"}
    assert rollout.state("m/2") == "loading"
    rollout.hear(report("i1", "image", "m/1", "m/2"), 1)
    rollout.hear(report("i2", "image", "m/1"), 1)
    rollout.hear(report("t1", "text", "m/1", "m/2"), 1)
    assert rollout.advance(1) == []
    assert rollout.table().traffic == {"m/1": 1.0}
    rollout.hear(report("i2", "image", "m/1", "m/2"), 2)
    assert rollout.advance(2) == [("champion", "m/1", "m/2")]
    assert rollout.table().traffic == {"m/2": 1.0}
    assert rollout.state("m/1") == "retiring"


def test_a_replaced_version_stays_loaded_for_a_while(rollout):
    rollout.want("champion", "m/2", source("m/2"))
    all_have(rollout, 0, "m/1", "m/2")
    rollout.advance(0)
    rollout.advance(29)
    assert set(rollout.table().sources) == {"m/1", "m/2"}
    rollout.advance(30)
    assert set(rollout.table().sources) == {"m/2"}


def test_a_dead_replica_holds_nothing_up(rollout):
    all_have(rollout, 0, "m/1")
    rollout.want("champion", "m/2", source("m/2"))
    rollout.hear(report("i2", "image", "m/1", "m/2"), 4)
    rollout.hear(report("t1", "text", "m/1", "m/2"), 4)
    assert rollout.advance(4) == []
    assert rollout.advance(6) == [("champion", "m/1", "m/2")]  # i1 has not been heard of since 0


def test_without_a_tower_nothing_is_swapped(rollout):
    rollout.want("champion", "m/2", source("m/2"))
    rollout.hear(report("i1", "image", "m/1", "m/2"), 0)
    assert rollout.advance(0) == []


def test_a_version_that_cannot_be_loaded_never_takes_over(rollout):
    rollout.want("champion", "m/2", source("m/2"))
    rollout.hear(report("i1", "image", "m/1", failed={"m/2": "damaged"}), 0)
    rollout.hear(report("t1", "text", "m/1", "m/2"), 0)
    assert rollout.advance(0) == []
    assert rollout.state("m/2") == "failed"
    assert rollout.failure("m/2") == "damaged"
    assert rollout.table().traffic == {"m/1": 1.0}


def test_back_to_the_former_version_before_it_is_gone(rollout):
    rollout.want("champion", "m/2", source("m/2"))
    all_have(rollout, 0, "m/1", "m/2")
    rollout.advance(0)
    rollout.want("champion", "m/1", source("m/1"))
    assert rollout.advance(1) == [("champion", "m/2", "m/1")]
    all_have(rollout, 35, "m/1")
    rollout.advance(35)
    assert set(rollout.table().sources) == {"m/1"}  # m/2 was replaced at 1


def test_an_alias_that_moves_on_before_the_swap_drops_what_was_between(rollout):
    all_have(rollout, 0, "m/1")
    rollout.want("champion", "m/2", source("m/2"))
    rollout.want("champion", "m/3", source("m/3"))
    rollout.advance(0)
    all_have(rollout, 31, "m/1", "m/3")
    assert rollout.advance(31) == [("champion", "m/1", "m/3")]
    assert set(rollout.table().sources) == {"m/1", "m/3"}


def test_a_canary_has_its_share_and_adds_up_with_a_champion_of_the_same_version():
    rollout = Rollout({"champion": 0.9, "canary": 0.1}, fresh_s=5, retire_s=30)
    rollout.want("champion", "m/1", source("m/1"))
    rollout.want("canary", "m/2", source("m/2"))
    assert rollout.table().traffic == {"m/1": 0.9, "m/2": 0.1}
    rollout.want("champion", "m/2", source("m/2"))
    all_have(rollout, 0, "m/1", "m/2")
    rollout.advance(0)
    assert rollout.table().traffic == {"m/2": pytest.approx(1.0)}
