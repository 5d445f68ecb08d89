"""Batches keep the types of their containers on the way to a device."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from paceline.data.batches import count_first_dimension, to_device

META = torch.device("meta")


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Graph:
    nodes: torch.Tensor
    names: list[str]
    edges: dict[str, Pair]


def test_containers_of_any_type_and_depth_arrive_as_they_were() -> None:
    counts: defaultdict[str, Any] = defaultdict(list, ids=torch.ones(2))
    ordered = OrderedDict(b=torch.ones(2), a=(torch.ones(2), "text"))
    graph = Graph(torch.ones(4, 3), ["one"], {"near": Pair(torch.ones(2), None)})
    moved = to_device([counts, ordered, graph], META)
    assert [type(each) for each in moved] == [defaultdict, OrderedDict, Graph]
    assert moved[0]["new"] == []
    assert list(moved[1]) == ["b", "a"]
    assert type(moved[2].edges["near"]) is Pair
    assert moved[2].names == ["one"]
    tensors = [moved[0]["ids"], moved[1]["b"], moved[1]["a"][0]]
    tensors += [moved[2].nodes, moved[2].edges["near"].x]
    assert all(tensor.device == META for tensor in tensors)
    assert graph.nodes.device.type == counts["ids"].device.type == "cpu"


def test_the_samples_of_a_dataclass_are_those_of_its_first_tensor() -> None:
    assert count_first_dimension(Graph(torch.ones(4, 3), [], {})) == 4
