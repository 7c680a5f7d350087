"""Options: what is accepted, and what the errors say."""

import pytest
import torch

from effpass import Config, PackVarlen
from tests.tiny import Stack


def test_defaults_are_exact_and_compile_with_inductor() -> None:
    assert Config() == Config.from_options(None)
    assert Config().compiler == "inductor" and Config().passes == ()


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'compilr'.*did you mean 'compiler'\?"):
        Config.from_options({"compilr": "eager"})


def test_unknown_option_far_from_all_points_to_inductor() -> None:
    with pytest.raises(ValueError, match="options of Inductor go under 'inductor'"):
        Config.from_options({"zzz": 1})


def test_unknown_value_names_the_choices_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"one of inductor, eager, onnxruntime, found 'inductr'; did you mean"
    ):
        Config.from_options({"compiler": "inductr"})
    with pytest.raises(ValueError, match="expected targets to be one of"):
        Config.from_options({"targets": ["tpu"]})
    with pytest.raises(ValueError, match="expected mode to be one of"):
        Config.from_options({"mode": "fast"})


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="expected verify to be True or False, found 1"):
        Config.from_options({"verify": 1})
    with pytest.raises(TypeError, match="expected targets to be a tuple of names, found 'cpu'"):
        Config(targets="cpu")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="expected passes to be of PackVarlen, ReduceTokens, found 'quantize'"
    ):
        Config(passes=("quantize",))
    with pytest.raises(TypeError, match="expected pack_varlen to be True, False or a dict"):
        Config.from_options({"pack_varlen": 1})


def test_passes_by_name() -> None:
    assert Config.from_options({"pack_varlen": True}).passes == (PackVarlen(),)
    assert Config.from_options({"pack_varlen": {}}).passes == (PackVarlen(),)
    assert Config.from_options({"pack_varlen": False}).passes == ()
    with pytest.raises(ValueError, match="expected each pass once"):
        Config(passes=(PackVarlen(), PackVarlen()))
    with pytest.raises(ValueError, match="unknown field 'ratio' of pack_varlen: it has none"):
        Config.from_options({"pack_varlen": {"ratio": 1}})
    with pytest.raises(ValueError, match="did you mean 'pack_varlen'"):
        Config.from_options({"pack_varlens": True})


def test_a_config_comes_alone() -> None:
    config = Config(compiler="eager")
    assert Config.from_options({"config": config}) is config
    with pytest.raises(TypeError, match="alone in options"):
        Config.from_options({"config": config, "verify": True})


def test_mode_becomes_inductor_patches_and_the_users_own_win() -> None:
    patches = Config(mode="max-autotune", inductor={"max_autotune": False}).inductor_patches()
    assert patches["max_autotune"] is False and len(patches) > 1
    assert Config(mode="default").inductor_patches() == {}


def test_torch_compile_reports_a_bad_option() -> None:
    compiled = torch.compile(Stack(), backend="effpass", options={"verfy": True})
    with pytest.raises(Exception, match="did you mean 'verify'"):
        compiled(torch.randn(1, 3, 8))
