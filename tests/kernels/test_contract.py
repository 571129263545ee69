"""What every operator promises on every backend that it declares; an operator adds cases, not test code."""

import random
from importlib import import_module

import pytest
import torch
from torch import Tensor

import cogvx_kernels
from cogvx_kernels import use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.testing import assert_as_accurate, devices, noncontiguous, poisoned_memory

CASES = {name: import_module(f"cogvx_kernels.{name}.cases") for name in OPS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 200  # until one is for a backend that is for some shapes alone; then the last says why none is

# An interpreted kernel takes a thousand times as long as a compiled one. Outside `make soak` it gets small cases of
# more than so many numbers in one dtype each, which dtypes take in turns; only the first cases for a rule about what
# is given, hardly about how much; and one of so many calls of a fuzz.
INTERPRETED = () if torch.cuda.is_available() else ("triton",)
ON_HOST = (*INTERPRETED, "cuda") if INTERPRETED else ()  # slow, too; it gets all but what is the same for many cases
MANY_NUMBERS, FIRST_CASES, FUZZ_SHARE = 8192, 3, 4

ALL = [(name, backend) for name, op in OPS.items() for backend in ("reference", *op.backends)]
ALL_DTYPES = [(name, backend, dtype) for name, backend in ALL for dtype in DTYPES if dtype in OPS[name].dtypes(backend)]

each_backend = pytest.mark.parametrize(("name", "backend"), ALL)
each_backend_with_gradients = pytest.mark.parametrize(("name", "backend"), [x for x in ALL if OPS[x[0]].differentiable])
each_backend_and_dtype = pytest.mark.parametrize(("name", "backend", "dtype"), ALL_DTYPES, ids=str)
each_device = pytest.mark.parametrize("device", devices())


def calls(sample, soak):
    """How many calls a fuzz makes: a few in every run, the full count under the marker soak."""
    return pytest.mark.parametrize("count", [sample, pytest.param(soak, marks=pytest.mark.soak)])


each_op = pytest.mark.parametrize("name", OPS)
each_op_with_gradients = pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
each_op_without_gradients = pytest.mark.parametrize("name", [name for name, op in OPS.items() if not op.differentiable])


def public(name):
    return getattr(cogvx_kernels, name)


def opaque(name):
    return getattr(torch.ops.cogvx, name)


def takes(name, backend, args):
    """Whether a call is for this backend: one with FOR_SHAPES leaves others to the next, any other must take all."""
    module = OPS[name]._module(backend)
    return not hasattr(module, "FOR_SHAPES") or OPS[name].why_not(backend, *args) is None


def small_calls(name, backend, device, run_on, dtype=None):
    """The arguments of the small cases that are for this backend, at least two."""
    dtype = dtype or OPS[name].dtypes(backend)[0]
    every = [case(dtype=dtype, device=device) for case in CASES[name].SMALL]
    calls = [args for args in every if takes(name, backend, args)]
    if not calls:
        run_on(name, backend, *every[0])  # says why the backend cannot run here at all
    assert len(calls) >= 2
    for args in calls:
        run_on(name, backend, *args)
    return calls


def first_calls(name, backend, device, run_on, at_most=None):
    """The first of them, for a rule that is kept or broken by what is given, hardly by how much of it."""
    at_most = FIRST_CASES if backend in ON_HOST else at_most
    return small_calls(name, backend, device, run_on)[:at_most]


def in_turns(calls, name, backend, dtype):
    """What of all small calls is for this dtype in every run, and what is left to `make soak`."""
    large = [i for i, args in enumerate(calls) if sum(x.numel() for x in tensors(args)) > MANY_NUMBERS]
    dtypes = OPS[name].dtypes(backend)
    others = set(large) - set(large[dtypes.index(dtype) :: len(dtypes)]) if backend in INTERPRETED else ()
    return [x for i, x in enumerate(calls) if i not in others], [calls[i] for i in sorted(others)]


def parts(y):
    return y if isinstance(y, tuple) else (y,)


def tensors(args):
    return [x for x in args if isinstance(x, Tensor)]


def changed(args, change):
    """The arguments with every tensor changed."""
    return tuple(change(x) if isinstance(x, Tensor) else x for x in args)


def leaves(args):
    return changed(args, lambda x: x.detach().requires_grad_())


def make_grads(y):
    generator = torch.Generator(y[0].device).manual_seed(1)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float32, device=p.device).to(p.dtype) for p in y]


def differentiate(name, function, args, grads):
    """The results and the gradient of every tensor argument, where the operator has gradients."""
    if not OPS[name].differentiable:
        return parts(function(*args)), ()
    args = leaves(args)
    y = parts(function(*args))
    grads = [grad.to(p.dtype) for grad, p in zip(grads, y, strict=True)]
    return y, torch.autograd.grad(y, tensors(args), grads, allow_unused=True, materialize_grads=True)


def check_accuracy(name, args):
    """Results and gradients of the live backend against the reference in the same dtype and in float64.

    New memory is full of NaN, so that what is not written, or read before it is written, shows in every call.
    """
    reference = OPS[name].reference.forward
    grads = make_grads([p.detach() for p in parts(reference(*args))])
    with poisoned_memory():
        y, found = differentiate(name, opaque(name), args, grads)
    y_eager, eager = differentiate(name, reference, args, grads)
    y_exact, exact = differentiate(name, reference, changed(args, Tensor.double), grads)
    largest = getattr(CASES[name], "largest", lambda *_: None)
    for i, p in enumerate(y):
        if p.numel():
            assert_as_accurate(p, y_eager[i], y_exact[i], what=f"result {i}", largest=largest(*args))
    arguments = [a for a, x in zip(OPS[name].arguments, args, strict=True) if isinstance(x, Tensor)]
    for argument, gradient, other, truth in zip(arguments, found, eager, exact, strict=bool(found)):
        assert_as_accurate(gradient, other, truth, factor=3.0, what=f"gradient of {argument}")


@each_device
@each_backend_and_dtype
def test_results_and_gradients(name, backend, dtype, device, run_on):
    for args in in_turns(small_calls(name, backend, device, run_on, dtype), name, backend, dtype)[0]:
        with use_backend(backend):
            check_accuracy(name, args)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "backend", "dtype"), [x for x in ALL_DTYPES if x[1] in INTERPRETED], ids=str)
def test_results_and_gradients_in_the_other_dtypes(name, backend, dtype, run_on):
    for args in in_turns(small_calls(name, backend, "cpu", run_on, dtype), name, backend, dtype)[1]:
        with use_backend(backend):
            check_accuracy(name, args)


@each_device
@each_backend
def test_noncontiguous_arguments_and_gradients(name, backend, device, run_on):
    for args in first_calls(name, backend, device, run_on, 4):
        gapped = changed(args, noncontiguous)
        run_on(name, backend, *gapped)
        with use_backend(backend):
            check_accuracy(name, gapped)
            y = parts(opaque(name)(*args))
            grads = make_grads(y)
            _, expected = differentiate(name, opaque(name), args, grads)
            _, found = differentiate(name, opaque(name), args, [noncontiguous(grad) for grad in grads])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@each_device
@each_backend
def test_every_value_is_written(name, backend, device, run_on):
    for args in first_calls(name, backend, device, run_on):
        with use_backend(backend):
            y = parts(opaque(name)(*args))
            grads = make_grads(y)
            with poisoned_memory(fills=False):
                clean = differentiate(name, opaque(name), args, grads)
            with poisoned_memory():
                assert torch.empty(1, device=device).isnan().all()
                poisoned = differentiate(name, opaque(name), args, grads)
        for a, b in zip(clean[0] + clean[1], poisoned[0] + poisoned[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_new_memory(results, others):
    filled = [x.untyped_storage().data_ptr() for x in (*results, *others) if x.numel()]
    assert len(set(filled)) == len(filled)
    assert not any(x.requires_grad for x in results)


@each_device
@each_backend
def test_results_are_new_memory(name, backend, device, run_on):
    for args in first_calls(name, backend, device, run_on):
        with use_backend(backend):
            assert_new_memory(parts(opaque(name)(*args)), tensors(args))


@each_device
@each_backend_with_gradients
def test_gradients_are_new_memory(name, backend, device, run_on):
    for args in first_calls(name, backend, device, run_on, 5):
        with use_backend(backend):
            needs = [isinstance(args[i], Tensor) for i in OPS[name]._tensors]
            grads = make_grads(parts(opaque(name)(*args)))
            found = getattr(torch.ops.cogvx, f"{name}_backward")(grads, needs, *args)
            assert_new_memory(found, [*tensors(args), *grads])


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def registered(name, args):
    """The operator, and that of its gradients where it has them, with arguments; the second wants no gradient."""
    if not OPS[name].differentiable:
        return [(opaque(name).default, args)]
    needs = [isinstance(args[i], Tensor) and i != 1 for i in OPS[name]._tensors]
    grads = make_grads(parts(opaque(name)(*args)))
    backward = getattr(torch.ops.cogvx, f"{name}_backward").default
    return [(opaque(name).default, leaves(args)), (backward, (grads, needs, *args))]


@each_device
@each_backend
def test_opcheck(name, backend, device, run_on):
    for args in small_calls(name, backend, device, run_on)[:2]:
        with use_backend(backend):
            for call in registered(name, args):
                torch.library.opcheck(*call, test_utils=OPCHECKS)


def in_soak(backend):
    """A graph holds the operator whole, and the backend is chosen when it runs: one shows how it is traced."""
    return () if backend == "reference" else pytest.mark.soak


@each_device
@pytest.mark.parametrize(("name", "backend"), [pytest.param(*x, marks=in_soak(x[1])) for x in ALL])
def test_graphs_of_unknown_sizes(name, backend, device, run_on):
    args = small_calls(name, backend, device, run_on)[0]
    with use_backend(backend):
        for call in registered(name, args):
            torch.library.opcheck(*call, test_utils="test_aot_dispatch_dynamic")


FACES = [(public, *x) for x in ALL] + [pytest.param(opaque, *x, marks=in_soak(x[1])) for x in ALL]


@each_device
@pytest.mark.parametrize(("face", "name", "backend"), FACES)
def test_fullgraph_compile(face, name, backend, device, run_on):
    function, args = face(name), small_calls(name, backend, device, run_on)[0]

    def model(*args):
        return tuple(p * 2 for p in parts(function(*args)))

    torch.compiler.reset()
    with use_backend(backend):
        grads = make_grads(parts(function(*args)))
        compiled = differentiate(name, torch.compile(model, fullgraph=True, backend="aot_eager"), args, grads)
        eager = differentiate(name, model, args, grads)
    for a, b in zip(compiled[0] + compiled[1], eager[0] + eager[1], strict=True):
        torch.testing.assert_close(a, b)


@each_op
def test_meta_tensors_have_the_real_shapes(name):
    for case in CASES[name].SMALL:
        args = case()
        if not len(args[0]):
            continue  # torch's own meta kernel for nearest resizing fails on an empty batch
        for call in (opaque(name), public(name)):
            on_meta = parts(call(*changed(args, lambda x: x.to("meta"))))
            for meta, real in zip(on_meta, parts(call(*args)), strict=True):
                assert meta.device.type == "meta"
                assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@each_op
def test_channels_last_chunks_give_channels_last_results(name):
    args = CASES[name].SMALL[0]()
    if args[0].dim() != 5:
        assert parts(opaque(name)(*args))[0].is_contiguous()
        return
    args = (args[0].contiguous(memory_format=torch.channels_last_3d), *args[1:])
    check_accuracy(name, args)
    assert parts(opaque(name)(*args))[0].is_contiguous(memory_format=torch.channels_last_3d)
    torch.library.opcheck(opaque(name).default, leaves(args), test_utils="test_faketensor")


@each_device
@each_backend
def test_autocast_gives_low_precision_and_full_precision_gradients(name, backend, device, run_on):
    args = CASES[name].SMALL[0](device=device)
    run_on(name, backend, *CASES[name].SMALL[0](dtype=torch.bfloat16, device=device))
    low_dtypes = [p.dtype for p in parts(OPS[name].reference.forward(*changed(args, Tensor.bfloat16)))]
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        for function in (opaque(name), public(name)):
            mixed = leaves(args)
            y = parts(function(*(x.bfloat16() if x is mixed[0] else x for x in mixed)))
            assert y[0].dtype == torch.bfloat16
            assert [p.dtype for p in y] == low_dtypes[: len(y)]
            if not OPS[name].differentiable:
                continue
            found = torch.autograd.grad(y, tensors(mixed), make_grads(y), allow_unused=True, materialize_grads=True)
            assert {g.dtype for g in found} == {torch.float32}


@each_op_with_gradients
def test_second_derivatives_are_refused_rather_than_wrong(name):
    args = leaves(CASES[name].SMALL[0]())
    first = torch.autograd.grad(parts(opaque(name)(*args))[0].square().sum(), args[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"^{name}: second derivatives are not supported"):
        torch.autograd.grad(first.sum(), args[0])


@each_op_without_gradients
def test_an_operator_without_gradients_refuses_them(name):
    for function in (opaque(name), public(name)):
        y = parts(function(*leaves(CASES[name].SMALL[0]())))[0]
        with pytest.raises(RuntimeError, match=f"^{name} is for inference: it has no gradient"):
            y.sum().backward()


@calls(30, 1000)
@each_device
@each_backend
def test_legal_fuzz(name, backend, device, count, run_on, request):
    rng = random.Random(f"{name} {backend} legal")
    if backend in INTERPRETED and request.node.get_closest_marker("soak") is None:
        count //= FUZZ_SHARE
    for i in range(request.config.getoption("--calls") or count):
        dtype, scale = rng.choice(OPS[name].dtypes(backend)), 10.0 ** rng.uniform(-3, 3)
        for _ in range(DRAWS):
            case = CASES[name].draw(rng)
            args = case(dtype=dtype, device=device, seed=i, scale=scale)
            if takes(name, backend, args):
                break
        if rng.random() < 0.3:
            args = changed(args, noncontiguous)
        run_on(name, backend, *args)
        with use_backend(backend):
            try:
                check_accuracy(name, args)
            except AssertionError as error:
                raise AssertionError(f"{case} dtype={dtype} scale={scale:.3g} seed={i}: {error}") from None


def spoil(name, args, rng):
    """The arguments with one of them made illegal, and its name."""
    names, args = OPS[name].arguments, list(args)
    kind = rng.choice(["rank", "dtype", "device", "type", "listed", "listed"])
    if kind == "listed":
        argument, change = rng.choice(CASES[name].ILLEGAL)
        i = names.index(argument)
        args[i] = change(args[i])
        return argument, args
    given = [j for j, x in enumerate(args) if isinstance(x, Tensor)]
    i = rng.choice(given if kind != "device" else given[1:])
    if kind == "rank":
        args[i] = args[i][None]
    elif kind == "dtype":
        args[i] = args[i].to(rng.choice([torch.int64, torch.complex64, torch.bool]))
    elif kind == "device":
        args[i] = args[i].to("meta")
    else:
        args[i] = rng.choice([3, "x", [1.0], object()])
    return names[i], args


@calls(60, 5000)
@each_backend
def test_illegal_fuzz(name, backend, count):
    rng = random.Random(f"{name} {backend} illegal")
    for _ in range(count):
        args = rng.choice([case for case in CASES[name].SMALL if case.args[0]])()
        argument, args = spoil(name, args, rng)
        with use_backend(backend), pytest.raises(ValueError, match=rf"^{name}: ") as caught:
            public(name)(*args)
        message = str(caught.value)
        assert "got" in message and "\n" not in message, (argument, message)


@each_op
def test_illegal_arguments_are_named(name):
    args = CASES[name].SMALL[0]()
    for argument, change in CASES[name].ILLEGAL:
        i = OPS[name].arguments.index(argument)
        with pytest.raises(ValueError, match=rf"^{name}: "):
            public(name)(*args[:i], change(args[i]), *args[i + 1 :])


@each_op
def test_real_cases_are_legal(name):
    for case in CASES[name].REAL.values():
        args = case.func(*case.args, **case.keywords, device="meta", dtype=torch.bfloat16)
        assert parts(opaque(name)(*args))[0].numel() > 0
