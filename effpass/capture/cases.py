"""Tiny arguments on which each known function is proven, by the library's own parameter names.

Every function here takes ``make(*shape)``, which draws a normal float32 tensor, and lists
arguments, from the fewest to all of them; the last is repeated in bfloat16.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from effpass.capture.proof import Arguments, Make

B, D, N, H, P, G, W = 2, 3, 4, 4, 3, 2, 4  # batch, channels, state, heads, head width, groups, taps


def _decay(A: Tensor) -> Tensor:
    return -A.exp()


def scan(make: Make, x: str = "hidden_states", dt: str = "dt") -> list[Arguments]:
    """Mamba scans with tokens last: one token, five, then each option, then all options."""

    def required(t: int) -> Arguments:
        sequences = {x: make(B, D, t), dt: make(B, D, t).abs(), "A": _decay(make(D, N))}
        return sequences | {"B": make(B, N, t), "C": make(B, N, t)}

    def everything(t: int) -> Arguments:
        options = {"D": make(D), "z": make(B, D, t), "delta_bias": make(D)}
        return required(t) | options | {"delta_softplus": True, "return_last_state": True}

    some = [{"D": make(D)}, {"z": make(B, D, 5)}, {"delta_bias": make(D), "delta_softplus": True}]
    return [
        required(1),
        required(5) | {"return_last_state": True},
        *(required(5) | option for option in some),
        everything(1),
        everything(5),
    ]


def package_scan(make: Make) -> list[Arguments]:
    """As ``scan``, under ``mamba_ssm``'s names."""
    return scan(make, x="u", dt="delta")


def scan_step(make: Make, x: str = "hidden_states") -> list[Arguments]:
    """One decoding step of Mamba, the state written in place."""
    required = {"state": make(B, D, N), x: make(B, D), "dt": make(B, D).abs()}
    required |= {"A": _decay(make(D, N)), "B": make(B, N), "C": make(B, N)}
    options = {"D": make(D), "z": make(B, D), "dt_bias": make(D), "dt_softplus": True}
    return [required, required | {"D": make(D)}, required | options]


def chunk_scan(
    make: Make, x: str = "hidden_states", lengths: tuple[int, ...] = (1, 5, 9)
) -> list[Arguments]:
    """Mamba-2 scans in chunks of 4: within one, across three, with a state, with limits."""

    def required(t: int) -> Arguments:
        sequences = {x: make(B, t, H, P), "dt": make(B, t, H).abs(), "A": _decay(make(H))}
        return sequences | {"B": make(B, t, G, N), "C": make(B, t, G, N), "chunk_size": 4}

    first, second, last = lengths
    options = {"D": make(H), "dt_bias": make(H), "dt_softplus": True}
    state = {"initial_states": make(B, H, P, N), "return_final_states": True}
    return [
        required(first),
        required(last),
        required(second) | options,
        required(last) | state,
        required(second) | options | {"dt_limit": (0.3, 0.9)},
        required(first) | options | state,
        required(last) | options | state,
    ]


def package_chunk_scan(make: Make) -> list[Arguments]:
    """As ``chunk_scan``, under ``mamba_ssm``'s names; its reference takes whole chunks only."""
    cases = chunk_scan(make, x="x", lengths=(4, 8, 12))
    gated = {"z": make(B, 12, H, P), "D": make(H, P)}
    bare = {k: v for k, v in cases[-1].items() if k not in ("initial_states", "D")}
    del bare["return_final_states"]
    return [*cases, bare | {"D": make(H)}, bare | gated]


def chunk_scan_step(make: Make, x: str = "hidden_states") -> list[Arguments]:
    """One decoding step of Mamba-2, in both forms: a number a head (expanded) and one a channel."""
    state = {"state": make(B, H, P, N), x: make(B, H, P)}
    grouped = {"B": make(B, G, N), "C": make(B, G, N)}
    dt, A = make(B, H, 1).abs().expand(B, H, P), _decay(make(H, 1, 1)).expand(H, P, N)
    required = state | {"dt": dt, "A": A} | grouped
    D, bias = make(H, 1).expand(H, P), make(H, 1).expand(H, P)
    options = {"D": D, "dt_bias": bias, "dt_softplus": True, "z": make(B, H, P)}
    loose = {"dt": make(B, H, P).abs(), "A": _decay(make(H, P, N)), "D": make(H, P)}
    return [required, state | loose | grouped, required | {"D": D}, required | options]


def package_step(make: Make) -> list[Arguments]:
    """``mamba_ssm``'s decoding step: Mamba's form and Mamba-2's."""
    return [*scan_step(make, x="x"), *chunk_scan_step(make, x="x")]


def conv(make: Make, x: str = "hidden_states") -> list[Arguments]:
    """Causal convolutions shorter and longer than their taps."""
    activated = [{"activation": name} for name in (None, "silu", "swish")]
    required = [{x: make(B, D, t), "weight": make(D, W)} for t in (1, 5, 9)]
    biased = required[1] | {"bias": make(D)}
    return [*required, biased, *(biased | option for option in activated)]


def package_conv(make: Make) -> list[Arguments]:
    """As ``conv`` under ``causal_conv1d``'s names, then with states given and asked for."""
    cases = conv(make, x="x")
    states = {"initial_states": make(B, D, W - 1), "return_final_states": True}
    short = cases[0] | states
    written = cases[-1] | states | {"final_states_out": make(B, D, W - 1)}
    return [*cases, cases[-1] | {"return_final_states": True}, short, written]


def conv_step(make: Make, x: str = "hidden_states") -> list[Arguments]:
    """Convolution steps of one token and of two, on a state of w and of w - 1 tokens."""
    return [
        {x: make(B, D, t), "conv_state": make(B, D, kept), "weight": make(D, W)} | options
        for t, kept in ((1, W), (1, W - 1), (2, W), (2, W - 1))
        for options in ({}, {"bias": make(D), "activation": "silu"})
    ]


def package_conv_step(make: Make) -> list[Arguments]:
    """As ``conv_step`` under ``causal_conv1d``'s names, with and without a token dimension."""
    flat = {"x": make(B, D), "conv_state": make(B, D, W), "weight": make(D, W)}
    return [flat, *conv_step(make, x="x")]


def rnn_scan(make: Make) -> list[Arguments]:
    """RecurrentGemma's method, whose first token of a sequence is marked by ``reset``."""

    def required(t: int, first: bool) -> Arguments:
        reset = make(B, t, 1) > 1
        reset[:, 0] = first
        gates = {"recurrent_gate": make(B, t, D).sigmoid(), "reset": reset}
        states = None if first else make(B, D)
        values = {"self": SimpleNamespace(), "hidden_states": make(B, t, D)}
        return values | gates | {"recurrent_states": states}

    return [required(5, True), required(1, True), required(1, False), required(5, False)]


def method_scan(make: Make) -> list[Arguments]:
    """``mambapy``'s methods, which read two sizes from ``self.config``."""
    block = SimpleNamespace(config=SimpleNamespace(d_inner=D, d_state=N))
    return [
        {"self": block, "x": make(B, t, D), "delta": make(B, t, D).abs(), "A": _decay(make(D, N))}
        | {"B": make(B, t, N), "C": make(B, t, N), "D": make(D)}
        for t in (1, 5, 9)
    ]


def no_kernel(make: Make) -> list[Arguments]:
    """A kernel for a whole layer that is not installed answers None, whatever it is given."""
    weights = {"conv1d_weight": make(D, W), "conv1d_bias": None, "dt_bias": make(H)}
    rest = {"A": _decay(make(H)), "D": make(H), "chunk_size": 4}
    return [{"zxbcdt": make(B, 5, D)} | weights | rest]
