"""Calls of operators that hand results on, bound as one, so that a backend may make them one call.

What a function does is traced, and the trace is the one parameter of a primitive. To every
transformation the primitive is that function: it is traced anew, transformed. Where it is lowered
for a single device, one implementation serves all its calls and can join them, the program has the
joint call; elsewhere it has the calls that the function says. Outside `jax.jit` it runs them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.interpreters import ad, batching, mlir

from jax_nsa import _compat, backends, operator, primitive
from jax_nsa.backends import Call

# They change how JAX types an array inside `jax.shard_map`; lowered, it has no such type.
_OF_TYPES_ONLY = ("pvary", "pcast", "reshard")

# From the operands of each call to the results of each.
Joint = Callable[[Sequence[Sequence[jax.Array]]], Sequence[Sequence[jax.Array]]]


@runtime_checkable
class Joins(Protocol):
    """What a backend has that makes several calls one."""

    def joins_here(self) -> bool:
        """Whether programs of this process may need it."""

    def joint(self, calls: Sequence[Call], platform: str) -> Joint | None:
        """The calls as one; None where it cannot be.

        An operand of the name of a result of the first call has that result's elements, in order.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class _Traced:
    """What a function of the operands does; its inputs are the trace's constants."""

    jaxpr: Any

    def __call__(self, *operands: jax.Array) -> list[jax.Array]:
        return jax.core.eval_jaxpr(self.jaxpr, operands)


def bind(function: Callable[[], Any], implementation: str | Sequence[str] | None) -> Any:
    """Calls the function, whose operators' calls may become one.

    Args:
        function: takes all its arrays from where it is defined, and gives a pytree of arrays.
        implementation: what each call in it is told.
    """
    names = backends.parse(implementation) or tuple(backends.ALL)
    of = [backends.ALL[name] for name in names]
    joins = any(isinstance(backend, Joins) and backend.joins_here() for backend in of)
    if not joins or not _compat.is_tracing():
        return function()
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    results = _bind(closed.jaxpr, closed.consts)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _bind(jaxpr: Any, operands: Iterable[jax.Array]) -> Sequence[jax.Array]:
    return _primitive.bind(*operands, traced=_Traced(jaxpr))


def _lower(
    platform: str | None, ctx: mlir.LoweringRuleContext, *operands: Any, traced: _Traced
) -> Sequence[Any]:
    joined = None
    if _compat.automatic_devices(ctx) <= 1:
        joined = _joined(ctx, platform or _compat.single_platform(ctx), traced.jaxpr)
    if joined is None:
        return mlir.lower_fun(traced, multiple_results=True)(ctx, *operands)
    return primitive.lower_function(ctx, joined, operands)


def _joined(
    ctx: mlir.LoweringRuleContext, platform: str, jaxpr: Any
) -> Callable[..., Sequence[jax.Array]] | None:
    """The function with one call in place of all, if there is a backend that has it."""
    equations = [e for e in jaxpr.eqns if e.primitive in _operators()]
    try:
        chosen = [_choose(ctx, platform, equation) for equation in equations]
    except NotImplementedError:
        return None  # the call that has no implementation says so when it is lowered
    if not chosen:
        return None
    (backend, first), *later = chosen
    if not isinstance(backend, Joins) or any(other is not backend for other, _ in later):
        return None
    names = [result.name for result in first.operator.results(first.problem)]
    results = dict(zip(names, equations[0].outvars, strict=True))
    computed = _computed_from_calls(jaxpr)
    for equation, (_, call) in zip(equations[1:], later, strict=True):
        for name, operand in zip(call.names, equation.invars, strict=True):
            if name in results:
                if not _is_handed_on(jaxpr, results[name], operand):
                    return None
            elif not _is_literal(operand) and operand in computed:
                return None  # all operands must be there before the joint call
    joint = backend.joint([call for _, call in chosen], platform)
    return None if joint is None else functools.partial(_run_joined, jaxpr, joint)


def _operators() -> Mapping[Any, operator.Operator]:
    return {o.primitive: o for o in operator.ALL.values()}


def _choose(
    ctx: mlir.LoweringRuleContext, platform: str, equation: Any
) -> tuple[backends.Backend, Call]:
    """The call of an equation, and the implementation that it gets."""
    params = dict(equation.params)
    implementation = params.pop("implementation")
    params["on_fault"] = primitive.default_on_fault(ctx, params["on_fault"])
    avals = tuple(variable.aval for variable in equation.invars)
    call = Call(_operators()[equation.primitive], avals, **params)
    return backends.choose(platform, implementation, call), call


def _run_joined(jaxpr: Any, joint: Joint, *operands: jax.Array) -> Sequence[jax.Array]:
    """Evaluates twice: for the operands of all calls, and with the results of the joint one.

    The first time results are zeros. The joint call uses nothing that depends on them.
    """
    found: list[Sequence[jax.Array]] = []

    def find(equation: Any, values: Sequence[jax.Array]) -> Sequence[jax.Array]:
        found.append(values)
        return [jax.numpy.zeros(v.aval.shape, v.aval.dtype) for v in equation.outvars]

    _evaluate(jaxpr, operands, find)
    results = iter(joint(found))
    return _evaluate(jaxpr, operands, lambda *_: next(results))


def _evaluate(
    jaxpr: Any,
    operands: Sequence[jax.Array],
    call: Callable[[Any, Sequence[jax.Array]], Sequence[jax.Array]],
) -> list[jax.Array]:
    """Evaluates a trace, its operators' calls by `call`."""
    values = dict(zip(jaxpr.constvars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _is_literal(atom) else values[atom]

    operators = _operators()
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        compute = call if equation.primitive in operators else _compute
        values |= zip(equation.outvars, compute(equation, inputs), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _compute(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    its = equation.primitive
    if its.name in _OF_TYPES_ONLY:
        return inputs
    outputs = its.bind(*inputs, **its.get_bind_params(equation.params))
    return outputs if its.multiple_results else [outputs]


def _computed_from_calls(jaxpr: Any) -> set[Any]:
    """What depends on results of operators' calls."""
    computed: set[Any] = set()
    operators = _operators()
    for equation in jaxpr.eqns:
        inputs = (atom for atom in equation.invars if not _is_literal(atom))
        if equation.primitive in operators or any(atom in computed for atom in inputs):
            computed |= set(equation.outvars)
    return computed


def _is_handed_on(jaxpr: Any, result: Any, operand: Any) -> bool:
    """Whether an operand has the elements of a result, in the same order: by trying."""
    count = result.aval.size
    if not isinstance(count, int):
        return False
    numbers = np.arange(count, dtype=result.aval.dtype)
    known = {result: numbers.reshape(result.aval.shape)}
    with jax.ensure_compile_time_eval():
        for equation in jaxpr.eqns:
            inputs = [atom for atom in equation.invars if not _is_literal(atom)]
            if inputs and all(atom in known for atom in inputs):
                inputs = [a.val if _is_literal(a) else known[a] for a in equation.invars]
                known |= zip(equation.outvars, _compute(equation, inputs), strict=True)
    return (
        not _is_literal(operand)
        and operand in known
        and np.array_equal(np.ravel(known[operand]), numbers)
    )


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _batch(operands: Any, dims: Any, *, traced: _Traced) -> Any:
    whole = [
        x if d is None else batching.bdim_at_front(x, d, x.shape[d])
        for x, d in zip(operands, dims, strict=True)
    ]
    mapped = jax.vmap(traced, in_axes=[None if d is None else 0 for d in dims])
    closed = jax.make_jaxpr(lambda: mapped(*whole))()
    results = _bind(closed.jaxpr, closed.consts)
    return results, [0] * len(results)


def _jvp(primals: Any, tangents: Any, *, traced: _Traced) -> Any:
    return jax.jvp(traced, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


_primitive = _compat.Primitive("jax_nsa_chain")
_primitive.multiple_results = True
_primitive.def_impl(lambda *operands, traced: traced(*operands))
_primitive.def_abstract_eval(lambda *_, traced: [v.aval for v in traced.jaxpr.outvars])
_compat.tell_devices(_primitive)
primitive.register_lowering(_primitive, _lower)
ad.primitive_jvps[_primitive] = _jvp
batching.primitive_batchers[_primitive] = _batch
