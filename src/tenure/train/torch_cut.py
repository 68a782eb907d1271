"""A torch module cut in two before a named submodule: the frozen part, and the head that is trained.

The module's steps are recorded by `torch.fx`, once in evaluation and once in training mode, since code may differ by
`self.training`. Not here: what is done with the parts (`torch_module`), the cache of features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from tenure.errors import SpecError


class Head(nn.Module):  # type: ignore[misc]
    """The part from the cut on, where its steps differ in training. Its submodules are those of the whole module."""

    def __init__(self, training: fx.GraphModule, evaluation: fx.GraphModule) -> None:
        super().__init__()
        self.steps = training
        self._evaluation = (evaluation,)  # in a tuple, so that parameters that both share are registered once

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the whole module."""
        outputs: torch.Tensor = self.steps(features) if self.training else self._evaluation[0](features)
        return outputs


def split(module: nn.Module, cut: str, reference: str) -> tuple[fx.GraphModule, nn.Module]:
    """Return the part before submodule `cut`, frozen and in evaluation mode, and the head. Both share `module`'s parameters.

    cut: a name of `named_modules`. Raises SpecError: there is no such submodule, it is not called exactly once with one
    tensor, later steps use more of the frozen part than its input, or torch can't record the module's steps.
    """
    names = [name for name, _ in module.named_modules() if name]
    if cut not in names:
        raise SpecError(f'program "{reference}": cut = {cut!r} names no submodule; it has: {", ".join(names[:40])}')
    evaluation, training = _recorded(module.eval(), cut, reference), _recorded(module.train(), cut, reference)
    frozen = _before(module, evaluation, cut, reference).eval()
    in_training, in_evaluation = (_after(module, graph, cut, reference) for graph in (training, evaluation))
    head = in_training if in_training.code == in_evaluation.code else Head(in_training, in_evaluation)
    trained = {id(parameter) for parameter in head.parameters()}
    for parameter in frozen.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    return frozen, head


class _Tracer(fx.Tracer):  # type: ignore[misc]
    def __init__(self, cut: str) -> None:
        super().__init__()
        self._cut = cut

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a submodule is one step."""
        return module_qualified_name == self._cut or super().is_leaf_module(m, module_qualified_name)


def _recorded(module: nn.Module, cut: str, reference: str) -> fx.Graph:
    try:
        return _Tracer(cut).trace(module)
    except Exception as error:  # anything that the module's own code raises on a stand-in for a tensor
        raise SpecError(
            f"program \"{reference}\": its steps can't be recorded, so it can't be cut at {cut!r}: {error}. Its forward must "
            "not depend on values or sizes of x; or write the frozen part and the head as two modules."
        ) from error


def _cut_node(graph: fx.Graph, cut: str, reference: str) -> fx.Node:
    found = [node for node in graph.nodes if node.op == "call_module" and node.target == cut]
    if len(found) != 1 or len(found[0].all_input_nodes) != 1:
        raise SpecError(
            f'program "{reference}": {cut!r} is called {len(found)} times'
            + (f" with {len(found[0].all_input_nodes)} tensors" if found else " by itself")
            + "; a module can be cut where a submodule is called once, with one tensor"
        )
    node: fx.Node = found[0]
    return node


def _before(module: nn.Module, graph: fx.Graph, cut: str, reference: str) -> fx.GraphModule:
    entry = _cut_node(graph, cut, reference).all_input_nodes[0]
    needed = {entry}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    part = fx.Graph()
    copies: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[entry])
    return fx.GraphModule(module, part)


def _after(module: nn.Module, graph: fx.Graph, cut: str, reference: str) -> fx.GraphModule:
    first = _cut_node(graph, cut, reference)
    part = fx.Graph()
    copies: dict[Any, fx.Node] = {first.all_input_nodes[0]: part.placeholder("features")}
    after: set[fx.Node] = set()
    for node in graph.nodes:
        if node is not first and not after.intersection(node.all_input_nodes):
            continue
        after.add(node)
        for other in node.all_input_nodes:
            if other.op == "get_attr" and other not in copies:
                copies[other] = part.node_copy(other)
            if other not in copies:
                raise SpecError(
                    f'program "{reference}": after {cut!r}, step {node.name} uses {other.name} of the part before it; the '
                    "frozen part must reach the rest through that layer's input alone. Cut elsewhere."
                )
        copies[node] = part.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, part)
