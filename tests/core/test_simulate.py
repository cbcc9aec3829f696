"""The simulation against plain NumPy loops, its early stop, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpisjax
from mpisjax import SpikeForward, simulate
from mpisjax.simulate import weighted_mean_frame

pytestmark = pytest.mark.unoptimized


def transition(p, z, x, fire):
    hidden = fire("hidden", x @ p["in"] + z["out"] @ p["back"])
    out = fire("out", hidden @ p["up"])
    return {"out": out, "side": fire("side", out @ p["side"] + z["side"])}


WIDTHS = {"hidden": 5, "out": 4, "side": 3}


def problem(batch: int = 3, dtype=np.float32):
    rng = np.random.default_rng(1)

    # Sixteenths, so that float32 is exact at leak 1 and potentials do meet thresholds.
    def sixteenths(*shape, low=-8, high=13):
        return (rng.integers(low, high, size=shape) / 16).astype(dtype)

    params = {
        "in": sixteenths(6, 5),
        "back": sixteenths(4, 5),
        "up": sixteenths(5, 4),
        "side": sixteenths(4, 3),
    }
    init = {"out": np.zeros((batch, 4), dtype), "side": np.zeros((batch, 3), dtype)}
    return params, sixteenths(batch, 6, low=0, high=17), init


def loop(params, frames, init, threshold, leak, u0):
    """The same network by hand; returns, for each t, every population's rates and counts so far."""
    batch = frames[0].shape[0]
    u = {k: np.full((batch, n), u0 * threshold) for k, n in WIDTHS.items()}
    total = {k: np.zeros((batch, n)) for k, n in WIDTHS.items()}
    counts = {k: np.zeros((batch, n)) for k, n in WIDTHS.items()}
    z, weight, history = dict(init), 0.0, []

    def step(name, current):
        v = u[name] + current
        spikes = (v >= threshold).astype(v.dtype)
        u[name] = leak * (v - threshold * spikes)
        total[name] = leak * total[name] + spikes
        counts[name] = counts[name] + spikes
        return spikes

    for x in frames:
        hidden = step("hidden", x @ params["in"] + z["out"] @ params["back"])
        out = step("out", hidden @ params["up"])
        z = {"out": out, "side": step("side", out @ params["side"] + z["side"])}
        weight = leak * weight + 1
        history.append(({k: v / weight for k, v in total.items()}, dict(counts)))
    return history


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize(
    ("threshold", "leak", "u0"), [(1.0, 1.0, 0.0), (0.5, 1.0, 0.5), (1.0, 0.9, 0.0), (0.75, 0.3, 0.25)]
)
def test_rates_and_counts_are_those_of_a_plain_loop(x64, threshold, leak, u0, temporal):
    params, x, init = problem(dtype=np.float64)
    steps = 13
    frames = np.stack([x * (t % 4) / 2 for t in range(steps)]) if temporal else np.stack([x] * steps)
    expected, counts = loop(params, frames, init, threshold, leak, u0)[-1]
    found = jax.jit(
        lambda x: simulate(
            transition,
            params,
            x,
            init,
            neuron=mpisjax.LIF(threshold, leak, u0),
            forward=SpikeForward(steps),
            time_axis=0 if temporal else None,
            record=True,
        )
    )(frames if temporal else x)
    for k in WIDTHS:
        assert counts[k].any(), f"{k} is silent: nothing is tested"
        np.testing.assert_array_equal(found.spike_counts[k], counts[k])
        np.testing.assert_allclose(found.layer_rates[k], expected[k], rtol=1e-13, atol=1e-14)
    for k in init:
        np.testing.assert_allclose(found.rates[k], expected[k], rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(found.num_steps, [steps] * 3)
    assert found.settled.all()


@pytest.mark.parametrize("steps", [1, 200])
def test_without_leak_rates_are_counts_over_steps_and_never_nan(steps):
    params, x, init = problem()
    found = simulate(
        transition,
        params,
        x,
        init,
        neuron=mpisjax.IF(initial_potential=0.0),
        forward=SpikeForward(steps),
        record=True,
    )
    for k in init:
        np.testing.assert_allclose(found.rates[k], found.spike_counts[k] / steps, rtol=1e-6)
    expected, _ = loop(params, [x] * steps, init, 1.0, 1.0, 0.0)[-1]
    np.testing.assert_allclose(found.rates["out"], expected["out"], rtol=1e-6)


def test_nothing_is_recorded_unless_asked():
    params, x, init = problem()
    found = simulate(transition, params, x, init, neuron=mpisjax.IF(), forward=SpikeForward(2))
    assert found.layer_rates == {} and found.spike_counts == {}


def test_the_first_step_is_fed_back_what_init_says(x64):
    params, x, init = problem(dtype=np.float64)
    init = jax.tree.map(np.ones_like, init)
    found = simulate(transition, params, x, init, neuron=mpisjax.IF(initial_potential=0.0), forward=SpikeForward(5))
    expected, _ = loop(params, [x] * 5, init, 1.0, 1.0, 0.0)[-1]
    silent, _ = loop(params, [x] * 5, jax.tree.map(np.zeros_like, init), 1.0, 1.0, 0.0)[-1]
    assert not np.array_equal(expected["side"], silent["side"])
    np.testing.assert_allclose(found.rates["side"], expected["side"])


def test_half_precision_counts_a_thousand_spikes():
    found = simulate(
        lambda p, z, x, fire: fire("a", x),
        {},
        jnp.ones((1, 2), jnp.bfloat16),
        jnp.zeros((1, 2), jnp.bfloat16),
        neuron=mpisjax.IF(),
        forward=SpikeForward(1000),
        record=True,
    )
    assert found.rates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.spike_counts["a"], [[1000, 1000]])
    np.testing.assert_array_equal(found.rates.astype(np.float32), [[1, 1]])


@pytest.mark.parametrize("leak", [1.0, 0.8, 1e-3])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_mean_frame_is_weighted_as_the_rates_are(leak, axis):
    frames = np.random.default_rng(0).integers(0, 9, size=(40, 2, 3)).astype(np.uint8)
    weights = leak ** np.arange(39, -1, -1, dtype=float)
    expected = np.average(frames, axis=0, weights=weights)
    found = weighted_mean_frame({"a": jnp.asarray(np.moveaxis(frames, 0, axis))}, leak, axis)["a"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_frames_on_another_axis_are_the_same_frames():
    params, x, init = problem()
    frames = np.stack([x * (t % 3) for t in range(6)])
    options = {"neuron": mpisjax.LIF(1.0, 0.9), "forward": SpikeForward(None)}
    a = simulate(transition, params, frames, init, time_axis=0, **options)
    b = simulate(transition, params, np.moveaxis(frames, 0, 1), init, time_axis=1, **options)
    jax.tree.map(np.testing.assert_array_equal, a.rates, b.rates)
    np.testing.assert_array_equal(a.num_steps, [6, 6, 6])


# Samples that settle after different times, one of which never does within the limit.
SCALES, LIMIT, TOL = np.array([0.0, 0.9, 0.3, 1.0]), 60, 0.02


def settling(rows, *, leak=1.0, tol=TOL, limit=LIMIT, batch_axis=0):
    params, x, _ = problem(batch=4, dtype=np.float64)
    x = (x * SCALES[:, None])[rows]
    init = {"out": np.zeros((*x.shape[:-1], 4)), "side": np.zeros((*x.shape[:-1], 3))}
    found = simulate(
        transition,
        params,
        x,
        init,
        neuron=mpisjax.LIF(1.0, leak, 0.0),
        forward=SpikeForward(limit, tol=tol),
        batch_axis=batch_axis,
        record=True,
    )
    return found, (params, x, init)


@pytest.mark.parametrize(("leak", "tol"), [(1.0, TOL), (0.9, 0.2)])
def test_an_early_stop_freezes_each_sample_when_its_own_rates_settle(x64, leak, tol):
    found, (params, x, init) = settling(np.arange(4), leak=leak, tol=tol)
    history = loop(params, [x] * LIMIT, init, 1.0, leak, 0.0)
    stops = []
    for i in range(4):
        stop, settled = LIMIT, False
        for t in range(2, LIMIT + 1):
            now, before = history[t - 1][0], history[t - 2][0]
            moved = [
                np.linalg.norm(now[k][i] - before[k][i]) / max(np.linalg.norm(now[k][i]), np.finfo(float).eps)
                for k in init
            ]
            settled = max(moved) <= tol
            if settled and all(now[k][i].any() for k in init):
                stop = t
                break
        stops.append(stop)
        assert found.num_steps[i] == stop and found.settled[i] == settled
        for k in init:
            np.testing.assert_allclose(found.rates[k][i], history[stop - 1][0][k][i], rtol=1e-12)
        for k in WIDTHS:
            np.testing.assert_allclose(found.layer_rates[k][i], history[stop - 1][0][k][i], rtol=1e-12)
            np.testing.assert_array_equal(found.spike_counts[k][i], history[stop - 1][1][k][i])
    assert len(set(stops)) > 1, "every sample stopped at the same step: nothing is tested"


def test_a_sample_stops_alike_alone_and_in_company(x64):
    together, _ = settling(np.arange(4))
    for i in (0, 1):
        alone, _ = settling(np.array([i]))
        bare, _ = settling(i, batch_axis=None)
        assert together.num_steps[i] == alone.num_steps[0] == bare.num_steps
        assert together.settled[i] == alone.settled[0] == bare.settled
        for k in alone.rates:
            np.testing.assert_array_equal(together.rates[k][i], alone.rates[k][0])
            np.testing.assert_array_equal(together.rates[k][i], bare.rates[k])


def test_what_has_not_settled_says_so(x64):
    found, _ = settling(np.arange(4), limit=3, tol=1e-9)
    assert found.settled[0] and not found.settled[1] and not found.settled[3]  # the first is silent
    np.testing.assert_array_equal(found.num_steps, [3, 3, 3, 3])


def test_a_population_that_is_still_charging_has_not_settled():
    # A current of 1/8 first makes a spike at the eighth step.
    found = simulate(
        lambda p, z, x, fire: {"slow": fire("slow", x), "fast": fire("fast", 10 * x)},
        {},
        jnp.full((1, 2), 0.125),
        {"slow": jnp.zeros((1, 2)), "fast": jnp.zeros((1, 2))},
        neuron=mpisjax.IF(),
        forward=SpikeForward(100, tol=0.1),
    )
    assert found.num_steps[0] > 8 and found.settled[0]
    # Within one spike of the truth; stopping at the second step would have said 0.
    np.testing.assert_allclose(found.rates["slow"], 0.125, atol=1 / found.num_steps[0])
    assert (found.rates["slow"] > 0).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SpikeForward(0), "forward.num_steps is 0"),
        (lambda: SpikeForward(-3), "forward.num_steps is -3"),
        (lambda: SpikeForward(5, tol=0.0), "forward.tol"),
    ],
)
def test_impossible_forwards_are_refused(make, named):
    with pytest.raises(mpisjax.UserError, match=named):
        make()


@pytest.mark.parametrize(
    ("forward", "time_axis", "named"),
    [
        (SpikeForward(None), None, "forward.num_steps is None"),
        (SpikeForward(5), 0, "carries 4 frames"),
        (SpikeForward(None, tol=0.1), 0, "forward.tol"),
    ],
)
def test_steps_that_do_not_fit_the_input_are_refused(forward, time_axis, named):
    params, x, init = problem()
    x = x if time_axis is None else np.stack([x] * 4)
    with pytest.raises(mpisjax.UserError, match=named):
        simulate(transition, params, x, init, neuron=mpisjax.IF(), forward=forward, time_axis=time_axis)


def test_leaves_with_different_numbers_of_frames_are_refused():
    x = {"a": jnp.zeros((3, 1, 2)), "b": jnp.zeros((4, 1, 2))}
    with pytest.raises(mpisjax.UserError, match=r"\[3, 4\] frames"):
        simulate(
            lambda p, z, x, fire: fire("a", x["a"] + x["b"]),
            {},
            x,
            jnp.zeros((1, 2)),
            neuron=mpisjax.IF(),
            forward=SpikeForward(None),
            time_axis=0,
        )


@settings(deadline=None)
@given(
    leak=st.floats(0.05, 1),
    fraction=st.floats(0, 0.99),
    threshold=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_a_simulation_starts_from_the_initial_potential(leak, fraction, threshold):
    neuron = mpisjax.LIF(threshold, leak, fraction)
    state = neuron.initial_state(jax.ShapeDtypeStruct((2,), jnp.float32))
    resting = np.full(2, fraction * threshold)
    np.testing.assert_allclose(neuron.after_reset(state), resting, rtol=1e-6, atol=3e-7 * threshold)
