"""Order on the device: the current stream, no waiting of the host, CUDA graphs, devices."""

import pytest
import torch

import nwfast

LONG = 400_000_000  # clock cycles, 0.2 s or more: longer than launching whatever follows takes


def same(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_current_stream(call, problem, form):
    """A call on a side stream waits for what was put there before it, and a call on another stream does not."""
    tensors, exclude_self = problem(form)
    expected = call(tensors, exclude_self)
    value = torch.zeros_like(tensors[2])
    late = [*tensors[:2], value, *tensors[3:]]
    call(late, exclude_self)  # nothing is compiled or allocated from here on
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        value.copy_(tensors[2])
        out = call(late, exclude_self)
    early = call(late, exclude_self)  # while the side stream sleeps, on the default stream
    torch.cuda.current_stream().synchronize()
    assert not early.any(), "the default stream waited for the side stream: this shows nothing"
    side.synchronize()
    assert torch.equal(out, expected)


def test_backward_pass_on_a_side_stream(differentiate, problem, form):
    tensors, exclude_self = problem(form)
    expected = differentiate(tensors, exclude_self)
    value = torch.zeros_like(tensors[2])
    late = [*tensors[:2], value, *tensors[3:]]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        value.copy_(tensors[2])
        found = differentiate(late, exclude_self)
    side.synchronize()
    assert same(found, expected)


def test_the_host_does_not_wait(differentiate, problem, form):
    """Neither in torch, which would raise, nor in a kernel's launch: the device still sleeps when the calls return."""
    tensors, exclude_self = problem(form)
    differentiate(tensors, exclude_self)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(LONG)
        differentiate(tensors, exclude_self)
        end = torch.cuda.Event()
        end.record()
        assert not end.query(), "the device was done when the call returned"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def capture(function):
    """A graph of the function, and the results that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def test_graph_of_the_forward_pass(call, problem, form):
    tensors, exclude_self = problem(form)
    graph, (out, lse) = capture(lambda: call(tensors, exclude_self, return_lse=True))
    for step in range(3):
        tensors[0].mul_(0.9)
        tensors[2].add_(step)
        graph.replay()
        assert same((out, lse), call(tensors, exclude_self, return_lse=True))


def test_graph_of_forward_and_backward_pass(call, problem, form):
    tensors, exclude_self = problem(form)
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in tensors]
    required = [x for x in leaves if isinstance(x, torch.Tensor)]

    def step():
        out = call(leaves, exclude_self)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), required)]

    graph, results = capture(step)
    for _ in range(3):
        with torch.no_grad():
            leaves[0].mul_(0.9)
            leaves[2].add_(0.5)
        graph.replay()
        assert same(results, step())


def test_graph_of_a_training_step(kernels):
    x = torch.linspace(0, 5, 50)
    y = x.sin()

    def trained(replayed: bool) -> torch.Tensor:
        net = nwfast.NWKernelRegression(w=1.0, backend=kernels)
        trainer = torch.optim.SGD(net.parameters(), lr=0.1)

        def step():
            trainer.zero_grad()
            ((net(x, x, y, exclude_self=True) - y) ** 2 / 2).sum().backward()
            trainer.step()

        if not replayed:
            for _ in range(6):
                step()
            return net.w.detach()
        graph, _ = capture(step)
        # The two steps of the warm-up count; the capture runs nothing.
        for _ in range(4):
            graph.replay()
        return net.w.detach()

    assert torch.equal(trained(True), trained(False))


def test_the_current_device_stays(differentiate, problem):
    tensors, _ = problem("1-D")
    before = torch.cuda.current_device()
    differentiate(tensors)
    assert torch.cuda.current_device() == before


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"it needs 2 GPUs, there are {torch.cuda.device_count()}"
)
def test_tensors_on_a_device_that_is_not_the_current_one(call, differentiate, problem, form):
    tensors, exclude_self = problem(form)
    expected = differentiate(tensors, exclude_self)
    moved = [x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in tensors]
    assert torch.cuda.current_device() == 0
    found = differentiate(moved, exclude_self)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.to("cuda:0"), b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="key must be on the device of query, cuda:1, got cuda:0"):
        call([moved[0], *tensors[1:]], exclude_self)


def test_tensors_on_the_cpu_are_refused(call, problem):
    tensors, _ = problem("1-D")
    with pytest.raises(ValueError, match="key must be on the device of query, cuda:0, got cpu"):
        call([tensors[0], tensors[1].cpu(), *tensors[2:]])
