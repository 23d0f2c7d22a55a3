"""What Python does for one eager call of the mixer on the Triton path, launches left out.

The forward pass and a launch are timed, the backward pass's calls of functions are counted. Times
are the thread's own, so that other programs' turns do not count, and the least of many; those of a
baseline are taken in turns with them. On a core that needs longer than USUAL for an autograd
function with the forward pass's allocations, all may take longer in proportion; on one that needs
longer than BUSY, where others share its caches, the functions that the forward pass calls count.
"""

import importlib
import sys
import time
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton")

from cases import MIXERS, mixer_inputs  # noqa: E402

from mambavision import ops  # noqa: E402

mixer = importlib.import_module("mambavision.kernels.mixer")
device = importlib.import_module("mambavision.kernels._device")

# Microseconds of an autograd function that does nothing but the same allocations
USUAL, BUSY = 10.0, 18.0
# Above it; for one launch
FORWARD, LAUNCH = 15.0, 5.0
# Functions that a pass calls: ours, allocations, views, sums, products, sizes
FORWARD_CALLS, BACKWARD = 121, 155


class Allocations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        xz, dt_rank, dstate = inputs[0], inputs[4].shape[1], inputs[5].shape[1]
        batch, seqlen, columns = xz.shape
        yz = xz.new_empty(batch, seqlen, columns)
        xz.new_empty(batch, seqlen, columns // 2)
        dt_low = xz.new_empty(batch, seqlen, dt_rank)
        BC = xz.new_empty(batch, seqlen, 2 * dstate)
        xz.new_empty(batch, columns // 2, dstate)
        ctx.save_for_backward(*inputs, dt_low, BC, xz.new_empty(0), xz.new_empty(0))
        return yz

    @staticmethod
    def backward(ctx, dyz):
        raise NotImplementedError


def calls_of(function):
    """How many functions it calls, Python's and C's, methods of tensors included."""
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(event) if event.endswith("call") else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(seen)


def fastest(*calls, repetitions=60, count=50):
    """Least microseconds of each call; they take turns, so that a disturbance meets all."""
    least = [float("inf")] * len(calls)
    for _ in range(repetitions):
        for i, call in enumerate(calls):
            start = time.thread_time()
            for _ in range(count):
                call()
            least[i] = min(least[i], (time.thread_time() - start) / count * 1e6)
    return least


def assert_within(limit, *calls):
    """The last call sets the pace. A disturbance of seconds is waited out."""
    for _ in range(5):
        *times, empty = fastest(*calls)
        if limit(*times) <= max(1.0, empty / USUAL):
            return
        time.sleep(2)
    if empty > BUSY:
        pytest.skip(f"others share this core's caches: {empty:.0f} us for an empty function")
    raise AssertionError((*times, empty))


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch):
    """Filling fresh memory with NaN, as other tests do, takes longer than all that is measured."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels, in place of their launches."""
    names = []
    monkeypatch.setattr(device, "launch", lambda kernel, *call: names.append(kernel.fn.__name__))
    return names


def inputs():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    made = mixer_inputs(MIXERS[0], device=where)
    made["xz"].requires_grad_()
    return made


def test_eager_mixer(launched):
    given = inputs()
    values = tuple(given.values())
    bare = partial(Allocations.apply, *values)
    run = partial(ops.mixer, **given, backend="triton")
    run()
    assert calls_of(run) <= FORWARD_CALLS
    assert_within(lambda ours, bare: (ours - bare) / FORWARD, run, bare, bare)
    assert set(launched) == {"_project_kernel", "_scan_fwd_kernel"}  # the call was the whole call


def backward_pass():
    given = inputs()
    values = (*given.values(), None, None)
    with torch.no_grad():
        yz, *kept = mixer.mixer_fwd(*values, True)
    return values, lambda: mixer.mixer_bwd(torch.zeros_like(yz), *values, *kept)


def test_backward_pass(launched):
    """In calls: what they take differs between processors by more than a mistake costs."""
    _, run = backward_pass()
    launched.clear()
    with torch.no_grad():
        run()
        assert calls_of(run) <= BACKWARD
    assert len(set(launched)) == 4


def test_library_calls_of_the_backward_pass(launched):
    """Each is a launch, too: a sum over programs of what the convolutions leave, and products for
    two weights."""

    seen = []

    class Work(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view and "empty" not in function.name():
                seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    _, run = backward_pass()
    with torch.no_grad(), Work():
        run()
    assert sorted(seen) == ["mm", "mm", "sum", "zeros_like"]


class Kernel:
    """In a kernel's place: counts how often it compiles, and notes what its codes run with."""

    def __init__(self, kernel):
        self.arg_names, self.compiled, self.ran = kernel.arg_names, 0, []

    def __getitem__(self, grid):
        def compile_and_run(*args, **options):
            self.compiled += 1
            constants = [options[name] for name in self.arg_names[len(args) :]]
            self.ran.append((grid, (*args, *constants)))
            return Code(self.ran)

        return compile_and_run


class Code:
    def __init__(self, ran):
        self.ran = ran

    def __getitem__(self, grid):
        return lambda *args: self.ran.append((grid[:1], args))


def asked_of_launch():
    """The launches of a forward and a backward pass."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "launch", lambda *call: asked.append(call))
        backward_pass()[1]()
    return asked


def same(a, b):
    return all(x is y if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_launches_tell_codes_apart():
    for real, grid, args, options in asked_of_launch():
        kernel, args = Kernel(real), list(args)
        for _ in range(3):
            device.launch(kernel, grid, args, options)
        assert kernel.compiled == 1
        first, second, third = kernel.ran
        assert len(first[1]) == len(kernel.arg_names)
        assert first[0] == second[0] == third[0] == grid
        assert same(first[1], second[1]) and same(first[1], third[1])

        others = []
        for i, x in enumerate(args):
            if isinstance(x, torch.Tensor):
                others.append((i, x.double()))
                if x.numel() > 1:
                    others.append((i, x.flatten()[1:]))
                if i > 0:
                    others.append((i, None))
            elif x is not None:
                others.append((i, x + 1))
        changes = [([*args[:i], x, *args[i + 1 :]], options) for i, x in others]
        changes += [(args, {**options, name: value + 1}) for name, value in options.items()]
        for count, change in enumerate(changes, start=2):
            device.launch(kernel, grid, *change)
            device.launch(kernel, grid, *change)
            assert kernel.compiled == count, (real, change)
        # All of them are still known
        device.launch(kernel, (5,), args, options)
        assert kernel.compiled == count
        assert kernel.ran[-1][0] == (5,) and same(kernel.ran[-1][1], first[1])


def test_launch():
    asked = asked_of_launch()
    calls = [partial(device.launch, Kernel(real), *call) for real, *call in asked]
    assert_within(
        lambda *ours: max(ours) / LAUNCH, *calls, partial(Allocations.apply, *inputs().values())
    )
