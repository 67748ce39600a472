"""TF_CONFIG as schedulers write it, and what cannot be used of it."""

import json

import pytest

from mpscale.core.cluster import Address, BadCluster, Cluster


def text(cluster, kind="worker", index=0):
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    ("told", "workers", "place", "listens"),
    [
        (text({"worker": ["a:2222", "b:2222"]}), ("a:2222", "b:2222"), 0, "a:2223"),
        (text({"worker": ["a:2222", "b:2222"]}, index=1), ("a:2222", "b:2222"), 1, "a:2223"),
        (text({"worker": ["b:1", "c:1"], "chief": ["a:9"]}), ("a:9", "b:1", "c:1"), 1, "a:10"),
        (text({"worker": ["b:1"], "chief": ["a:9"]}, "chief"), ("a:9", "b:1"), 0, "a:10"),
        (text({"chief": ["a:9"]}, "chief", "0"), ("a:9",), 0, "a:10"),
        (text({"worker": ["[fe80::1]:70", "n.svc.local:70"]}), ("[fe80::1]:70", "n.svc.local:70"), 0, "[fe80::1]:71"),
    ],
)
def test_the_workers_and_which_one_this_is(told, workers, place, listens):
    found = Cluster.of({"TF_CONFIG": told})
    assert (found.workers, found.place, found.text) == (workers, place, told)
    assert found.leads == (place == 0)
    assert str(found.coordinator()) == listens
    assert found.name(1) == f"worker 2 of {len(workers)}"


@pytest.mark.parametrize("environ", [{}, {"TF_CONFIG": ""}, {"TF_CONFIG": " \n"}])
def test_without_a_cluster_there_is_none(environ):
    assert Cluster.of(environ) is None


BAD = {
    "no JSON": ("{'cluster': 1}", "is no JSON"),
    "nested too deep": ("[" * 100_000, "is no JSON"),
    "no object": ("[1]", "names no cluster"),
    "no cluster": ("{}", "names no cluster"),
    "an empty cluster": (text({}), "names no cluster"),
    "no worker": (text({"worker": []}), "has no worker"),
    "no list": (text({"worker": "a:1"}), "no list"),
    "no port": (text({"worker": ["a", "b:1"]}), "'a' is no HOST:PORT"),
    "a number": (text({"worker": [2222]}), "2222 is no HOST:PORT"),
    "a port out of bounds": (text({"worker": ["a:65536"]}), "'a:65536' is no HOST:PORT"),
    "an address twice": (text({"worker": ["a:1", "a:1"]}), "same address"),
    "several chiefs": (text({"chief": ["a:1", "b:1"]}, "chief"), "several chiefs"),
    "no task": (json.dumps({"cluster": {"worker": ["a:1"]}}), "no type and index"),
    "a task that is none": (json.dumps({"cluster": {"worker": ["a:1"]}, "task": [0]}), "no type and index"),
    "an index that is none": (text({"worker": ["a:1"]}, index=True), "no type and index"),
    "a task outside": (text({"worker": ["a:1"]}, index=1), "'worker' 1, is not in its cluster"),
    "a chief outside": (text({"worker": ["a:1"]}, "chief"), "'chief' 0, is not in its cluster"),
    "a parameter server": (text({"worker": ["a:1"], "ps": ["b:1"]}), "'ps'"),
    "an evaluator": (text({"worker": ["a:1"]}, "evaluator"), "'evaluator'"),
}


@pytest.mark.parametrize("way", BAD)
def test_what_cannot_be_used_is_said_with_what_is_expected(way):
    told, said = BAD[way]
    with pytest.raises(BadCluster) as raised:
        Cluster.of({"TF_CONFIG": told})
    assert said in str(raised.value)
    assert '{"cluster": {"worker": ["node1:2222"' in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "address", ["a", ":1", "a:", "a:0", "a:65536", "a:-1", "a: 1", "a b:1", "::1:80", "a:1:2", "a:\uff11"]
)
def test_an_address_that_is_none(address):
    with pytest.raises(ValueError, match="is no HOST:PORT"):
        Address.parse(address)


def test_after_the_last_port_there_is_none():
    with pytest.raises(BadCluster, match="--mp-coordinator"):
        Cluster.of({"TF_CONFIG": text({"worker": ["a:65535"]})}).coordinator()
