"""`fire(name, current)`: a population of neurons in a transition, traced once and read as rates or as spikes."""

from mpisjax.firing.primitive import EquivalentStep, Fire, Fired, Rates, Rule, Transition, fire, is_array
from mpisjax.firing.readings import RateReading, initial_states, rates, spikes
from mpisjax.firing.tracing import Population, Traced, check_rates, follow, sources, trace, trace_transition

__all__ = [
    "EquivalentStep",
    "Fire",
    "Fired",
    "Population",
    "RateReading",
    "Rates",
    "Rule",
    "Traced",
    "Transition",
    "check_rates",
    "fire",
    "follow",
    "initial_states",
    "is_array",
    "rates",
    "sources",
    "spikes",
    "trace",
    "trace_transition",
]
