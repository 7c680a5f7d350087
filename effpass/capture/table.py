"""The table of known library functions: one row a name and signature, never one a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from effpass.capture import adapters, cases, package_adapters
from effpass.capture.proof import Cases


@dataclass(frozen=True)
class Row:
    """One known function.

    ``parameters`` are its parameter names in order (``**kwargs`` apart), of which versions of the
    library may lack the last ``newer`` ones. ``companion`` is a function that stands beside it in
    every module. ``reference`` names the torch function, in the same module, that a kernel is
    specified by. ``within`` is a prefix of the module's name; ``method``: it lives in a class.
    ``marks``: it may be handed the boundaries of packed rows.
    """

    name: str
    parameters: str
    op: str
    adapter: Callable[..., Any]
    cases: Cases
    newer: int = 0
    companion: str = ""
    reference: str = ""
    within: str = ""
    method: bool = False
    bfloat16: bool = True
    marks: bool = False

    @property
    def signatures(self) -> list[tuple[str, ...]]:
        """Parameter names this row stands for, the newest version last."""
        names = tuple(self.parameters.split())
        return [names[: len(names) - missing] for missing in range(self.newer, -1, -1)]


SCAN = "A B C D z delta_bias delta_softplus return_last_state"
STEP = "dt A B C D z dt_bias dt_softplus"
CHUNK = (
    "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit "
    "return_final_states return_varlen_states state_dtype"
)

TRANSFORMERS = (
    Row(
        "mamba_selective_scan",
        f"hidden_states dt {SCAN} use_mambapy use_associative_scan",
        "selective_scan",
        adapters.mamba_selective_scan,
        cases.scan,
        companion="mamba_selective_state_update",
        within="transformers",
        marks=True,
    ),
    Row(
        "mamba_selective_state_update",
        "state hidden_states dt A B C D dt_bias dt_softplus z",
        "selective_scan",
        adapters.mamba_selective_state_update,
        cases.scan_step,
        companion="mamba_selective_scan",
        within="transformers",
        marks=True,
    ),
    Row(
        "mamba2_chunk_scan",
        "hidden_states dt A B C chunk_size D dt_bias initial_states dt_softplus dt_limit "
        "return_final_states",
        "ssd_scan",
        adapters.mamba2_chunk_scan,
        cases.chunk_scan,
        companion="mamba2_selective_state_update",
        within="transformers",
        marks=True,
    ),
    Row(
        "mamba2_split_conv1d_scan_combined",
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states dt_limit "
        "return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias "
        "headdim ngroups norm_before_gate",
        "ssd_scan",
        adapters.mamba2_split_conv1d_scan_combined,
        cases.no_kernel,
        companion="mamba2_chunk_scan",
        within="transformers",
    ),
    Row(
        "mamba2_selective_state_update",
        "state hidden_states dt A B C D dt_bias dt_softplus z",
        "ssd_scan",
        adapters.mamba2_selective_state_update,
        cases.chunk_scan_step,
        companion="mamba2_chunk_scan",
        within="transformers",
        marks=True,
    ),
    Row(
        "causal_conv1d_fn",
        "hidden_states weight bias activation",
        "causal_conv1d",
        adapters.causal_conv1d_fn,
        cases.conv,
        companion="causal_conv1d_update",
        within="transformers",
        marks=True,
    ),
    Row(
        "causal_conv1d_update",
        "hidden_states conv_state weight bias activation",
        "causal_conv1d",
        adapters.causal_conv1d_update,
        cases.conv_step,
        companion="causal_conv1d_fn",
        within="transformers",
        marks=True,
    ),
)

GEMMA = (
    Row(
        "_rnn_scan",
        "self hidden_states recurrent_gate reset recurrent_states acc_dtype",
        "linear_recurrence",
        adapters.rnn_scan,
        cases.rnn_scan,
        within="transformers",
        method=True,
        bfloat16=False,  # its mask of resets is boolean
    ),
)

MAMBA_SSM = (
    Row(
        "selective_scan_fn",
        f"u delta {SCAN}",
        "selective_scan",
        package_adapters.selective_scan_fn,
        cases.package_scan,
        reference="selective_scan_ref",
        within="mamba_ssm",
    ),
    Row(
        "selective_scan_ref",
        f"u delta {SCAN}",
        "selective_scan",
        package_adapters.selective_scan_fn,
        cases.package_scan,
        within="mamba_ssm",
    ),
    Row(
        "selective_state_update",
        f"state x {STEP} state_batch_indices",
        "selective_scan or ssd_scan",
        package_adapters.selective_state_update,
        cases.package_step,
        newer=1,
        reference="selective_state_update_ref",
        within="mamba_ssm",
    ),
    Row(
        "selective_state_update_ref",
        f"state x {STEP}",
        "selective_scan or ssd_scan",
        package_adapters.selective_state_update,
        cases.package_step,
        within="mamba_ssm",
    ),
    Row(
        "mamba_chunk_scan_combined",
        CHUNK,
        "ssd_scan",
        package_adapters.mamba_chunk_scan_combined,
        cases.package_chunk_scan,
        newer=1,
        reference="ssd_chunk_scan_combined_ref",
        within="mamba_ssm",
        bfloat16=False,  # the reference answers in float32 then, the kernel in x's dtype
    ),
)

CAUSAL_CONV1D = (
    Row(
        "causal_conv1d_fn",
        "x weight bias seq_idx initial_states return_final_states final_states_out activation",
        "causal_conv1d",
        package_adapters.conv1d_package_fn,
        cases.package_conv,
        reference="causal_conv1d_ref",
        within="causal_conv1d",
    ),
    Row(
        "causal_conv1d_ref",
        "x weight bias initial_states return_final_states final_states_out activation",
        "causal_conv1d",
        package_adapters.conv1d_package_ref,
        cases.package_conv,
        within="causal_conv1d",
    ),
    Row(
        "causal_conv1d_update",
        "x conv_state weight bias activation cache_seqlens conv_state_indices",
        "causal_conv1d",
        package_adapters.conv1d_package_update,
        cases.package_conv_step,
        newer=1,
        reference="causal_conv1d_update_ref",
        within="causal_conv1d",
    ),
    Row(
        "causal_conv1d_update_ref",
        "x conv_state weight bias activation cache_seqlens",
        "causal_conv1d",
        package_adapters.conv1d_package_update,
        cases.package_conv_step,
        within="causal_conv1d",
    ),
)

MAMBAPY = tuple(
    Row(
        name,
        "self x delta A B C D",
        "selective_scan",
        package_adapters.mambapy_scan,
        cases.method_scan,
        within="mambapy",
        method=True,
        bfloat16=False,  # the parallel scan itself refuses float32 decays beside bfloat16 sums
    )
    for name in ("selective_scan", "selective_scan_seq")
)

TABLE: tuple[Row, ...] = (*TRANSFORMERS, *GEMMA, *MAMBA_SSM, *CAUSAL_CONV1D, *MAMBAPY)
