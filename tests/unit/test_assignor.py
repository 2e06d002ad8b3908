"""The assignor: all partitions, each once, those of a number together, balanced, and few of them moved."""

from itertools import pairwise, permutations, product
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from hypothesis import given
from hypothesis import strategies as st

from app.assignor import Shares, StickyAssignor, TopicUnknown, assign

MEMBERS = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)
TOPICS = st.dictionaries(st.sampled_from(["cards", "terminals", "labels", "logins"]), st.integers(1, 12))


@st.composite
def groups(draw: st.DrawFn) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Members with whatever they say that they own, in conflict and out of range too, and topics."""
    numbers = st.lists(st.integers(0, 14))
    return {member: draw(numbers) for member in draw(MEMBERS)}, draw(TOPICS)


def numbers_of(share: dict[str, list[int]]) -> set[int]:
    return {n for partitions in share.values() for n in partitions}


def owned_after(shares: Shares) -> dict[str, set[int]]:
    return {member: numbers_of(share) for member, share in shares.items()}


@given(groups())
def test_each_partition_has_one_owner(group: tuple[dict[str, list[int]], dict[str, int]]) -> None:
    owned, topics = group
    shares = assign(owned, topics)
    assert set(shares) == set(owned)
    given_out = sorted((t, p) for share in shares.values() for t, ps in share.items() for p in ps)
    assert given_out == sorted((t, p) for t, count in topics.items() for p in range(count))


@given(groups())
def test_partitions_of_a_number_are_together(group: tuple[dict[str, list[int]], dict[str, int]]) -> None:
    owned, topics = group
    for share in assign(owned, topics).values():
        numbers = numbers_of(share)
        assert share == {t: [n for n in sorted(numbers) if n < count] for t, count in topics.items()}


@given(groups())
def test_it_is_balanced(group: tuple[dict[str, list[int]], dict[str, int]]) -> None:
    owned, topics = group
    shares = assign(owned, topics)
    bounds = [0, *sorted(set(topics.values()))]
    kinds = [range(0, 15), *(range(a, b) for a, b in pairwise(bounds))]
    for kind in kinds:  # in all, and of the numbers that the same topics have
        counts = [len(numbers.intersection(kind)) for numbers in owned_after(shares).values()]
        assert max(counts) - min(counts) <= 1


@given(groups(), st.randoms())
def test_order_makes_no_difference_and_a_second_time_moves_nothing(
    group: tuple[dict[str, list[int]], dict[str, int]], random: Any
) -> None:
    owned, topics = group
    shares = assign(owned, topics)
    assert assign(dict(random.sample(sorted(owned.items()), len(owned))), topics) == shares
    assert assign({m: sorted(ns, reverse=True) for m, ns in owned_after(shares).items()}, topics) == shares


@given(st.data())
def test_no_balanced_assignment_moves_less(data: st.DataObject) -> None:
    """Against all that there are, for topics of equal partition counts."""
    count, members = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    owner = data.draw(st.lists(st.integers(-1, members - 1), min_size=count, max_size=count))  # -1: of none
    owned = {str(m): [n for n in range(count) if owner[n] == m] for m in range(members)}
    new = {
        int(m): numbers for m, numbers in owned_after(assign(owned, {"log": count, "labels": count})).items()
    }
    moved = sum(owner[n] != m for m, numbers in new.items() for n in numbers)
    quotas = [count // members + (m < count % members) for m in range(members)]
    least = min(
        sum(a != b for a, b in zip(owner, choice, strict=True))
        for choice in product(range(members), repeat=count)
        if sorted(choice.count(m) for m in range(members)) == sorted(quotas)
    )
    assert moved == least


def test_members_come_and_go() -> None:
    topics = {"cards": 8, "labels": 8}
    one = owned_after(assign({"a": []}, topics))
    two = owned_after(assign({**one, "b": set()}, topics))
    three = owned_after(assign({**two, "c": set()}, topics))
    assert [len(n) for n in three.values()] == [3, 3, 2]
    assert two["a"] >= three["a"]
    assert two["b"] >= three["b"]
    left = owned_after(assign({m: n for m, n in three.items() if m != "b"}, topics))
    assert left["a"] > three["a"]
    assert left["c"] > three["c"]
    assert assign({}, topics) == {}


class Group:
    """Members that join, one of which leads, as a broker would bring them together."""

    def __init__(self, **topics: int) -> None:
        self.topics = topics

    def rebalance(self, members: dict[str, StickyAssignor], leader: str) -> dict[str, set[int]]:
        cluster = SimpleNamespace(partitions_for_topic=lambda t: set(range(self.topics.get(t, 0))) or None)
        said = {
            member: ConsumerProtocolMemberMetadata.decode(assignor.metadata({"cards", "labels"}).encode())
            for member, assignor in members.items()
        }
        assignments = members[leader].assign(cluster, said)
        for member, assignor in members.items():
            assignor.on_assignment(assignments[member])
        return {m: {tp.partition for tp in a.partitions()} for m, a in assignments.items()}


@pytest.mark.parametrize("leader", ["a-1", "b-1"])
def test_owners_keep_their_numbers_whoever_leads(leader: str) -> None:
    group, members = Group(cards=5, labels=3), {"a-1": StickyAssignor(), "b-1": StickyAssignor()}
    alone = group.rebalance({"b-1": members["b-1"]}, "b-1")
    both = group.rebalance(members, leader)
    assert both["b-1"] < alone["b-1"]
    assert both == group.rebalance(members, "b-1") == group.rebalance(members, "a-1")


@pytest.mark.parametrize("names", list(permutations(["a", "b", "c"])))
def test_a_static_member_keeps_its_numbers_under_a_new_id(names: tuple[str, str, str]) -> None:
    group = Group(cards=9, labels=9)
    x, y, z = names
    members = {name + "-1": StickyAssignor(name) for name in names}
    before = group.rebalance(members, x + "-1")
    back = {x + "-1": members[x + "-1"], y + "-2": StickyAssignor(y), z + "-1": members[z + "-1"]}
    assert group.rebalance(back, z + "-1")[y + "-2"] == before[y + "-1"]


def test_what_a_member_owned_before_it_was_away_counts_for_nothing() -> None:
    group = Group(cards=6, labels=6)
    members = {name: StickyAssignor() for name in "abc"}
    group.rebalance(members, "a")
    away = members.pop("a")
    without = group.rebalance(members, "b")
    assert {len(n) for n in without.values()} == {3}
    again = group.rebalance({**members, "a": away}, "a")
    assert again["b"] < without["b"]
    assert again["c"] < without["c"]


def test_a_topic_that_the_leader_does_not_know_is_told() -> None:
    with pytest.raises(TopicUnknown, match="no topic labels"):
        Group(cards=4).rebalance({"a": StickyAssignor()}, "a")
