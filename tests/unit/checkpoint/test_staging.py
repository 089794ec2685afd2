"""Host copies keep the values of the moment at which they were taken, and their memory is used again."""

from collections import OrderedDict

import torch

from ssa_pretrain.checkpoint.staging import HostCopies


def test_copies_keep_their_values_while_the_live_tensors_change():
    live = {"a": torch.arange(6.0).view(2, 3), "b": [torch.ones(2, dtype=torch.bfloat16), {"lr": 0.1}], "c": (1, "x")}
    view = live["a"].t()[1:]
    copies = HostCopies(torch.device("cpu"))
    with copies.taking():
        taken, part = copies.tree("live", live), copies.tensor("view", view)
    wanted = view.clone()
    live["a"].zero_()
    live["b"][0].fill_(7)
    live["b"][1]["lr"] = 0.2
    copies.wait()
    assert taken["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert taken["b"][0].tolist() == [1, 1] and taken["b"][0].dtype is torch.bfloat16
    assert taken["b"][1] == {"lr": 0.1} and taken["c"] == (1, "x")
    assert torch.equal(part, wanted) and part.is_contiguous()
    assert copies.device_seconds() == 0.0


def test_memory_is_used_again_by_the_next_snapshot():
    copies, live = HostCopies(torch.device("cpu")), torch.ones(3)
    first = copies.tensor("x", live)
    live.fill_(2)
    second = copies.tensor("x", live)
    assert first.data_ptr() == second.data_ptr() and second.tolist() == [2, 2, 2]
    assert copies.tensor("x", torch.ones(4)).shape == (4,)


def test_containers_keep_their_type_and_attributes():
    live = OrderedDict(weight=torch.ones(1))
    live._metadata = {"": {"version": 2}}  # as torch's state dicts have
    taken = HostCopies(torch.device("cpu")).tree("x", live)
    assert type(taken) is OrderedDict and taken._metadata == {"": {"version": 2}}
    assert taken["weight"] is not live["weight"] and live["weight"].tolist() == [1]


def test_tensor_that_occurs_twice_is_copied_once():
    live = torch.ones(3)
    found = HostCopies(torch.device("cpu")).tree("state", {"a": live, "b": [live, live.clone()]})
    assert found["a"] is found["b"][0] and found["a"] is not live
    assert found["b"][1] is not found["a"] and torch.equal(found["b"][1], live)


def test_parameters_are_copied_without_their_gradients():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    taken = HostCopies(torch.device("cpu")).tensor("p", parameter)
    assert type(taken) is torch.Tensor and not taken.requires_grad and taken.grad is None
