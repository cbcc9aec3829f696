"""The shapes and dtypes in the signatures of the public functions hold when programs run."""

PROGRAM = '''
import jaxtyping

# Their calls and results; of the modules that give NamedTuples of a generic kind, the results alone, below.
CHECKED = ["mpisjax." + name for name in ("bicgstab", "jacobian", "neurons", "residuals")]
with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    import mpisjax
    from mpisjax import Adjoint, IF, LIF, GradedIF, RateForward, SpikeForward, TernaryIF
    from mpisjax.jacobian import jacobian_penalty, spectral_radius

import typing
import jax, jax.numpy as jnp, pytest


@jaxtyping.jaxtyped(typechecker=None)
def check(result):
    """Every field has the shape and dtype that its class says; sizes of one name agree."""
    checked = 0
    for name, hint in typing.get_type_hints(type(result)).items():
        value = getattr(result, name)
        if typing.get_origin(hint) is dict:
            hint = jaxtyping.PyTree[typing.get_args(hint)[1]]
        if not isinstance(hint, typing.TypeVar) and hint is not jaxtyping.PyTree:
            assert isinstance(value, hint), (type(result), name, value, hint)
            checked += 1
    assert checked


key = jax.random.key(0)
p = {"in": jnp.ones((3, 4)) / 3, "back": jnp.ones((4, 4)) / 9, "theta": jnp.ones(4)}
x, init = jnp.ones((5, 3)) / 2, (jnp.zeros((5, 4)), jnp.zeros((5, 4)))


def transition(p, z, x, fire):
    first = fire("first", x @ p["in"] + z[1] @ p["back"], LIF(p["theta"], leak=0.9))
    return first, fire("second", first @ p["back"])


cases = [
    (IF(), RateForward(), "neumann"),
    (LIF(leak=0.9), SpikeForward(9, tol=0.1), "bicgstab"),
    (TernaryIF(), RateForward("anderson"), "anderson"),
    (GradedIF(3), SpikeForward(3), "normal_cg"),
]
for neuron, forward, solver in cases:

    def loss(p, probe):
        eq = mpisjax.equilibrium_forward(
            transition, p, x, init, neuron=neuron, forward=forward, adjoint=Adjoint(solver), probe=probe
        )
        check(eq)
        return sum(r.sum() for r in eq.rates)

    check(jax.jit(jax.grad(loss, (0, 1)))(p, mpisjax.adjoint_probe(5))[1])
one = mpisjax.simulate(
    lambda p, z, x, fire: fire("o", x @ p["in"]), p, x, init[0], neuron=IF(), forward=SpikeForward(3), record=True
)
check(one)
with pytest.raises(AssertionError):
    check(one._replace(num_steps=one.num_steps.astype(float)))
f = lambda r: mpisjax.dbrelu(r @ p["back"])
check(spectral_radius(f, init[0], key))
jacobian_penalty(f, init[0], key)
for wrong in (jnp.ones(3, jnp.int32), "current"):
    with pytest.raises(Exception, match="dbrelu"):
        mpisjax.dbrelu(wrong)
with pytest.raises(Exception, match="jacobian_penalty"):
    jacobian_penalty(f, init[0], 0)
'''


def test_signatures_hold_at_run_time(python):
    done = python("-c", PROGRAM, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr[-3000:]
