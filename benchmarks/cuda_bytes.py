"""`benchmark.py bytes`: kernels and bytes of the compiled training step on an H100, counted without a GPU.

And what would keep the step from running as CUDA graphs.

AOTAutograd traces the step on fake CUDA tensors, and inductor lowers and schedules forward and backward as for a GPU;
nothing is compiled to machine code or run. The bytes are those that inductor's scheduler counts: every buffer that a
kernel or a library call reads or writes, once, and as a whole where a slice of it is read. They bound the time from
below: bytes over bandwidth. It uses private parts of torch 2.14.
"""

import contextlib
import types
from argparse import Namespace
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.batch_augmentation import Draws
from reports.tables import print_rows
from training.build import build_augmentation, build_diverse_loss, build_initial
from utils import World

from .fake_cuda import CUDA, backward, fake_cuda, grad
from .measure import new_process
from .steps import only, terms_to_compare
from .training_steps import NUM_CLASSES

PLAIN, INPUT = "no term", "no term, from bytes"
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 * 2**30,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)  # fmt: skip


def compare_bytes(own: Namespace, args: Namespace, world: World) -> dict:
    """Bytes and kernels of the step without terms, with its input made from bytes, with each term, and with all."""
    alone = terms_to_compare(args, own.terms)
    rows = {PLAIN: [], INPUT: [], **{f"only {name}": [name] for name in alone}, "all terms": None}
    plain = {}

    def counts():
        for name, names in rows.items():
            with new_process() as pool:  # which ends, since lowering leaves torch believing in a GPU
                count = pool.submit(count_step, args, names, name == INPUT).result()
            plain.update(plain or count)
            yield count

    columns = {
        "GB": ("bytes", lambda number: f"{number / 1e9:.1f}"),
        "more than without terms, GB": ("bytes", lambda number: f"{(number - plain['bytes']) / 1e9:+.2f}"),
        "ratio": ("bytes", lambda number: f"{number / plain['bytes']:.3f}"),
        "kernels": ("kernels", str),
        "ratio of kernels": ("kernels", lambda number: f"{number / plain['kernels']:.3f}"),
        "obstacles to CUDA graphs": ("obstacles", lambda found: "; ".join(found) or "none"),
    }
    print(f"{args.model}, batch {args.batch_size}, bfloat16: counted, not measured\n")
    return {"steps": print_rows("step", [*rows], counts(), columns)}


def count_step(args: Namespace, terms: list[str] | None, from_bytes: bool) -> dict[str, int | list[str]]:
    """{"bytes", "kernels", "obstacles"} of a forward and a backward pass with `terms` alone; None = those of `args`.

    Obstacles to CUDA graphs are described in `_obstacles`.

    With `from_bytes` the input is bytes that are normalised, erased and mixed, otherwise floats, ready for the model.
    """
    args = args if terms is None else only(args, terms)
    model = build_initial(args, NUM_CLASSES)
    if not from_bytes:
        args = Namespace(**vars(args) | {"mixup": 0, "cutmix": 0, "cutmix_minmax": None})
    with fake_cuda():
        fake_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        augment = build_augmentation(args, from_bytes)
        world = World(0, 1, 0, 1, CUDA)
        training_loss = build_diverse_loss(args, world, model.to(CUDA), NUM_CLASSES, augment).train()
        side, dtype = args.input_size, torch.uint8 if from_bytes else torch.float32
        images = torch.empty(args.batch_size, side, side, 3, dtype=dtype, device=CUDA).permute(0, 3, 1, 2)
        labels = torch.zeros(args.batch_size, dtype=torch.int64, device=CUDA)
        draws = augment.draw(images, 0, 0, 0, 0)
    return _lower(training_loss, (images, labels, draws), fake_mode)


def _lower(training_loss: nn.Module, batch: tuple, fake_mode) -> dict[str, int | list[str]]:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import lowering  # noqa: F401 as its decomposition of max-pooling expects
    from torch._inductor.decomposition import select_decomp_table

    names, tensors = zip(*training_loss.named_parameters(), *training_loss.named_buffers(), strict=True)
    counts = {"bytes": 0, "kernels": 0, "obstacles": []}

    def step(tensors, images, labels, mixing, boxes):
        state = dict(zip(names, tensors, strict=True))
        with torch.autocast("cuda", torch.bfloat16):
            return torch.func.functional_call(training_loss, state, (images, labels, Draws(mixing, boxes)))

    def compiler(is_backward):
        def count(graph, inputs):
            state = set() if is_backward else {f"primals_{number + 1}" for number in range(len(tensors))}
            for key, value in _scheduled(graph, inputs, is_backward, fake_mode, state).items():
                counts[key] += value
            return make_boxed_func(graph.forward)

        return count

    def partition(graph, inputs, **options):
        return min_cut_rematerialization_partition(graph, inputs, **options | {"compiler": "inductor"})

    def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, **options):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]

    with _believing_in_an_h100(), mock.patch.object(F, "scaled_dot_product_attention", flash_attention), fake_mode:
        compiled = aot_function(
            step, compiler(False), compiler(True), partition, decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )  # fmt: skip
        images, labels, draws = batch
        loss, _ = compiled([*tensors], images, labels, *draws)
        loss.backward()
    return counts


def _scheduled(
    graph: torch.fx.GraphModule, inputs: list, is_backward: bool, fake_mode, state: set[str]
) -> dict[str, int | list[str]]:
    """Bytes and kernels, library calls included, of one of the two graphs as inductor schedules it, and obstacles.

    Of a library call with several results each is a node of the schedule.
    """
    from torch._inductor.compile_fx import fake_tensor_prop, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    view_to_reshape(graph)
    with V.set_fake_mode(fake_mode), fake_mode:
        fake_tensor_prop(graph, inputs)
        post_grad_passes(graph, is_inference=False)
        fake_tensor_prop(graph, inputs, True)
    lowering = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward, is_inference=False)
    with V.set_fake_mode(fake_mode), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
        lowering.run(*inputs)
        lowering.codegen()
        nodes = [node for node in lowering.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        kernels = [node for node in nodes if not isinstance(getattr(node, "node", None), MultiOutput)]
        num_bytes = sum(node.get_read_write_buffers_sizes() for node in nodes)
    return {"bytes": num_bytes, "kernels": len(kernels), "obstacles": _obstacles(graph, lowering, state)}


def _obstacles(graph: torch.fx.GraphModule, lowering, state: set[str]) -> list[str]:
    """Why inductor would launch a graph, or a part of it, kernel by kernel though CUDA graphs are asked for.

    It does so with operations on the CPU, with those that wait for the device, and with inputs that are written to and
    that are not the model's `state`, whose addresses stay.
    """
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    found = [f"{node} computes on {device}" for device, node in lowering.device_node_mapping.items() if device != CUDA]
    found += [f"{node.target} cannot be recorded" for node in graph.graph.nodes if is_cudagraph_unsafe_fx_node(node)]
    return found + [f"{name} is written to" for name in lowering.mutated_inputs if name not in state]


@contextlib.contextmanager
def _believing_in_an_h100():
    """Within, inductor lowers for an H100 and asks no driver."""
    import torch._dynamo.device_interface as device_interface
    import torch._inductor.config as config
    import torch.utils._triton as triton

    interface = device_interface.CudaInterface
    stand_ins = [
        (torch.compiler, "is_compiling", lambda: True),
        (torch.autograd, "backward", backward),
        (torch.autograd, "grad", grad),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda **_: True),
        (torch.cuda, "get_device_properties", lambda *_: H100),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_name", lambda *_: H100.name),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (interface, "get_device_properties", staticmethod(lambda *_: H100)),
        (interface.Worker, "get_device_properties", staticmethod(lambda *_: H100)),
        (interface, "get_compute_capability", staticmethod(lambda *_: 90)),
        (interface, "current_device", staticmethod(lambda: 0)),
        (interface, "is_available", staticmethod(lambda: True)),
        (interface, "is_triton_capable", staticmethod(lambda *_: True)),
        (interface, "raise_if_triton_unavailable", staticmethod(lambda *_: None)),
        (triton, "triton_hash_with_backend", lambda: "none"),
        (triton, "has_triton", lambda *_: True),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(config.patch(fallback_random=True, compile_threads=1, fx_graph_cache=False))
        yield
