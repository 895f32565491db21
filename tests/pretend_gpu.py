"""A pretended GPU for tests: tensors that say they are on cuda:0 and are computed on the CPU.

It finds what a run on a CPU cannot: tensors of two devices in one operation, the waits of the host
for the device that an operation's meaning implies (not those within kernels), and what the capture
of a CUDA graph forbids. A replay repeats the recorded operations on the recorded memory with the
recorded numbers, as a GPU does. It knows nothing of kernels, their speed and their rounding.

    with PretendGpu() as gpu:
        policy = Policy(model.to("cuda"))
        ...
    gpu.waits   # [operation, for every wait]; gpu.graphs: what was captured
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.isin.Tensor_Tensor,
}  # isin: of many
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}  # indices may be on the host
COPIES = {aten.copy_.default, aten._to_copy.default}


class GpuTensor(torch.Tensor):
    """`inner`, said to be on cuda:0. For torch's own C++ code it is on the meta device, which needs
    no driver.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    # As torch's own: the same memory without a history; another tensor's memory in its place.
    data = property(
        lambda self: self.detach(), lambda self, other: setattr(self, "inner", other.inner)
    )

    @staticmethod
    def __new__(cls, inner):
        new = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta"
        )
        new.inner = inner
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the pretended GPU outside of PretendGpu")


class PretendGpu:
    def __init__(self):
        self.waits, self.graphs, self.capturing = [], [], None

    def __enter__(self):
        self.stack = ExitStack()
        engine = run_within(torch.autograd._engine_run_backward)
        for context in (
            Devices(),
            Operations(self),
            torch.autograd.set_multithreading_enabled(False),
            mock.patch.object(torch.cuda, "CUDAGraph", Graph),
            mock.patch.object(torch.cuda, "graph", self.capture),
            mock.patch.object(torch.nn.Module, "to", move),
            mock.patch.object(torch.cuda, "synchronize", lambda: None),
            mock.patch.object(torch.autograd, "_engine_run_backward", engine),
        ):
            self.stack.enter_context(context)
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    @contextmanager
    def capture(self, graph, capture_error_mode="global"):
        self.capturing = graph
        self.graphs.append(graph)
        try:
            yield
        finally:
            self.capturing = None


class Graph:
    """torch.cuda.CUDAGraph: what was launched within torch.cuda.graph(self), again and again."""

    def __init__(self):
        self.launches, self.replays = [], 0

    def record(self, func, args, kwargs):
        """Notes a launch and does not run it: memory in use stays as it was, new memory holds
        nothing. Returns the outputs.
        """
        aliases = [
            argument.alias_info
            for argument in func._schema.arguments
            if argument.alias_info is not None
        ]
        if any(alias.is_write for alias in aliases):
            self.launches.append((func, args, kwargs, None))
            return kwargs["out"] if "out" in kwargs else args[0]
        out = func(*args, **kwargs)
        if not aliases:  # a view launches nothing
            for tensor in tree_leaves(out):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
            self.launches.append((func, args, kwargs, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.launches:
            again = func(*args, **kwargs)
            if out is not None:
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    old.copy_(new)


class Operations(TorchDispatchMode):
    """Every operation below autograd: checks the devices, notes waits, computes on the CPU."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [
            value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        ]
        ours = [value for value in tensors if isinstance(value, GpuTensor)]
        hosts = [value for value in tensors if not isinstance(value, GpuTensor) and value.dim()]
        there = bool(ours)
        if kwargs.get("device") is not None:
            there = kwargs["device"].type == "meta"
            kwargs["device"] = torch.device("cpu")
        if not ours and not there:
            return func(*args, **kwargs)
        if ours and hosts and func not in COPIES | INDEXING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func}"
            )
        masks = func in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in WAITS or hosts or masks or func in COPIES and bool(ours) != there:
            self.gpu.waits.append(str(func))
            if self.gpu.capturing:
                raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        known = {
            id(value.inner): value for value in ours
        }  # what is written in place is the same tensor as before
        args, kwargs = tree_map(
            lambda value: value.inner if isinstance(value, GpuTensor) else value, (args, kwargs)
        )
        out = (
            self.gpu.capturing.record(func, args, kwargs)
            if self.gpu.capturing
            else func(*args, **kwargs)
        )
        wrap = lambda value: known[id(value)] if id(value) in known else GpuTensor(value)  # noqa: E731
        return tree_map(
            lambda value: wrap(value) if there and isinstance(value, torch.Tensor) else value, out
        )


class Devices(TorchFunctionMode):
    """Every call from Python: cuda becomes meta, which Operations takes for the GPU; attention is
    computed from its definition.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is torch.bmm and kwargs.get("out_dtype") is torch.float32:
            assert all(part.dtype == torch.bfloat16 for part in args)
            return func(*(part.float() for part in args))
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], GpuTensor):
            return args[0].cpu().tolist()
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], GpuTensor):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        if func in (torch.tensor, torch.as_tensor) and on_gpu(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))


def on_gpu(value):
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def to_meta(value):
    return "meta" if on_gpu(value) else value


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """softmax(Q K^T scale + mask) V in float32."""
    assert dropout_p == 0 and not (is_causal and attn_mask is not None)
    length, columns = query.shape[-2], key.shape[-2]
    if isinstance(attn_mask, CausalBias):
        assert (attn_mask.variant, attn_mask.seq_len_q, attn_mask.seq_len_kv) == (
            CausalVariant.LOWER_RIGHT,
            length,
            columns,
        )
    if is_causal or isinstance(
        attn_mask, CausalBias
    ):  # torch's is_causal is that of the upper left corner
        attn_mask = torch.ones(length, columns, dtype=torch.bool, device="meta").tril(
            0 if is_causal else columns - length
        )
    if enable_gqa:
        key, value = (
            states.repeat_interleave(query.shape[1] // states.shape[1], 1)
            for states in (key, value)
        )
    assert key.shape[1] == query.shape[1] and query.dtype == key.dtype == value.dtype
    scores = (
        query.float()
        @ key.float().transpose(-1, -2)
        * (query.shape[-1] ** -0.5 if scale is None else scale)
    )
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, float("-inf"))
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


def run_within(engine):
    """autograd's engine runs Python too, where checkpoints are computed again; Tensor.backward
    calls it with Devices off.
    """

    def run(*args, **kwargs):
        with Devices():
            return engine(*args, **kwargs)

    return run


def move(module, device):
    """torch.nn.Module.to("cuda"): new parameters and buffers; what is tied stays tied."""
    assert on_gpu(device)
    moved = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in moved:
                    there = tensor.detach().to("cuda")
                    moved[id(tensor)] = (
                        torch.nn.Parameter(there, tensor.requires_grad)
                        if store is part._parameters
                        else there
                    )
                if tensor is not None:
                    store[name] = moved[id(tensor)]
    return module
