"""Whether two trees of plain values and tensors are the same to the last bit."""

import torch


def assert_equal(one, two, path="value"):
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_equal(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for index, (a, b) in enumerate(zip(one, two)):
            assert_equal(a, b, f"{path}[{index}]")
    else:
        assert one == two or one != one, path
