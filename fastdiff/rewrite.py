"""The fused operations in other people's networks: a pass over the graph that torch.compile traces of them.

A convolution of 3 x 3 takes in what follows it, as far as nothing else reads what lies between, and becomes `fastdiff::conv3x3` or `conv_up`:

    y = conv(x) + bias of the layer + bias of the image + skip      skip: as it is, or through a convolution of one pixel
    out = silu(norm(y) (1 + scale) + shift)                         y is kept beside it where others read it

A GroupNorm that no convolution takes becomes `fastdiff::group_norm_silu`, with the scale, shift and SiLU that follow it. Weights are permuted within
the graph, so that changes of them are followed: nothing where they are channels-last, else a copy at every call, as the sums of taps of `conv_up` are.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADD, MUL, DIV = (operator.add, torch.add, "add"), (operator.mul, torch.mul, "mul"), (operator.truediv, torch.div, "div")
NORMS = (F.group_norm, torch.group_norm)
NAMES: dict[Any, tuple[str, ...]] = {
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    **dict.fromkeys(NORMS, ("input", "num_groups", "weight", "bias", "eps")),
    F.dropout: ("input", "p", "training", "inplace"),
    F.interpolate: ("input", "size", "scale_factor", "mode"),
}
OUT_OF_PLACE: dict[Any, Any] = {
    **{operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.itruediv: operator.truediv},
    **{"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "relu_": "relu"},
}
IN_PLACE = {
    "setitem", "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor",
}  # fmt: skip
# What makes a tensor of its own, no view of another one.
FRESH = {
    *ADD, *MUL, *DIV, *NORMS, operator.sub, torch.conv2d, torch.cat, torch.addcmul, F.silu, F.relu, F.linear, F.interpolate, F.batch_norm,
}  # fmt: skip
# What depends on how its input lies in memory: random numbers come in that order.
BY_MEMORY = {"view_as_complex", "rand_like", "randn_like", "randint_like", "bernoulli", "normal", "multinomial", "rrelu"}


@dataclass(eq=False)
class _Accelerated:
    """What a module's calls go through, where nn.Module.compile puts its own: no state of the module's, and left behind by copies and pickles."""

    call: Callable[..., Any]
    run: Callable[..., Any]
    before: Callable[..., Any] | None
    found: dict[int, Counter[str]] = field(default_factory=dict)  # by the part of the module's code that a graph was traced from

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A derivative in forward mode is nothing that a traced graph would know of, and the operations have none.
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        return (self.run if forward_mode else self.call)(*args, **kwargs)


def accelerate(module: nn.Module, *, dynamic: bool = False, inner: str | None = None) -> nn.Module:
    """Run a network of residual blocks through fused operations, in place, and return it. `unaccelerate` undoes it, `report` says what was replaced.

    Replaced are GroupNorm, with SiLU, scale and shift, and convolutions of 3 x 3 with what stands around them: those from a multiple of 32 to a
    multiple of 64 channels, with results whose sides are powers of two and that have at most 256 pixels; on CUDA in 16 bits. All else stays, and so
    does a graph that may be asked for gradients, runs under autocast, or writes into its own tensors. Parameters, state_dict and class are left alone,
    and changes of the weights are followed. A copy of the module is not accelerated, and within another torch.compile it is compiled as if it were not.

    dynamic: one trace for all batch sizes; else each new shape is traced, which takes seconds, and what comes after eight runs as it would have.
    inner: the backend of torch.compile that runs the result, by default "inductor" on CUDA, and on a CPU "eager", where the operations run by their
    definition, which is not fast. ValueError for what is no module, or no backend.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"accelerate takes a torch.nn.Module, not {type(module).__name__}")
    if inner is not None and inner not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"inner is {inner!r}, which is no backend of torch.compile; give None or one of {', '.join(known)}")
    run: Callable[..., Any] = module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    def backend(gm: GraphModule, examples: list[Any]) -> Any:
        if not _differentiable(gm, examples) and not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            made.found[_frame()] = rewrite(gm)
        on_cuda = any(isinstance(v, Tensor) and v.device.type == "cuda" for v in examples)
        compiler: Any = torch._dynamo.lookup_backend(inner or ("inductor" if on_cuda else "eager"))  # type: ignore[attr-defined]
        return compiler(gm, examples)

    # Dynamo keeps what it has compiled, eight graphs at most, with the code of a function: each module needs code of its own.
    call.__code__ = call.__code__.replace()
    before = module._compiled_call_impl
    before = before.before if isinstance(before, _Accelerated) else before
    made = _Accelerated(torch.compile(call, backend=backend, dynamic=dynamic), run, before)
    module._compiled_call_impl = made
    return module


def unaccelerate(module: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place, and return the module. ValueError for one that is not accelerated."""
    made = getattr(module, "_compiled_call_impl", None)
    if not isinstance(made, _Accelerated):
        raise ValueError(f"this {type(module).__name__} is not accelerated; fastdiff.accelerate does it")
    module._compiled_call_impl = made.before
    return module


def accelerated(module: nn.Module) -> bool:
    """Whether `accelerate` was called for it."""
    return isinstance(module._compiled_call_impl, _Accelerated)


def report(module: nn.Module) -> dict[str, int]:
    """What was replaced in an accelerated module, for the shapes that were traced last; {} before its first call without gradients.

    Launches: "conv3x3", "conv_up", "group_norm_silu" and, without SiLU, "group_norm". Taken into them: "image bias", "skip", "shortcut", "norm" and
    "style".
    """
    made = module._compiled_call_impl
    return dict(sum(made.found.values(), Counter[str]())) if isinstance(made, _Accelerated) else {}


def rewrite(gm: GraphModule) -> Counter[str]:
    """Replace in a traced graph, in place, what fits, and count it by kind."""
    work = _Rewrite(gm.graph)
    if _out_of_place(gm.graph):
        _drop_idle(gm.graph)
        for node in list(gm.graph.nodes):
            if node not in work.gone:
                work.convolution(node)
            if node not in work.gone:
                work.group_norm(node)
        work.finish()
    gm.graph.lint()
    gm.recompile()
    return work.found


def _frame() -> int:
    """A number for the code that is being compiled, the same when it is compiled again."""
    at = torch._guards.CompileContext.current_compile_id()
    return -1 if at is None or at.frame_id is None else at.frame_id


def _differentiable(gm: GraphModule, examples: list[Any]) -> bool:
    """Whether gradients may be asked of what the graph computes."""
    switched = any(node.target is torch._C._set_grad_enabled and node.args[0] for node in gm.graph.nodes)
    tensors = (*examples, *gm.parameters(), *gm.buffers())
    return (torch.is_grad_enabled() or switched) and any(isinstance(v, Tensor) and v.requires_grad for v in tensors)


def _tensor(arg: Any) -> Tensor | None:
    """A plain tensor like the one that stood here when the graph was traced."""
    value = arg.meta.get("example_value") if isinstance(arg, Node) else None
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not is_traceable_wrapper_subclass(value)
    return value if plain else None


def _image(arg: Any, *ndim: int) -> Tensor | None:
    value = _tensor(arg)
    fits = value is not None and value.ndim in (ndim or (4,)) and value.dtype in DTYPES and value.device.type in ("cpu", "cuda")
    return value if fits else None


def _alike(*args: Any) -> bool:
    """Tensors, of one dtype and on one device."""
    values = [_tensor(arg) for arg in args]
    return all(v is not None for v in values) and len({(v.dtype, v.device) for v in values if v is not None}) == 1


def _number(arg: Any) -> float | None:
    """A Python number. With dynamic=True a float is a symbol of the graph, and to read it is to guard it."""
    value = arg.meta.get("example_value") if isinstance(arg, Node) else arg
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) else None


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def _plain(node: Any, count: int, *targets: Any) -> bool:
    """One of these operations, with so many arguments and none by name."""
    return _is(node, *targets) and len(node.args) == count and not node.kwargs


def _arguments(node: Node) -> dict[str, Any]:
    return dict(zip(NAMES[node.target], node.args, strict=False)) | node.kwargs


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(node: Any, one: Node, targets: tuple[Any, ...]) -> Any:
    """What a sum or a product of two has beside `one`, or None."""
    found = [v for v in node.args if v is not one] if _plain(node, 2, *targets) else []
    return found[0] if len(found) == 1 else None


def _pair(arg: Any) -> Any:
    return (arg, arg) if isinstance(arg, int) else tuple(arg) if isinstance(arg, (tuple, list)) else arg


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _inplace(node: Node) -> dict[str, Any]:
    """The arguments by name of a function that is told to work in place."""
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return {}
    signature = inspect.signature(node.target)
    given = signature.bind(*node.args, **node.kwargs).arguments if "inplace" in signature.parameters else {}
    return given if given.get("inplace") else {}


def _writes(node: Node) -> bool:
    """Whether a node may change a tensor that it is given or how later ones compute, or reads memory past its strides."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target._overload_names)
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = _name(node)
    unknown = node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator) or name in ("_enter_autocast", "as_strided")
    return unknown or name in IN_PLACE or (name[-1:] == "_" and name[-2:] != "__") or "out" in node.kwargs or bool(_inplace(node))


def _out_of_place(graph: Graph) -> bool:
    """Let what changes a tensor that nothing else reads make a new one instead. False where any other tensor is changed."""
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or not _writes(node):
            continue
        given = _inplace(node)
        source: Any = given["input"] if "input" in given else node.args[0] if node.args else None
        if not _is(source, *FRESH) or len(source.users) > 1 or not all(_alike(node, v) for v in node.all_input_nodes):
            return False
        if given:
            node.args, node.kwargs = (), {**given, "inplace": False}
        elif node.target in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[node.target]
        else:
            return False
    return True


def _drop_idle(graph: Graph) -> None:
    """Take out what changes no value, and call SiLU by its name where it is written out."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if _is(node, F.dropout):
            given = _arguments(node)
            source, idle = given["input"], not given.get("training", True) or _number(given.get("p", 0.5)) == 0
        elif _plain(node, 2, *MUL, *DIV):
            idle = _number(node.args[1]) == 1 and _alike(node, source)
        else:
            idle = _plain(node, 1, "contiguous") and all(_is(user, torch.conv2d, F.interpolate, *NORMS) for user in node.users)
        if idle and not any(_by_memory(user) for user in node.users):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif _plain(node, 2, *MUL):
            for x, gate in (node.args, node.args[::-1]):
                if _plain(gate, 1, torch.sigmoid, F.sigmoid, "sigmoid") and gate.args[0] is x and len(gate.users) == 1:
                    node.op, node.target, node.args = "call_function", F.silu, (x,)
                    graph.erase_node(gate)
                    break


def _by_memory(node: Node) -> bool:
    """Whether a node may tell how its input lies in memory."""
    foreign = isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and not str(node.target).startswith("fastdiff")
    as_bits = _is(node, "view") and any(isinstance(v, torch.dtype) for v in (*node.args, *node.kwargs.values()))
    return node.op == "output" or foreign or as_bits or _name(node) in BY_MEMORY or "dropout" in _name(node)


def _keep_layouts(graph: Graph) -> None:
    """The operations' results are channels-last: give back the traced layout to those that can tell, and let view copy where it has to."""
    for node in list(graph.nodes):
        if not _by_memory(node):
            if _is(node, "view", "view_as"):
                node.target = node.target.replace("view", "reshape")
            continue
        for source in node.all_input_nodes:
            value = _tensor(source)
            order = [] if value is None else sorted(range(value.ndim), key=value.stride, reverse=True)
            if value is not None and value.permute(order).is_contiguous():
                with graph.inserting_before(node):
                    made = graph.call_method("contiguous", (graph.call_method("permute", (source, order)),))
                    node.replace_input_with(source, graph.call_method("permute", (made, [order.index(d) for d in range(value.ndim)])))


def _covers(height: int, width: int, c_out: int, groups: int | None, *channels: int) -> bool:
    """Whether a kernel computes a convolution with such results: `fits` of kernels/conv.py, for where there is no Triton."""
    size = c_out // groups if groups else 1
    powers = all(v > 0 and v & (v - 1) == 0 for v in (height, width, size))
    whole = c_out % 64 == c_out % (groups or 1) == 0 and not any(c % 32 for c in channels)
    return powers and whole and height * width <= 256 and size <= 64


@dataclass
class _Norm:
    """A GroupNorm and what follows it: nodes from the first to the last. style: nothing, or scale and shift, [N, C, 1, 1]."""

    x: Node
    groups: int
    eps: float
    affine: list[Node | None]
    nodes: list[Node]
    style: list[Node] = field(default_factory=list)
    silu: bool = False

    def operands(self) -> list[Node]:
        return [v for v in (*self.affine, *self.style) if v is not None]


def _norm(node: Node) -> _Norm | None:
    given: dict[str, Any] = _arguments(node) if _is(node, *NORMS) else {"input": None}
    value, eps = _image(given["input"], 3, 4), _number(given.get("eps", 1e-5))
    if value is None or eps is None or not _alike(given["input"], node):
        return None
    norm = _Norm(given["input"], given["num_groups"], eps, [given.get("weight"), given.get("bias")], [node])
    if value.ndim == 4:
        _find_style(norm, (value.shape[0], int(value.shape[1]), 1, 1))
    user = _only_user(norm.nodes[-1])
    if user is not None and _is(user, F.silu):
        norm.nodes.append(user)
        norm.silu = True
    return norm


def _find_style(norm: _Norm, shape: tuple[Any, ...]) -> None:
    """norm (1 + scale) + shift, as a sum of a product or as addcmul."""
    first: Any = _only_user(norm.nodes[0])
    if _plain(first, 3, torch.addcmul) and norm.nodes[0] in first.args[1:]:
        nodes, shift = [first], first.args[0]
        factor = first.args[2 if first.args[1] is norm.nodes[0] else 1]
    else:
        factor = _other(first, norm.nodes[0], MUL)
        second = None if factor is None else _only_user(first)
        nodes, shift = [first, second], _other(second, first, ADD)
    scale: Any = next((_other(factor, v, ADD) for v in factor.args if v == 1), None) if _plain(factor, 2, *ADD) else None
    if _alike(norm.nodes[0], scale, shift, *nodes) and all(tuple(v.meta["example_value"].shape) == shape for v in (scale, shift)):
        norm.style = [scale, shift]
        norm.nodes += nodes


@dataclass
class _Convolution:
    """A convolution of 3 x 3 and what follows it: nodes from the first to the last of y's. each: [N, C', 1, 1] or [1, C', 1, 1]. shape: of y."""

    x: Node
    weight: Node
    bias: Node | None
    stride: int
    up: bool
    channels: int
    shape: tuple[Any, int, int, int]
    like: Tensor
    nodes: list[Node]
    each: Node | None = None
    skip: Node | None = None

    @property
    def y(self) -> Node:
        return self.nodes[-1]

    def fits(self, groups: int | None, *more: int) -> bool:
        (_, c_out, height, width), like = self.shape, self.like
        if like.device.type == "cuda":
            return ops.uncovered(like.device, like.dtype, height, width, c_out, groups, self.channels, *more) is None
        return _covers(height, width, c_out, groups, self.channels, *more)


def _convolution(node: Node) -> _Convolution | None:
    given: dict[str, Any] = _arguments(node) if _is(node, torch.conv2d) else {"input": None, "weight": None}
    x, y, weight = _image(given["input"]), _image(node), _tensor(given["weight"])
    if x is None or y is None or weight is None or not _alike(given["input"], given["weight"], node):
        return None
    (c_out, *size), (channels, *sides), stride = map(int, y.shape[1:]), map(int, x.shape[1:]), _pair(given.get("stride", 1))
    plain = _pair(given.get("dilation", 1)) == (1, 1) and given.get("groups", 1) == 1 and _pair(given.get("padding", 0)) in ((1, 1), "same")
    if not plain or tuple(weight.shape[2:]) != (3, 3) or stride not in ((1, 1), (2, 2)) or sides != [stride[0] * side for side in size]:
        return None
    found = _Convolution(
        given["input"], given["weight"], given.get("bias"), stride[0], False, channels, (y.shape[0], c_out, size[0], size[1]), y, [node]
    )
    if not found.fits(None):
        return None
    if found.stride == 1 and _only_user(found.x) is node and _doubles(found.x):
        found.nodes, found.x, found.up = [found.x, node], _arguments(found.x)["input"], True
        return found
    while (user := _only_user(found.y)) is not None:
        other = _other(user, found.y, ADD)
        value = _image(other)
        if value is None or not _alike(found.y, user, other):
            break
        if found.skip is None and found.stride == 1 and tuple(value.shape) == found.shape:
            found.skip = other
        elif found.each is None and tuple(value.shape[1:]) == (c_out, 1, 1) and (value.shape[0] == y.shape[0] or value.shape[0] == 1):
            found.each = other
        else:
            break
        found.nodes.append(user)
    return found


def _doubles(node: Node) -> bool:
    """Whether every pixel is repeated 2 x 2 times."""
    given: dict[str, Any] = _arguments(node) if _is(node, F.interpolate) else {"input": None}
    x, y, scale = _image(given["input"]), _image(node), given.get("scale_factor")
    if x is None or y is None or given.get("mode", "nearest") != "nearest" or not _alike(given["input"], node):
        return False
    factors = scale if isinstance(scale, (tuple, list)) else (scale,)
    return all(v is None or _number(v) == 2 for v in factors) and all(
        int(b) == 2 * int(a) for a, b in zip(x.shape[2:], y.shape[2:], strict=True)
    )


def _shortcut(node: Node | None, fits: Callable[[int], bool]) -> dict[str, Any]:
    """The arguments of a convolution of one pixel that is read once, if a kernel may compute it too."""
    if node is None or not _is(node, torch.conv2d) or len(node.users) != 1:
        return {}
    given = _arguments(node)
    x, weight = _image(given["input"]), _tensor(given["weight"])
    if x is None or weight is None or tuple(weight.shape[2:]) != (1, 1) or not _alike(given["input"], given["weight"], node):
        return {}
    plain = (
        _pair(given.get("stride", 1)) == (1, 1)
        and given.get("groups", 1) == 1
        and _pair(given.get("padding", 0)) in ((0, 0), "same", "valid")
    )
    return given if plain and fits(int(x.shape[1])) else {}


class _Rewrite:
    """The nodes of a graph, replaced one after another. Images are channels-last between the operations, and permuted for all others."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.found: Counter[str] = Counter()
        self.gone: set[Node] = set()
        self._last: dict[Node, Node] = {}  # [N, C, H, W] -> [N, H, W, C], contiguous
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]

    def convolution(self, node: Node) -> None:
        """Replace a convolution with what it takes in, if it fits."""
        conv = _convolution(node)
        if conv is None:
            return
        norm, c_out, device = self._norm_of(conv), conv.shape[1], conv.like.device
        groups = None if norm is None else norm.groups
        shortcut = _shortcut(conv.skip, lambda channels: conv.fits(groups, channels))
        raw = norm is None or len(conv.y.users) > 1
        x = self._channels_last(conv.x)
        skip = [] if conv.skip is None else [self._channels_last(shortcut.get("input", conv.skip))]
        biases = [v for v in (conv.bias, shortcut.get("bias"), conv.each) if v is not None]
        with self._after(
            x, *skip, *biases, conv.weight, *([shortcut["weight"]] if shortcut else []), *([] if norm is None else norm.operands())
        ):
            weight = self._method("contiguous", self._method("permute", conv.weight, 0, 2, 3, 1))
            bias = self._bias(biases, conv.each, c_out, device)
            norms = [] if norm is None else self._affine(norm, c_out, device)
            style = None if norm is None else self._style(norm)
            numbers = (1, 1e-5) if norm is None else (norm.groups, norm.eps)
            if conv.up:
                weight = self._method("to", self._call(reference.up_weight, self._method("float", weight)), conv.like.dtype)
                made = self._call(torch.ops.fastdiff.conv_up.default, x, weight, bias, norms, None, *numbers, raw)
            else:
                through = self._method("contiguous", self._method("flatten", shortcut["weight"], 1)) if shortcut else None
                around = (None, skip, through, norms, style, None, None)
                made = self._call(torch.ops.fastdiff.conv3x3.default, [x], weight, bias, *around, *numbers, conv.stride, raw)
            results = [*([conv.y] if raw else []), *([] if norm is None else norm.nodes[-1:])]
            self._replace(results, [self._call(operator.getitem, made, i) for i in range(len(results))])
        self._erase([*([conv.skip] if shortcut and conv.skip is not None else []), *conv.nodes, *([] if norm is None else norm.nodes)])
        taken = {"image bias": conv.each, "shortcut": shortcut, "skip": skip and not shortcut, "norm": norm, "style": style}
        self.found.update(["conv_up" if conv.up else "conv3x3", *(name for name, what in taken.items() if what)])

    def group_norm(self, node: Node) -> None:
        """Replace a GroupNorm with what follows it, if its groups have 1, 2, 4, ... channels."""
        norm = _norm(node)
        value = None if norm is None else _tensor(norm.x)
        if norm is None or value is None:
            return
        channels = int(value.shape[1])
        size = channels // norm.groups
        if channels % 8 or size & (size - 1):
            return
        x = self._channels_last(norm.x)
        with self._after(x, *norm.operands()):
            args = (x, *self._affine(norm, channels, value.device), self._style(norm), None, norm.groups, norm.eps, norm.silu, None)
            self._replace(norm.nodes[-1:], [self._call(torch.ops.fastdiff.group_norm_silu.default, *args)])
        self._erase(norm.nodes)
        self.found.update(["group_norm_silu" if norm.silu else "group_norm", *(["style"] if norm.style else [])])

    def finish(self) -> None:
        """What is left to do when all that fits has been replaced."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (node in self._last or _is(node, *ADD)):
                self.graph.erase_node(node)
        _keep_layouts(self.graph)

    def _norm_of(self, conv: _Convolution) -> _Norm | None:
        """A norm and SiLU of y that the convolution may compute: what scales and shifts it must be known before anyone else reads y."""
        for user in conv.y.users:
            norm = _norm(user)
            if norm is None or norm.x is not conv.y or not norm.silu or not conv.fits(norm.groups) or (conv.up and norm.style):
                continue
            if all(v < other for v in norm.operands() for other in conv.y.users if other is not user):
                return norm
        return None

    def _channels_last(self, x: Node) -> Node:
        """[N, C, H, W], or [N, C, L], -> contiguous [N, H, W, C], or [N, 1, L, C]."""
        if x not in self._last:
            value = _tensor(x)
            with self._after(x):
                wide = x if value is None or value.ndim == 4 else self._method("unsqueeze", x, 2)
                self._last[x] = self._method("contiguous", self._method("permute", wide, 0, 2, 3, 1))
        return self._last[x]

    def _replace(self, nodes: list[Node], results: list[Node]) -> None:
        """Let results, contiguous [N, H, W, C], take the place of nodes."""
        for old, new in zip(nodes, results, strict=True):
            value = _tensor(old)
            out = self._method("permute", new, 0, 3, 1, 2)
            if value is not None and value.ndim == 3:
                out = self._method("squeeze", out, 2)
            out.meta = dict(old.meta)
            old.replace_all_uses_with(out)
            self._last[out] = new

    def _bias(self, biases: list[Node], each: Node | None, c_out: int, device: torch.device) -> Node:
        """Their sum, fp32 [1, C'] or [N, C']."""
        rows = [self._method("float", self._method("flatten", v, 1) if v is each else self._method("unsqueeze", v, 0)) for v in biases]
        total = rows[0] if rows else self._call(torch.zeros, 1, c_out, device=device)
        for row in rows[1:]:
            total = self._call(operator.add, total, row)
        return self._method("contiguous", total)

    def _affine(self, norm: _Norm, channels: int, device: torch.device) -> list[Node]:
        """gamma and beta, fp32 [C]."""
        pairs = zip(norm.affine, (torch.ones, torch.zeros), strict=True)
        return [
            self._call(neutral, channels, device=device) if v is None else self._method("contiguous", self._method("float", v))
            for v, neutral in pairs
        ]

    def _style(self, norm: _Norm) -> Node | None:
        """[N, 2 C]."""
        return self._method("flatten", self._call(torch.cat, norm.style, 1), 1) if norm.style else None

    def _after(self, *nodes: Node) -> Any:
        """Where all of these are known."""
        return self.graph.inserting_before(max([*nodes, *self._inputs[-1:]]).next)

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def _method(self, name: str, *args: Any) -> Node:
        return self.graph.call_method(name, args)

    def _erase(self, nodes: list[Node]) -> None:
        for node in reversed(nodes):
            self.graph.erase_node(node)
            self.gone.add(node)
