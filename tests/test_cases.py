"""The rule that compares can refuse: each way to be wrong, and what its message names."""

import pytest
import torch
from cases import LAYOUTS, TOLERANCES, assert_close, ids, nan_surrounded, scan_inputs

EXACT = {"y": torch.tensor([1.0, -4.0], dtype=torch.float64), "dA": torch.ones(2).double()}
ORACLE = {"y": torch.tensor([1.0, -4.0]), "dA": torch.ones(2)}


def changed(y):
    return ORACLE | {"y": y}


def test_a_rounding_passes():
    assert_close(ORACLE, ORACLE, EXACT)
    assert_close(changed(torch.tensor([1.0 + 15 * 4 * 2**-24, -4.0])), ORACLE, EXACT)


def test_twice_the_error_of_the_oracle_passes():
    oracle = changed(torch.tensor([1.0, -4.5]))
    assert_close(changed(torch.tensor([1.0, -5.0])), oracle, EXACT)
    with pytest.raises(AssertionError, match="y: error 1.1, allowed 1 "):
        assert_close(changed(torch.tensor([1.0, -5.1])), oracle, EXACT)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed(torch.tensor([1.0, 4.0])), "^y: error 8"),
        (changed(torch.tensor([1.0 + 17 * 4 * 2**-24, -4.0])), "^y: error"),
        (changed(torch.tensor([1.0, torch.nan])), "^y is not finite"),
        (changed(torch.tensor([torch.inf, -4.0])), "^y is not finite"),
        (changed(torch.tensor([[1.0, -4.0]])), "^y: shape"),
        (changed(None), "^y is missing"),
        ({"y": ORACLE["y"]}, "dA"),
        (ORACLE | {"dz": torch.ones(2)}, "dz"),
    ],
    ids=["sign", "rounding", "nan", "inf", "shape", "none", "forgotten", "invented"],
)
def test_refused(found, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(found, ORACLE, EXACT)


def test_overflow_only_where_the_oracle_overflows():
    oracle = changed(torch.tensor([1.0, -torch.inf]))
    assert_close(changed(torch.tensor([1.0, torch.nan])), oracle, EXACT)
    with pytest.raises(AssertionError, match="^y is not finite exactly where"):
        assert_close(ORACLE, oracle, EXACT)
    with pytest.raises(AssertionError, match="^y: error"):
        assert_close(changed(torch.tensor([2.0, torch.nan])), oracle, EXACT)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tolerances_are_a_rounding_or_sixteen(dtype):
    half_unit = torch.finfo(dtype).eps / 2
    assert TOLERANCES[dtype] in (half_unit, 16 * half_unit)


def test_surrounded_by_nan_on_every_side():
    x = torch.arange(6.0).view(1, 2, 3)
    inside = nan_surrounded(x)
    torch.testing.assert_close(inside, x, rtol=0, atol=0)
    assert inside._base.isnan().sum() == inside._base.numel() - x.numel()
    for axis in range(3):
        assert inside._base.select(axis, 0).isnan().all()
        assert inside._base.select(axis, -1).isnan().all()


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("case", LAYOUTS, ids=ids(LAYOUTS))
def test_a_layout_holds_on_every_device(case, device):
    """meta stands for a device to which the tensors are copied."""
    u = scan_inputs(case, device=device)["u"]
    assert u.device.type == device
    assert u.storage_offset() > 0 or not u.is_contiguous()
    assert u.stride() == scan_inputs(case)["u"].stride()
