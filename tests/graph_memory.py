"""CUDA graphs on a CPU, as far as their memory goes: a graph returns the same memory each time.

What forward and backward pass return is copied to fixed addresses, as the replay of a CUDA graph writes to those
of its recording. `cudagraph_mark_step_begin` fills them with NaN: in real graphs other tensors are written there.
"""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func


class GraphMemory:
    """A backend of torch.compile, and what it has seen.

    Attributes:
        num_steps: how often a step began.
        num_graphs: how many graphs, each with its backward pass, it has compiled.
        varying: the names of the graph's inputs whose address may change, which a CUDA graph copies into its memory.
    """

    def __init__(self):
        self.outputs: list[torch.Tensor] = []
        self.num_steps = self.num_graphs = 0
        self.varying: set[str] = set()

    def __call__(self, graph, inputs, **options):
        self.num_graphs += 1
        assert all(torch.is_tensor(each) and not each.is_meta for each in inputs)
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        is_static = [node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") for node in nodes]
        self.varying |= {node.name for node, static in zip(nodes, is_static, strict=True) if not static}
        return aot_autograd(fw_compiler=self._replayed, bw_compiler=self._replayed)(graph, inputs)

    def begin_step(self):
        self.num_steps += 1
        for tensor in self.outputs:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)

    def _replayed(self, graph, inputs):
        addresses = {}

        def run(*args):
            results = []
            for i, output in enumerate(graph(*args)):
                if not torch.is_tensor(output) or any(output is arg for arg in args):
                    results.append(output)
                    continue
                if i not in addresses:
                    addresses[i] = output.clone()
                    self.outputs.append(addresses[i])
                results.append(addresses[i].copy_(output).detach())
            return results

        return make_boxed_func(run)


@contextlib.contextmanager
def graph_memory() -> Iterator[GraphMemory]:
    """A `GraphMemory` whose steps begin where the program says so."""
    torch._dynamo.reset()
    memory = GraphMemory()
    with mock.patch("torch.compiler.cudagraph_mark_step_begin", memory.begin_step):
        yield memory
