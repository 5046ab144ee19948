"""Our FP8: every number against E4M3 and E5M2 written out from their bits, products against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_xalign.config import Fp8Config
from megatron_xalign.training import fp8_linear
from megatron_xalign.training.fp8_linear import GRADIENT, INPUT, WEIGHT, Fp8Product, scale_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Layer(Fp8Product, torch.nn.Module):
    """A layer outside of Megatron."""

    def __init__(self, weight: torch.Tensor, fp8: Fp8Config, in_bf16: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.tp_group: Any = None
        self.enable_fp8(fp8, in_bf16)


def numbers_of(exponent_bits: int, mantissa_bits: int, largest: float) -> torch.Tensor:
    """All finite numbers of an 8-bit float from 0 up, by the formula of its format."""
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        value = (
            mantissa * 2.0 ** (1 - bias - mantissa_bits) if exponent == 0
            else (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        )
        if value <= largest:
            found.append(value)
    return torch.tensor(found, dtype=torch.float64)


GRIDS = {E4M3: numbers_of(4, 3, 448.0), E5M2: numbers_of(5, 2, 57344.0)}


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The number of the format next to each value, the even code where two are as near."""
    grid = GRIDS[dtype]
    above = torch.searchsorted(grid, values.abs().double()).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    to_low, to_high = values.abs().double() - low, high - values.abs().double()
    take_high = (to_high < to_low) | ((to_high == to_low) & (above % 2 == 0))
    return torch.where(take_high, high, low) * values.double().sign()


@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("role", [INPUT, WEIGHT, GRADIENT])
def test_quantising_takes_the_nearest_number_of_the_format(fp8_format: Any, role: int) -> None:
    layer = Layer(torch.zeros(16, 16), Fp8Config(recipe="tensorwise", format=fp8_format))
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(role)) * 10 ** torch.linspace(-6, 2, 32)
    dtype = E5M2 if role == GRADIENT and fp8_format == "hybrid" else E4M3
    quantised, factor = layer.quantise(role, values)
    assert quantised.dtype == dtype
    largest = {E4M3: 448.0, E5M2: 57344.0}[dtype]
    scale = torch.tensor(largest) / values.abs().max()
    assert float(factor) == pytest.approx(1 / float(scale), rel=1e-6)
    assert torch.equal(quantised.double(), nearest(values * scale, dtype))
    assert float(quantised.double().abs().max()) == largest


def test_a_tensor_of_zeros_stays_zero_and_a_tiny_one_is_finite() -> None:
    layer = Layer(torch.zeros(16, 16), Fp8Config(recipe="tensorwise"))
    for values in (torch.zeros(4, 16), torch.full((4, 16), 1e-44)):
        quantised, factor = layer.quantise(INPUT, values)
        assert torch.isfinite(quantised.float() * factor).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tokens", [32, 21])
def test_products_and_gradients_are_those_of_the_quantised_numbers(
    scaled: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch._scaled_mm and with the float32 product that stands for it on the CPU."""
    monkeypatch.setattr(fp8_linear, "scaled_product_on_cpu", scaled)
    generator = torch.Generator().manual_seed(3)
    layer = Layer(torch.randn(48, 32, generator=generator), Fp8Config(recipe="tensorwise"))
    x = torch.randn(tokens, 1, 32, generator=generator, requires_grad=True)
    out = fp8_linear._Product.apply(x, layer.weight, layer)
    gradient = torch.randn(out.shape, generator=generator)
    out.backward(gradient)

    def through(role: int, tensor: torch.Tensor) -> torch.Tensor:
        quantised, factor = layer.quantise(role, tensor.detach().reshape(-1, tensor.shape[-1]))
        return quantised.double() * factor.double()

    x_MK, w_NK, g_MN = through(INPUT, x), through(WEIGHT, layer.weight), through(GRADIENT, gradient)
    for ours, expected in (
        (out.detach().squeeze(1), x_MK @ w_NK.t()), (x.grad.squeeze(1), g_MN @ w_NK),
        (layer.weight.grad, g_MN.t() @ x_MK),
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    exact = (x.detach().squeeze(1).double() @ layer.weight.detach().double().t())
    error = float((out.detach().squeeze(1).double() - exact).norm() / exact.norm())
    assert 0.005 < error < 0.06  # it is FP8: three bits behind the leading one


def step(layer: Layer, *amax: float) -> None:
    layer.end_step(torch.tensor(amax))


def test_delayed_scales_come_from_the_largest_value_of_the_history() -> None:
    layer = Layer(torch.ones(16, 16), Fp8Config(recipe="delayed", amax_history_len=3, margin=1))
    assert layer.fp8_scale.tolist() == [0, 0, 0]
    for amax, largest in ((2.0, 2.0), (4.0, 4.0), (1.0, 4.0), (1.0, 4.0), (1.0, 1.0)):
        step(layer, amax, amax, amax)
        assert layer.fp8_scale[INPUT] == pytest.approx(448 / largest / 2)
        assert layer.fp8_scale[GRADIENT] == pytest.approx(57344 / largest / 2)
    recent = Layer(
        torch.ones(16, 16), Fp8Config(recipe="delayed", amax_history_len=3, amax_compute_algo="most_recent")
    )
    step(recent, 4, 4, 4)
    step(recent, 2, 2, 2)
    assert recent.fp8_scale[WEIGHT] == 224


def test_values_beyond_the_history_are_cut_off_not_infinite() -> None:
    layer = Layer(torch.ones(16, 16), Fp8Config(recipe="delayed", amax_history_len=2))
    step(layer, 1, 1, 1)
    quantised, factor = layer.quantise(INPUT, torch.tensor([[0.5, -3.0]]))
    assert (quantised.float() * factor).tolist() == [[0.5, -1.0]]


def test_an_overflow_leaves_history_and_scales_as_they_were() -> None:
    layer = Layer(torch.ones(16, 16), Fp8Config(recipe="delayed", amax_history_len=2))
    step(layer, 1, 2, 4)
    before = layer.fp8_scale.tolist(), layer.fp8_amax_history.tolist()
    step(layer, math.inf, math.nan, math.inf)
    assert (layer.fp8_scale.tolist(), layer.fp8_amax_history.tolist()) == before
    step(layer, 0, 2, 4)  # nothing came in: one zero says nothing yet
    assert layer.fp8_scale[INPUT] == 448


def test_what_a_step_saw_does_not_depend_on_cuts_repeats_or_evaluation() -> None:
    fp8 = Fp8Config(recipe="delayed", amax_history_len=4)
    values = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    whole, cut = Layer(torch.ones(16, 16), fp8), Layer(torch.ones(16, 16), fp8)
    for layer in (whole, cut):
        step(layer, 1, 1, 1)
    whole.quantise(INPUT, values)
    for part in (values[:3], values[3:], values[3:]):
        cut.quantise(INPUT, part)
    cut.eval()
    cut.quantise(INPUT, values * 100)
    cut.train()
    cut.quantised_copy(values * 100)
    assert cut.seen_in_step().tolist() == whole.seen_in_step().tolist() == [float(values.abs().max()), 0, 0]


def test_the_copy_is_what_the_product_reads_and_the_state_stays_float32() -> None:
    layer = Layer(torch.ones(16, 16), Fp8Config(recipe="delayed", amax_history_len=4))
    step(layer, 3, 1, 1)
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.fp8_scale.dtype == torch.float32
    assert float(layer.fp8_scale[INPUT]) == pytest.approx(448 / 3, rel=1e-7)
    values = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    quantised, factor = layer.quantise(INPUT, values)
    assert torch.equal(layer.quantised_copy(values), (quantised.float() * factor).bfloat16())
    assert not torch.equal(layer.quantised_copy(values), values)


def test_a_loaded_state_is_used_at_once() -> None:
    fp8 = Fp8Config(recipe="delayed", amax_history_len=4)
    trained, fresh = Layer(torch.ones(16, 16), fp8), Layer(torch.ones(16, 16), fp8)
    step(trained, 2, 2, 2)
    fresh.quantise(INPUT, torch.ones(1, 16))  # finds that there is no history
    fresh.load_state_dict(trained.state_dict())
    assert float(fresh.quantise(INPUT, torch.ones(1, 16))[1]) == pytest.approx(2 / 448)


def test_scales_of_zero_and_infinity_are_one() -> None:
    assert scale_of(torch.tensor(0.0), E4M3, 0) == 1 and scale_of(torch.tensor(math.inf), E4M3, 0) == 1
