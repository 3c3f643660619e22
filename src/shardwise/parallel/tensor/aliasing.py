"""Find values of a step that share memory: one changed in place under one name may be read under another."""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch import fx

Roots = dict[fx.Node, fx.Node]

_NORMALISATIONS = ("aten::batch_norm", "aten::instance_norm")
"""Operators that change their running statistics although their schemas do not say so."""


def writes_in_place(node: fx.Node) -> bool:
    """Return whether a call changes its first argument, by the trailing underscore of its operator."""
    name = _name(node)
    return name.endswith("_") and not name.endswith("__")


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name)


def roots(graph: fx.Graph) -> Roots:
    """Map every value to its root: the value whose memory a view shares, or the value itself."""
    found: Roots = {}
    for node in graph.nodes:
        source = viewed(node)
        found[node] = node if source is None else found[source]
    return found


def viewed(node: fx.Node) -> fx.Node | None:
    """Return the value that `node` is a view of, by the schema of its operator. Returns None if it is no view."""
    first = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(first, fx.Node):
        return None
    if node.target is operator.getitem:
        return first if viewed(first) is not None else None
    schema = getattr(node.target, "_schema", None)
    return first if schema is not None and any(result.alias_info for result in schema.returns) else None


def _members(where: Roots) -> dict[fx.Node, list[fx.Node]]:
    """Group the values by their roots."""
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, root in where.items():
        members.setdefault(root, []).append(node)
    return members


def changed_under_another_name(graph: fx.Graph, where: Roots) -> set[fx.Node]:
    """Return the roots of values that are changed in place under one name and read under an older name afterwards."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    members = _members(where)
    found = set()
    for node in graph.nodes:
        written = node.args[0] if writes_in_place(node) else None
        if not isinstance(written, fx.Node):
            continue
        for other in members[where[node]]:
            older = other is not written and number[other] < number[node]
            if older and any(number[user] > number[node] for user in other.users) and not _apart(written, other):
                found.add(where[node])
    return found


def _apart(a: fx.Node, b: fx.Node) -> bool:
    """Return whether two views start from different parts of one split."""
    for x, y in zip(_lineage(a), _lineage(b), strict=False):
        if x is not y:
            return operator.getitem is x.target is y.target and x.args[0] is y.args[0] and x.args[1] != y.args[1]
    return False


def _lineage(node: fx.Node) -> list[fx.Node]:
    line = [node]
    while (source := viewed(line[-1])) is not None:
        line.append(source)
    return line[::-1]


def together(graph: fx.Graph, buffers: Collection[str]) -> list[tuple[fx.Node, fx.Node]]:
    """Return (first, last) pairs of calls between which a step must not be cut.

    A change in place would not cross the cut.

    Args:
        graph: the graph of a step.
        buffers: placeholders of buffers. Each worker that uses a placeholder has its own copy.
    """
    where = roots(graph)
    changed = changed_under_another_name(graph, where)
    ranges = []
    for root, members in _members(where).items():
        if root.op == "placeholder":
            users = {user for member in members for user in member.users if user.op == "call_function"}
            written = any(writes_in_place(user) and user.args[0] in members for user in users)
            if written or (root.name in buffers and any(_changes(user) for user in users)):
                ranges.append(_ends(graph, users))
        elif root in changed:
            ranges.append(_ends(graph, {node for node in members if node is root or writes_in_place(node)}))
    return ranges


def _changes(node: fx.Node) -> bool:
    """Return whether a call may change one of its arguments although its name does not say so.

    A call without a schema may: batch norm over replicas does.
    """
    return _name(node) in _NORMALISATIONS or not hasattr(node.target, "_schema")


def _ends(graph: fx.Graph, nodes: Collection[fx.Node]) -> tuple[fx.Node, fx.Node]:
    ordered = [node for node in graph.nodes if node in nodes]
    return ordered[0], ordered[-1]
