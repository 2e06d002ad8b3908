"""Who of a group holds which partitions: by number, so that the logs of one number stay together.

Partition 3 of every log that stages read, and of the labels, goes to one worker. Workers hold the same
count of numbers, give or take one, and as few numbers as possible move when workers come and go: a
number that moves is a store to be opened elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain, pairwise
from typing import Any

import msgspec
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import (
    ConsumerProtocolMemberAssignment,
    ConsumerProtocolMemberMetadata,
)

from models.errors import HeadraceError

NAME = "headrace-sticky-1"  # of the protocol: the members of a group must speak the same one
VERSION = 0  # of Kafka's frame around what members tell each other

Shares = dict[str, dict[str, list[int]]]  # partitions by topic, by member


def assign(owned: Mapping[str, Collection[int]], topics: Mapping[str, int]) -> Shares:
    """Share out all partitions of topics, given as counts, among members, given with what they own.

    The order of members and of what they own makes no difference.

    >>> assign({"a": [0, 1, 2, 3], "b": []}, {"cards": 4, "labels": 2})
    {'a': {'cards': [0, 2], 'labels': [0]}, 'b': {'cards': [1, 3], 'labels': [1]}}
    """
    held: dict[str, list[int]] = {member: [] for member in sorted(owned)}
    if not held:
        return {}
    # Numbers that the same topics have are alike; each kind is balanced for itself, and so is the whole.
    for first, end in pairwise([0, *sorted(set(topics.values()))]):
        for member, numbers in _balanced(range(first, end), owned, held).items():
            held[member] += numbers
    return {
        member: {topic: [n for n in numbers if n < count] for topic, count in sorted(topics.items())}
        for member, numbers in held.items()
    }


def _balanced(
    numbers: range, owned: Mapping[str, Collection[int]], held: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Share out numbers of one kind; held: of the kinds before, by member in order."""
    kept: dict[str, list[int]] = {}
    free = set(numbers)
    for member in held:  # what two claim is the first one's
        kept[member] = sorted(free.intersection(owned[member]))
        free.difference_update(kept[member])
    least, over = divmod(len(numbers), len(held))
    # One more goes to those who hold the least so far, and of these to those who would lose it.
    ranked = sorted(held, key=lambda member: (len(held[member]), -len(kept[member]), member))
    rooms = {member: least + (rank < over) for rank, member in enumerate(ranked)}
    for member, room in rooms.items():
        free.update(kept[member][room:])
        del kept[member][room:]
    spare = iter(sorted(free))
    for member, mine in kept.items():
        mine.extend(next(spare) for _ in range(rooms[member] - len(mine)))
        mine.sort()
    return kept


class TopicUnknown(HeadraceError):
    """A topic that the group reads is not there: nobody would be given its partitions."""

    def __init__(self, topic: str) -> None:
        super().__init__(
            f"Kafka knows no topic {topic}, which the workers read: was it deleted? Create it with "
            "`headrace topics create`, and start them again."
        )


class _Told(msgspec.Struct):
    """What a member tells the leader, and the leader every member.

    owned: by the name of each member, as of the assignment `round`. instance: of who tells.
    """

    round: int = 0
    owned: dict[str, list[int]] = {}
    instance: str | None = None


class StickyAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
    """`assign` as aiokafka's group coordinator calls it.

    Each member keeps the whole table of the last assignment that it took part in, and brings it along.
    The leader goes by the newest table, so what a member owned before it was away counts for nothing,
    and a static member (instance) keeps its numbers although it comes back under a new member id.
    """

    name = NAME

    def __init__(self, instance: str | None = None) -> None:
        self._table = _Told(instance=instance)

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member says when it joins."""
        return ConsumerProtocolMemberMetadata(VERSION, sorted(topics), msgspec.msgpack.encode(self._table))

    def assign(
        self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """The leader's part. Raises TopicUnknown."""
        told = {m: msgspec.msgpack.decode(said.user_data, type=_Told) for m, said in members.items()}
        names = {member: said.instance or member for member, said in told.items()}
        newest = max(told.values(), key=lambda said: said.round)
        owned = {member: newest.owned.get(name, []) for member, name in names.items()}
        topics = {t: _count(cluster, t) for said in members.values() for t in said.subscription}
        shares = assign(owned, topics)
        table = _Told(
            newest.round + 1, {names[m]: sorted(set(chain(*share.values()))) for m, share in shares.items()}
        )
        encoded = msgspec.msgpack.encode(table)
        return {
            member: ConsumerProtocolMemberAssignment(
                VERSION, [(topic, numbers) for topic, numbers in share.items() if numbers], encoded
            )
            for member, share in shares.items()
        }

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Remember the table."""
        table = msgspec.msgpack.decode(assignment.user_data, type=_Told)
        self._table = _Told(table.round, table.owned, self._table.instance)


def _count(cluster: Any, topic: str) -> int:
    count = len(cluster.partitions_for_topic(topic) or ())
    if not count:
        raise TopicUnknown(topic)
    return count
