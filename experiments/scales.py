"""How large the experiments are: what is trained for which table at the scales smoke, small, laptop and paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.nets import Net, Pair

NAMES = ("smoke", "small", "laptop", "paper")
LAPTOP = "configs/cifar100.py:laptop"


class Scale(NamedTuple):
    """A size of all experiments.

    Attributes:
        name: "smoke", "small", "laptop" or "paper".
        seeds: The seeds of every run.
        through_time: MPIS and the same network trained by BPTT (Table 1).
        memory_steps: The T for which both are compiled to learn their memory; may be empty.
        firing: Networks whose firing rates are counted (Table 2).
        single_stream: MPIS and IDE-Net (Table 3).
        convergence: Two streams, and one stream of equal size (Figure 3).
        latency: Networks at few time steps (Table 4).
        audited: The network whose gradients are compared.
        tolerances: One network, trained with several tolerances of its solvers.
        examples: Examples of the test split on which spikes are counted; None: all.
        followed: Number of examples of the convergence curves and of the audit.
        packaged: The pretrained network whose solves are compared.
        follow_steps: Time steps of the convergence curves.
        surrogates: The surrogate gradients that the audit compares.
        fair: Networks of equal size, the first of which is compared with each of the others.
    """

    name: str
    seeds: tuple[int, ...]
    through_time: tuple[Pair, ...]
    memory_steps: tuple[int, ...]
    firing: tuple[Net, ...]
    single_stream: tuple[Pair, ...]
    convergence: Pair
    latency: tuple[Net, ...]
    audited: Net
    tolerances: tuple[Net, ...]
    examples: int | None
    followed: int
    packaged: str
    follow_steps: int = 100
    surrogates: tuple[str, ...] = ("rectangular", "triangular", "arctan", "sigmoid")
    fair: tuple[Net, ...] = ()


BPTT = {"train.method": "bptt"}
IDE = {
    "model.num_streams": 1,
    "model.fusion_layer": 1,
    "model.feedback_norm": "spectral",
    "model.head": "smallest",
}
TOLERANCES = (
    *((tol, 12, 12) for tol in (0.5, 0.2, 0.05)),
    (0.05, 6, 2),  # configs/fashion_mnist.py
    (0.05, 3, 1),
)
SINGLE = {"model.num_streams": 1, "model.fusion_layer": 1}


def _spikes(steps: int) -> dict[str, Any]:
    return {"forward.mode": "spikes", "forward.num_steps": steps}


def _tolerances(
    data: str, config: str, examples: int, common: Mapping[str, Any], wanted: Sequence[tuple[float, int, int]]
) -> tuple[Net, ...]:
    """The network of a config in rate mode; `wanted` are tolerance and most steps forward and backward."""
    return tuple(
        Net(
            f"{Path(config).stem}_rates_tol{tol:g}_most{forward}_{adjoint}",
            f"rates, tolerance {tol:g}",
            data,
            30,
            config,
            {
                **common,
                "forward.mode": "rates",
                "train.test_at_end": False,
                "forward.tol": tol,
                "forward.max_steps": forward,
                "adjoint.tol": tol,
                "adjoint.max_steps": adjoint,
            },
            examples,
        )
        for tol, forward, adjoint in wanted
    )


def _family(data: str, config: str, examples: int, common: Mapping[str, Any], ide: Any, single: Any) -> Any:
    """`make(kind, T)` for one data set; `ide` and `single` are widths that give as many parameters."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "mpis": ("MPIS, implicit", {}),
        "bptt": ("the same network, BPTT", BPTT),
        "ide": ("IDE-Net, one stream", {**IDE, "model.layers": ide}),
        "single": ("one stream", {**SINGLE, "model.layers": single}),
    }
    key = Path(config).stem

    def make(kind: str, steps: int, **more: Any) -> Net:
        title, settings = kinds[kind]
        return Net(
            f"{key}_{kind}_t{steps}",
            title,
            data,
            steps,
            config,
            {**common, **_spikes(steps), **settings, **more},
            examples,
        )

    return make


class Widths(NamedTuple):
    """Channels of the layers that give every network of the fair fight as many parameters as two streams have."""

    one: tuple[int, ...]
    three: tuple[int, ...]
    ide: tuple[int, ...]
    two_cut: tuple[int, ...]
    one_cut: tuple[int, ...]
    two_smallest: tuple[int, ...]
    two_early: tuple[int, ...] | None = None  # None where the two streams are fused at their first layer anyway


FEW_STEPS = {"forward.max_steps": 3, "adjoint.max_steps": 1}
# Without feedback one pass is the equilibrium.
ONE_PASS = {"forward.mode": "rates", "forward.max_steps": 1, "adjoint.max_steps": 1, "model.feedback_norm": "none"}
THROUGH_TIME = {"forward.mode": "spikes", **BPTT}
# Of 0.03, 0.1 and 0.3 the best after two epochs of Fashion-MNIST (validation, seed 0); without feedback 0.1 was best.
# On CIFAR-100 0.1 and 0.3 gave the same after one epoch.
FASTER = {"train.learning_rate": 0.3}


def _fair(
    data: str,
    config: str,
    examples: int,
    common: Mapping[str, Any],
    widths: Widths,
    steps: int,
    solver: Mapping[str, Any] = FEW_STEPS,
    costly: int = 0,
) -> tuple[Net, ...]:
    """MPIS with two streams, and what it is to be compared with.

    Args:
        data: The data set's name.
        config: Config file and variant.
        examples: Size of the training split.
        common: Settings of all.
        widths: Of the others' layers.
        steps: Time steps T of tests, and of what is trained through time.
        solver: How equilibria are solved for in training.
        costly: Epochs of BPTT with T = 30; 0 for none.
    """
    by_rates = {"forward.mode": "rates", **solver}
    one = {"model.num_streams": 1, "model.fusion_layer": 1}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "two": ("MPIS, two streams", by_rates),
        "one": ("one stream", {**by_rates, **one, "model.layers": widths.one}),
        "three": ("MPIS, three streams", {**by_rates, "model.num_streams": 3, "model.layers": widths.three}),
        "ide": ("IDE-Net", {**by_rates, **IDE, "model.layers": widths.ide}),
        # Fused at the first layer: a later one would leave the second stream's first layer without any input.
        "two_cut": (
            "two streams without feedback, one pass",
            {**ONE_PASS, "model.fusion_layer": 1, "model.layers": widths.two_cut},
        ),
        "one_cut": ("one stream without feedback, one pass", {**ONE_PASS, **one, "model.layers": widths.one_cut}),
        "bptt": (f"MPIS, two streams, BPTT of T = {steps}", {**THROUGH_TIME, **FASTER}),
        "one_cut_bptt": (
            f"feed-forward spikes, BPTT of T = {steps}",
            {**THROUGH_TIME, **one, "model.feedback_norm": "none", "model.layers": widths.one_cut},
        ),
    }
    smallest = {**by_rates, "model.head": "smallest", "model.layers": widths.two_smallest}
    kinds["two_smallest"] = "MPIS, two streams, the smaller one classified as it is", smallest
    plain = {**by_rates, **one, "model.head": "smallest", "model.layers": widths.ide}
    kinds["one_smallest"] = "one stream, classified as it is", plain
    if widths.two_early:
        early = {**by_rates, "model.fusion_layer": 1, "model.layers": widths.two_early}
        kinds["two_early"] = "MPIS, two streams, fused at the first layer", early
    key = Path(config).stem.replace(":", "_")
    made = [
        Net(f"{key}_fair_{kind}", title, data, steps, config, {**common, "forward.num_steps": steps, **more}, examples)
        for kind, (title, more) in kinds.items()
    ]
    if solver:  # two streams are less contractive: do they want more steps?
        settings = {**common, "forward.num_steps": steps, "forward.mode": "rates"}
        made.append(
            Net(f"{key}_fair_two_6_2", "MPIS, two streams, 6 + 2 steps", data, steps, config, settings, examples)
        )
    if costly:  # what T = 30 costs through time, and the implicit method for as many epochs
        brief = {**common, "forward.num_steps": 30, "train.epochs": costly}
        for kind, title, more in (
            ("two30", "MPIS, two streams, spikes of T = 30", {**solver, "forward.mode": "spikes"}),
            ("bptt30", "MPIS, two streams, BPTT of T = 30", {**THROUGH_TIME, **FASTER}),
        ):
            made.append(Net(f"{key}_fair_{kind}", title, data, 30, config, {**brief, **more}, examples))
    return tuple(made)


def smoke() -> Scale:
    """The digits and a narrow network: shows that every experiment runs; its figures prove nothing."""
    common = {"train.epochs": 8, "train.ema": 0.0, "model.stem": (8,), "model.layers": (12, 16)}
    make = _family("digits", "configs/digits.py", 1257, common, ide=(19, 24), single=(19, 23))
    short, long = 4, 12
    return Scale(
        "smoke",
        (0,),
        tuple(Pair(make("mpis", t), make("bptt", t)) for t in (short, long)),
        (short, long, 24, 48),
        (make("mpis", long),),
        (Pair(make("mpis", long), make("ide", long)),),
        Pair(make("mpis", long), make("single", long)),
        (make("mpis", 1), make("mpis", short), make("mpis", long)),
        make("mpis", long),
        _tolerances("digits", "configs/digits.py", 1257, common, ((0.3, 20, 20), (0.03, 20, 20))),
        None,
        32,
        "digits",
        surrogates=("triangular", "sigmoid"),
        fair=_fair("digits", "configs/digits.py", 1257, common, Widths(*((12, 16),) * 6), short)[:2],
    )


# In the first epoch other errors are larger than the solvers', so tolerances are compared on a trained
# network.
FROM_TRAINED = {
    "train.init_from": "fashion_mnist",
    "train.learning_rate": 0.02,
    "train.warmup_epochs": 0.2,
    "train.ema": 0.99,
}


def fashion_fair(common: Mapping[str, Any], costly: int) -> tuple[Net, ...]:
    """The fair fight on Fashion-MNIST, at the size of the paper's network."""
    widths = Widths((31, 48), (24, 34), (33, 48), (39, 60), (34, 53), (36, 54), (34, 50))
    return _fair("Fashion-MNIST", "configs/fashion_mnist.py", 55_000, common, widths, steps=4, costly=costly)


def small(epochs: int | None = None) -> Scale:
    """Fashion-MNIST at the paper's size, few epochs. Most tables share the networks of the fair fight."""
    trained = {"train.epochs": epochs or 1, **FROM_TRAINED}
    fair = fashion_fair({"train.epochs": epochs or 5, "train.ema": 0.995}, costly=1)
    two, one, _, ide, _, _, bptt, *_, two30, bptt30 = fair
    large = Net(
        "fashion_mnist_large_t1",
        "MPIS, large",
        "Fashion-MNIST",
        1,
        "configs/fashion_mnist.py:large_t1",
        {"train.epochs": epochs or 1, "train.ema": 0.995},
        55_000,
    )
    return Scale(
        "small",
        (0, 1, 2),
        (Pair(two30, bptt30), Pair(two, bptt)),
        (1, 10, 30, 100, 300),
        (two._replace(steps=30),),
        (Pair(two, ide),),
        Pair(two, one),
        (large,),
        two30,
        _tolerances("Fashion-MNIST", "configs/fashion_mnist.py", 55_000, trained, TOLERANCES),
        2000,
        32,
        "fashion_mnist",
        fair=fair,
    )


def laptop(epochs: int | None = None) -> Scale:
    """CIFAR-100 and its network for two cores."""
    common = {"train.epochs": epochs or 12}
    make = _family("CIFAR-100", LAPTOP, 45_000, common, ide=(55, 83, 111), single=(54, 81, 110))
    widths = Widths((54, 81, 110), (52, 78, 101), (55, 83, 111), (71, 106, 142), (57, 85, 116), (72, 108, 144))
    fair = _fair("CIFAR-100", LAPTOP, 45_000, common, widths, steps=8, solver={})
    return Scale(
        "laptop",
        (0, 1),
        (Pair(make("mpis", 8), make("bptt", 8)),),
        (1, 4, 8, 16),
        (make("mpis", 8),),
        (Pair(fair[0], fair[3]),),
        Pair(make("mpis", 8), make("single", 8)),
        (make("mpis", 8),),
        make("mpis", 8),
        _tolerances("CIFAR-100", LAPTOP, 45_000, common, TOLERANCES),
        2000,
        32,
        "cifar100",
        fair=fair,
    )


def paper(epochs: int | None = None) -> Scale:
    """The paper's data sets, sizes and time steps, with the epochs of our config files; for accelerators."""
    common = {"train.epochs": epochs} if epochs else {}
    fashion = _family("Fashion-MNIST", "configs/fashion_mnist.py", 55_000, common, ide=(33, 48), single=(31, 48))
    events = _family("N-MNIST", "configs/nmnist.py", 55_000, common, ide=(31, 62), single=(31, 61))
    ten = _family("CIFAR-10", "configs/cifar10.py", 45_000, common, ide=(456, 920, 1832), single=(432, 864, 1728))
    hundred = _family("CIFAR-100", "configs/cifar100.py", 45_000, common, ide=(392, 776, 1560), single=(368, 744, 1488))
    large = fashion("mpis", 1, **{"model.stem": (64,), "model.layers": (128, 256)})
    latency = [large._replace(name="fashion_mnist_large_t1", title="MPIS, large")]
    for make, narrow in ((ten, (192, 320, 640)), (hundred, (192, 256, 768))):
        for steps in (5, 10, 30):
            small_net = make("mpis", steps, **{"model.layers": narrow})
            latency += [
                make("mpis", steps),
                small_net._replace(name=f"{small_net.name}_small", title="MPIS, small"),
            ]
    return Scale(
        "paper",
        (0, 1, 2),
        (
            *(Pair(fashion("mpis", t), fashion("bptt", t)) for t in (30, 100)),
            Pair(events("mpis", 30), events("bptt", 30)),
        ),
        (1, 10, 30, 100, 300),
        (fashion("mpis", 30), fashion("mpis", 100)),
        tuple(Pair(make("mpis", 30), make("ide", 30)) for make in (ten, hundred)),
        Pair(fashion("mpis", 30), fashion("single", 30)),
        tuple(latency),
        fashion("mpis", 30),
        _tolerances("Fashion-MNIST", "configs/fashion_mnist.py", 55_000, common, TOLERANCES),
        None,
        64,
        "fashion_mnist",
        fair=fashion_fair({"train.epochs": epochs or 30}, costly=3),
    )


def scale_of(name: str, epochs: int | None = None) -> Scale:
    """A scale by name; `epochs` replaces those of every scale but smoke."""
    return smoke() if name == "smoke" else {"small": small, "laptop": laptop, "paper": paper}[name](epochs)
